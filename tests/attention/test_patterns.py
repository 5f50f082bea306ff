"""Streaming windows and block-sparse patterns: exact on what they look at, which is what they count."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.attention.support import attend, sharp
from workbench.attention import BlockSparse, StreamingWindow
from workbench.attention.base import visible_entries
from workbench.attention.methods.block_sparse import _blocks, _widest_probe, chosen_lines, vertical_slash_attention
from workbench.core.causal_attention import causal_attention
from workbench.core.partial_softmax import PartialSoftmax
from workbench.examples import needle
from workbench.measure.memory import LiveBytes
from workbench_kernels import Scoring


def on_pairs(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, cap: float | None) -> Tensor:
    """Softmax attention over the pairs where seen [h, n, n] says so, in float64."""
    groups = query.shape[0] // key.shape[0]
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64)
    for h in range(query.shape[0]):
        scores = query[h].double() @ key[h // groups].double().T * scale
        scores = scores if cap is None else cap * (scores / cap).tanh()
        out[h] = scores.masked_fill(~seen[h], -torch.inf).softmax(-1) @ value[h // groups].double()
    return out.float()


# --- Parts of a softmax


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 3), (8, 16)])
def test_parts_join_to_the_whole_in_any_order(cuts: tuple[int, ...]) -> None:
    query, key, value = sharp(17)
    hidden = torch.ones(17, 17, dtype=torch.bool).triu(1)
    want = causal_attention(query, key, value, Scoring(1.0))
    edges = [0, *cuts, 17]
    parts = [
        PartialSoftmax.over(query, key[:, a:b], value[:, a:b], Scoring(1.0), hidden=hidden[:, a:b])
        for a, b in pairwise(edges)
    ]
    for order in (parts, parts[::-1]):
        joined = order[0]
        for part in order[1:]:
            joined = joined.merged(part)
        torch.testing.assert_close(joined.output(), want, rtol=1e-5, atol=1e-5)


# --- Streaming windows


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 9), (1, 1), (4, 16), (7, 3), (40, 10), (3, 500)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens", [1, 2, 37, 300])
def test_first_and_last_tokens_are_seen_and_nothing_else(
    sinks: int, window: int, softcap: float | None, tokens: int
) -> None:
    tensors = sharp(tokens)
    seen = torch.zeros(4, tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        for j in range(i + 1):
            seen[:, i, j] = j > i - window or j < sinks
    method = StreamingWindow(sinks=sinks, window=window)
    got, computed = attend(method, tensors, Scoring(0.4, softcap=softcap))
    torch.testing.assert_close(got, on_pairs(*tensors, seen, 0.4, softcap), rtol=1e-4, atol=1e-5)
    assert computed == int(seen.sum()) == 4 * method.entries(tokens, 1)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("tokens", [100, 1000])
def test_sinks_and_window_are_as_wide_as_the_budget_allows(budget: float, tokens: int) -> None:
    sinks, window = StreamingWindow(budget=budget).widths(tokens)
    most = budget * visible_entries(tokens)
    assert visible_entries(tokens, sinks + window) <= most < visible_entries(tokens, sinks + window + 1)


def test_a_layer_with_a_narrow_window_of_its_own_stays_exact() -> None:
    tensors = sharp(200)
    want = causal_attention(*tensors, Scoring(0.4, 12))
    for method in (StreamingWindow(budget=0.3), BlockSparse(budget=0.3), BlockSparse(budget=0.3, pattern="block")):
        got, computed = attend(method, tensors, Scoring(0.4, 12))
        assert torch.equal(got, want)
        assert computed == 4 * visible_entries(200, 12)


# --- Columns and diagonals


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("tokens", "probe", "share"), [(40, 8, 0.6), (40, 1, 0.3), (130, 16, 0.5), (130, 130, 1.0)])
def test_columns_and_diagonals_that_the_last_queries_weigh_most_are_computed(
    tokens: int, probe: int, share: float, softcap: float | None
) -> None:
    query, key, value = sharp(tokens)
    allowed, first = int(share * visible_entries(tokens)), tokens - probe
    exact = torch.zeros(4, tokens, tokens, dtype=torch.float64)
    for h in range(4):
        scores = query[h].double() @ key[h // 2].double().T * 0.4
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        exact[h] = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    seen = torch.zeros(4, tokens, tokens, dtype=torch.bool)
    want_computed = 0
    for h in range(4):
        seen[h, first:] = torch.ones(tokens, tokens).tril().bool()[first:]
        spent = int(seen[h].sum())
        lines = []  # weight, entries, diagonal or column, where
        for where in range(first):
            diagonal = sum(float(exact[h, i, i - where]) for i in range(first, tokens))
            column = float(exact[h, first:, where].sum())
            lines += [
                (torch.inf if where == 0 else diagonal, first - where, 0, where),
                (column, first - where, 1, where),
            ]
        for _, entries, kind, where in sorted(lines, key=lambda line: -line[0]):
            if spent + entries > allowed:
                break
            spent += entries
            for i in range(where, first):
                seen[h, i, i - where if kind == 0 else where] = True
        want_computed += spent
    got, computed = vertical_slash_attention(query, key, value, probe, allowed, Scoring(0.4, softcap=softcap))
    torch.testing.assert_close(got, on_pairs(query, key, value, seen, 0.4, softcap), rtol=1e-4, atol=1e-5)
    assert computed == want_computed <= 4 * allowed


def test_long_prompts_are_computed_in_stretches_that_meet() -> None:
    tensors = sharp(2100, heads=2, kv_heads=1)
    allowed = int(0.02 * visible_entries(2100))
    probe = _widest_probe(2100, allowed)
    got, _ = vertical_slash_attention(*tensors, probe, allowed, Scoring(0.4))
    first = 2100 - probe
    rows = (tensors[0][:, first:] @ tensors[1].transpose(1, 2)) * 0.4
    ahead = torch.arange(2100) > torch.arange(first, 2100)[:, None]
    probs = rows.masked_fill(ahead, -torch.inf).softmax(-1)
    verticals, slashes = chosen_lines(
        probs.sum(1)[:, :first],
        torch.stack([_diagonal_sums(p, first) for p in probs]),
        allowed - (visible_entries(2100) - visible_entries(first)),
    )
    seen = torch.zeros(2, 2100, 2100, dtype=torch.bool)
    for h in range(2):
        seen[h, :, :first] |= verticals[h]
        for o in slashes[h].nonzero()[:, 0].tolist():
            seen[h].diagonal(-o).fill_(True)
        seen[h, first:] = True
    seen &= torch.ones(2100, 2100).tril().bool()
    torch.testing.assert_close(got, on_pairs(*tensors, seen, 0.4, None), rtol=1e-4, atol=1e-4)


def _diagonal_sums(probs: Tensor, first: int) -> Tensor:
    sums = torch.zeros(first)
    for r, row in enumerate(probs):
        behind = first + r - torch.arange(len(row))
        ok = (behind >= 0) & (behind < first)
        sums.index_add_(0, behind[ok], row[ok])
    return sums


@pytest.mark.parametrize("allowed", [3000, 6000, 9000])
def test_probing_takes_at_most_a_quarter(allowed: int) -> None:
    probe = _widest_probe(200, allowed)
    cost = visible_entries(200) - visible_entries(200 - probe)
    assert cost <= max(allowed / 4, 200) < cost + 200 - probe or probe == 200


# --- Blocks


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize(("tokens", "budget"), [(30, 0.6), (64, 0.4), (133, 0.3), (133, 0.7)])
def test_blocks_with_the_largest_mean_products_are_computed(tokens: int, budget: float, sinks: bool) -> None:
    query, key, value = sharp(tokens)
    plan = _blocks(tokens, int(budget * visible_entries(tokens)), 16)
    edges = list(range(0, tokens, plan.size))
    seen, guesses = torch.zeros(4, tokens, tokens, dtype=torch.bool), 0
    for h in range(4):
        for b, start in enumerate(edges):
            mean = query[h, start : start + plan.size].mean(0)
            products = [float(mean @ key[h // 2, low : low + plan.size].mean(0)) for low in edges[:b]]
            if sinks and products:
                products[0] = torch.inf
            guesses += len(products) if plan.top > 1 else 0
            for other in [*sorted(range(b), key=lambda o: -products[o])[: plan.top - 1], b]:
                seen[h, start : start + plan.size, edges[other] : edges[other] + plan.size] = True
    seen &= torch.ones(tokens, tokens).tril().bool()
    method = BlockSparse(budget=budget, pattern="block", block=16, sinks=sinks)
    got, computed = attend(method, (query, key, value))
    torch.testing.assert_close(got, on_pairs(query, key, value, seen, 0.4, None), rtol=1e-4, atol=1e-5)
    assert computed == int(seen.sum()) + guesses == 4 * plan.entries <= 4 * budget * visible_entries(tokens)


@pytest.mark.parametrize("pattern", ["vertical-slash", "block"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 64, 65, 300])
def test_any_length_is_within_any_budget_that_is_not_refused(pattern: str, tokens: int) -> None:
    tensors, full = sharp(tokens), visible_entries(tokens)
    for budget in (0.05, 0.2, 0.5, 0.95, 1.0):
        method = BlockSparse(budget=budget, pattern=pattern)
        if method.entries(tokens, 1) <= budget * full:
            got, computed = attend(method, tensors)
            assert got.isfinite().all()
            assert computed <= 4 * budget * full


def test_working_memory_does_not_grow_with_the_square_of_the_length() -> None:
    for method in (
        StreamingWindow(sinks=4, window=100),
        BlockSparse(budget=0.05),
        BlockSparse(budget=0.05, pattern="block"),
    ):
        tensors = sharp(4096, heads=2, kv_heads=1)
        with LiveBytes() as live:
            attend(method, tensors)
        assert live.peak < 2 * 4096 * 4096 * 4 / 8, method.key  # an eighth of the matrix of scores


# --- Real attention


@pytest.mark.parametrize("key", ["streaming-window", "block-sparse"])
def test_the_error_falls_as_the_budget_grows(default_session: wb.Session, key: str) -> None:
    trace = default_session.read(needle(400).text)
    layer = trace.layers[12]
    tensors = (layer.queries.float(), layer.keys.float(), layer.values.float())
    want = causal_attention(*tensors, layer.scoring)
    errors = []
    for budget in (0.1, 0.25, 0.5, 0.8, 1.0):
        got, _ = attend(wb.method(key, budget=budget), tensors, layer.scoring)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[3] and errors[-1] < 1e-5
