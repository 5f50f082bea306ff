"""Sinks and slopes: attention in every form against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workbench.attention.lines import line_attention
from workbench.attention.methods.memory_efficient import chunked_attention
from workbench.attention.token_blocks import Blocks, block_attention
from workbench.core.attention_rows import row_blocks
from workbench.core.causal_attention import causal_attention
from workbench_kernels import Chosen, Scoring, attend
from workbench_kernels.lowrank import attend_factors
from workbench_kernels.reading import read_attention
from workbench_kernels.softmax import attention_state, merge_states

HEADS, KV_HEADS, TOKENS, WIDTH = 4, 2, 23, 8
SINKS = torch.tensor([0.7, -1.5, 2.0, 0.0])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
FIRST = 100_000  # where the first key stands: positions that float32 hardly tells apart once they are multiplied

Attending = Callable[[Tensor, Tensor, Tensor, Scoring], Tensor]
TERMS = pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.3, sinks=SINKS),
        Scoring(0.3, slopes=SLOPES),
        Scoring(0.3, 6, 1.5, sinks=SINKS.bfloat16()),
        Scoring(0.3, 6, 1.5, slopes=SLOPES),
    ],
    ids=["sinks", "slopes", "sinks in a window", "slopes in a window"],
)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, TOKENS, WIDTH, generator=made) for n in (HEADS, KV_HEADS, KV_HEADS))


def by_loops(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention, number by number."""
    out = torch.zeros(HEADS, TOKENS, WIDTH)
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        sink = -math.inf if scoring.sinks is None else float(scoring.sinks[head])
        slope = 0.0 if scoring.slopes is None else float(scoring.slopes[head])
        for row in range(TOKENS):
            first = 0 if scoring.window is None else max(0, row - scoring.window + 1)
            weights = {}
            for column in range(first, row + 1):
                score = scoring.scale * float(query[head, row].double() @ key[group, column].double())
                if scoring.softcap is not None:
                    score = scoring.softcap * math.tanh(score / scoring.softcap)
                weights[column] = math.exp(score + slope * (column - row))
            total = sum(weights.values()) + math.exp(sink)
            for column, weight in weights.items():
                out[head, row] += weight / total * value[group, column]
    return out


def seen(scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
    """Positions far from 0, which of them see which, and their offsets."""
    at = torch.arange(FIRST, FIRST + TOKENS)
    return at, scoring.visible(at, at[None]), scoring.offsets(at, at[None])


def over_a_store(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    _, visible, offsets = seen(scoring)
    return attend(query, key, value, scoring, visible=visible, offsets=offsets)[0]


def merged(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Of two states over every other key."""
    at, visible, offsets = seen(scoring)
    states = []
    for part, terms in ((at % 2 == 0, scoring.without_sinks()), (at % 2 == 1, scoring)):
        some = None if offsets is None else offsets[:, part]
        states.append(attention_state(query, key[:, part], value[:, part], visible[..., part], terms, some))
    return merge_states(states)


def by_rows(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    out, where = torch.zeros_like(query), torch.arange(FIRST, FIRST + TOKENS)
    for block in row_blocks(query, key, scoring, query_positions=where, key_positions=where, block_bytes=2048):
        values = value[:, block.keys].repeat_interleave(HEADS // KV_HEADS, dim=0)
        out[:, block.rows] = block.probs @ values
    return out


def by_columns(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Of each head some columns and all diagonals that make up everything it sees."""
    columns = torch.arange(TOKENS) % 3 == 0
    diagonals = torch.ones(TOKENS, dtype=torch.bool)
    rows = [
        line_attention(query[h], key[h // 2], value[h // 2], columns, diagonals, scoring.of(h)) for h in range(HEADS)
    ]
    return torch.stack(rows)


def from_factors(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Coefficients as wide as all heads, and bases that pick a head's."""
    flat = [x.transpose(0, 1).flatten(1) for x in (query, key, value)]
    bases = [torch.eye(len(x) * WIDTH).view(len(x), WIDTH, -1).transpose(1, 2) for x in (query, key, value)]
    out = attend_factors(*flat, *bases, scoring, tile=7)
    return out.view(TOKENS, HEADS, WIDTH).transpose(0, 1)


@TERMS
@pytest.mark.parametrize(
    "attending", [causal_attention, over_a_store, merged, by_rows, from_factors, chunked_attention]
)
def test_attention_with_sinks_and_slopes_is_that_of_plain_loops(attending: Attending, scoring: Scoring) -> None:
    inputs = drawn()
    torch.testing.assert_close(attending(*inputs, scoring), by_loops(*inputs, scoring), rtol=1e-4, atol=1e-5)


@TERMS
@pytest.mark.parametrize(
    "attending", [by_columns, lambda *x: block_attention(*x[:3], Blocks(4, 6, 0), x[3], sinks=True)]
)
def test_so_are_patterns_that_hold_everything(attending: Attending, scoring: Scoring) -> None:
    inputs, scoring = drawn(), replace(scoring, window=None)
    torch.testing.assert_close(attending(*inputs, scoring), by_loops(*inputs, scoring), rtol=1e-4, atol=1e-5)


@TERMS
def test_sums_of_columns_leave_out_what_sinks_got(scoring: Scoring) -> None:
    query, key, _ = drawn()
    sums = read_attention(query, key, scoring).sums
    ones = torch.eye(TOKENS).expand(KV_HEADS, -1, -1)
    weights = torch.stack([causal_attention(query, key, ones[..., i : i + 1], scoring)[..., 0] for i in range(TOKENS)])
    torch.testing.assert_close(sums, weights.sum(dim=-1).T, rtol=1e-4, atol=1e-4)


def test_slopes_without_positions_are_an_error_and_not_another_attention() -> None:
    with pytest.raises(ValueError, match="offsets"):
        attend(*drawn(), Scoring(1.0, slopes=SLOPES))


def test_a_sink_that_would_stand_somewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="a sink stands nowhere"):
        Scoring(1.0, sinks=SINKS, slopes=SLOPES)


def test_scorings_with_equal_numbers_are_equal() -> None:
    one, other = Scoring(1.0, sinks=SINKS), Scoring(1.0, sinks=SINKS.clone())
    assert one == other
    assert hash(one) == hash(other)
    assert one != Scoring(1.0)
    assert one != Scoring(1.0, sinks=SINKS + 1)
    assert Scoring(1.0).of(2) == Scoring(1.0)
    assert torch.equal(one.of(slice(1, 3)).sinks, SINKS[1:3])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_a_query_attends_to_what_was_chosen_for_it_and_stands_before_it(sinks: Tensor | None) -> None:
    query, key, value = drawn()
    keys = torch.stack(
        [torch.randperm(TOKENS, generator=torch.Generator().manual_seed(row))[:5] for row in range(TOKENS)]
    )
    scoring = Scoring(0.3, sinks=sinks, chosen=Chosen(torch.arange(TOKENS), keys.int()))
    want = torch.zeros(HEADS, TOKENS, WIDTH)
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        for row in range(TOKENS):
            seen = [column for column in sorted(keys[row].tolist()) if column <= row]
            weights = {at: math.exp(0.3 * float(query[head, row] @ key[group, at])) for at in seen}
            total = sum(weights.values()) + (0.0 if sinks is None else math.exp(float(sinks[head])))
            for column, weight in weights.items():
                want[head, row] += weight / total * value[group, column]
    torch.testing.assert_close(causal_attention(query, key, value, scoring), want)
    positions = torch.arange(TOKENS)
    visible = scoring.visible(positions[-7:], positions[None])
    got, _ = attend(query[:, -7:], key, value, scoring, visible=visible)
    torch.testing.assert_close(got, want[:, -7:])


def test_a_choice_says_nothing_of_queries_of_another_pass() -> None:
    chosen = Chosen(torch.tensor([4, 5]), torch.tensor([[0, 1], [2, 3]]))
    assert chosen.visible(torch.tensor([5]), torch.tensor([0, 2, 3])).tolist() == [[False, True, True]]
    with pytest.raises(ValueError, match="own pass"):
        chosen.visible(torch.tensor([6]), torch.tensor([0]))
