"""Streaming windows and block-sparse patterns: exact on what they look at, which is what they count."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.attention.support import attend, sharp
from workbench.attention import BlockSparse, StreamingWindow
from workbench.attention.base import visible_entries
from workbench.attention.lines import Lines, a_shape, heaviest, heaviest_of_both, line_attention, probed, widest_probe
from workbench.attention.pattern_search import fill_heads, judge, judges, judging_entries
from workbench.attention.token_blocks import blocks_seen, blocks_within
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
        torch.testing.assert_close(joined.output(Scoring(1.0)), want, rtol=1e-5, atol=1e-5)


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


def exact_weights(query: Tensor, key: Tensor, scale: float, cap: float | None = None) -> Tensor:
    """All softmax weights [h, n, n], float64."""
    tokens = query.shape[1]
    out = torch.zeros(len(query), tokens, tokens, dtype=torch.float64)
    for h in range(len(query)):
        scores = query[h].double() @ key[h * len(key) // len(query)].double().T * scale
        scores = scores if cap is None else cap * (scores / cap).tanh()
        out[h] = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
    return out


def on_lines(columns: Tensor, diagonals: Tensor) -> Tensor:
    """The pairs on columns and diagonals bool [h, n], entry by entry: [h, n, n]."""
    heads, tokens = columns.shape
    seen = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for h, i in itertools.product(range(heads), range(tokens)):
        for j in range(i + 1):
            seen[h, i, j] = bool(columns[h, j]) or bool(diagonals[h, i - j])
    return seen


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("tokens", "first"), [(40, 32), (40, 39), (130, 114), (17, 0)])
def test_probing_queries_weigh_columns_and_diagonals(tokens: int, first: int, softcap: float | None) -> None:
    query, key, value = sharp(tokens)
    scoring = Scoring(0.4, softcap=softcap)
    found, exact = probed(query, key, value, first, scoring), exact_weights(query, key, 0.4, softcap)
    torch.testing.assert_close(found.out, causal_attention(query, key, value, scoring)[:, first:], rtol=1e-4, atol=1e-5)
    for h in range(4):
        for where in range(tokens):
            column = exact[h, first:, where].sum()
            diagonal = sum(float(exact[h, i, i - where]) for i in range(max(first, where), tokens))
            assert float(found.columns[h, where]) == pytest.approx(float(column), abs=1e-4)
            assert float(found.diagonals[h, where]) == pytest.approx(diagonal, abs=1e-4)


@pytest.mark.parametrize("share", [0.04, 0.4, 0.97])
@pytest.mark.parametrize("allowed", [30, 200, 350])
def test_the_heaviest_columns_and_diagonals_fill_what_is_allowed(allowed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(allowed)
    weights = torch.rand(2, 3, 30, generator=generator)
    found = heaviest(*weights, allowed, share, first=2, last=3)
    for h in range(3):
        forced = ([0, 1], [0, 1, 2])
        orders = [
            [*always, *sorted(set(range(30)) - set(always), key=lambda at, kind=kind: -float(weights[kind, h, at]))]
            for kind, always in enumerate(forced)
        ]
        best: tuple[list[int], list[int]] = ([], [0])
        for lines in range(1, 61):
            vertical = int(share * lines)
            if vertical > 30 or lines - vertical > 30:
                continue
            taken = orders[0][:vertical], orders[1][: lines - vertical]
            if sum(30 - at for kind in taken for at in kind) <= allowed:
                best = taken
        assert found.columns[h].nonzero()[:, 0].tolist() == sorted(best[0])
        assert found.diagonals[h].nonzero()[:, 0].tolist() == sorted(best[1])
    assert int(found.entries().max()) <= allowed


def test_in_one_order_columns_and_diagonals_compete_by_weight() -> None:
    weights = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(0))
    found = heaviest_of_both(*weights, 90)
    for h in range(3):
        lines = [(float(weights[0, h, at]), 0, at) for at in range(20)]
        lines += [(torch.inf if at == 0 else float(weights[1, h, at]), 1, at) for at in range(20)]
        spent, taken = 0, []
        for _, kind, at in sorted(lines, key=lambda line: -line[0]):
            if spent + 20 - at > 90:
                break
            spent += 20 - at
            taken.append((kind, at))
        got = [(0, at) for at in found.columns[h].nonzero()[:, 0].tolist()]
        got += [(1, at) for at in found.diagonals[h].nonzero()[:, 0].tolist()]
        assert sorted(taken) == got and int(found.entries()[h]) == spent


def test_an_a_shape_is_first_columns_and_last_diagonals() -> None:
    found = a_shape(2, 40, 300, 1 / 4, torch.device("cpu"))
    count = int(found.columns[0].sum() + found.diagonals[0].sum())
    sinks = count // 4
    assert found.columns.tolist() == [[at < sinks for at in range(40)]] * 2
    assert found.diagonals.tolist() == [[at < count - sinks for at in range(40)]] * 2
    more = sum(40 - at for at in range((count + 1) // 4)) + sum(40 - at for at in range(count + 1 - (count + 1) // 4))
    assert int(found.entries()[0]) <= 300 < more


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_only_columns_and_diagonals_are_computed(tokens: int, softcap: float | None) -> None:
    query, key, value = sharp(tokens)
    generator = torch.Generator().manual_seed(tokens)
    columns, diagonals = (torch.rand(4, tokens, generator=generator) < 0.2 for _ in range(2))
    diagonals[:, 0] = True
    scoring = Scoring(0.4, softcap=softcap)
    got = torch.stack(
        [line_attention(query[h], key[h // 2], value[h // 2], columns[h], diagonals[h], scoring) for h in range(4)]
    )
    seen = on_lines(columns, diagonals)
    torch.testing.assert_close(got, on_pairs(query, key, value, seen, 0.4, softcap), rtol=1e-4, atol=1e-5)
    rows = torch.tensor([0, tokens // 2, tokens - 1]).unique()
    assert torch.equal(Lines(columns, diagonals).seen(rows, tokens), seen[:, rows])


def test_long_prompts_are_computed_in_stretches_that_meet() -> None:
    query, key, value = (x[0] for x in sharp(2100, heads=1, kv_heads=1))
    columns, diagonals = torch.zeros(2, 2100, dtype=torch.bool)
    columns[[3, 1500, 2000]] = diagonals[[0, 1, 700, 1500]] = True
    got = line_attention(query, key, value, columns, diagonals, Scoring(0.4))
    behind = torch.arange(2100)[:, None] - torch.arange(2100)
    seen = (columns | diagonals[behind.clamp_min(0)]) & (behind >= 0)
    want = on_pairs(query[None], key[None], value[None], seen[None], 0.4, None)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [100, 1500, 3000, 9000, 30_000])
def test_as_many_queries_probe_as_fit(most: int) -> None:
    probe, full = widest_probe(200, most), visible_entries(200)
    assert probe == 1 or full - visible_entries(200 - probe) <= most
    assert probe == 200 or full - visible_entries(200 - probe - 1) > most


# --- One pattern a head


@pytest.mark.parametrize(("rows", "allowed"), [(100, 4000), (100, 300), (100, 10), (7, 10_000), (0, 50)])
def test_judges_are_evenly_spread_and_cost_no_more_than_allowed(rows: int, allowed: int) -> None:
    at = judges(rows, allowed)
    assert at == sorted(set(at)) and judging_entries(at) <= allowed
    assert not at or (at[-1] == rows - 1 and at[0] >= 0)
    assert len(at) in (0, 16, rows) or max(b - a for a, b in pairwise([-1, *at])) - 1 <= -(-rows // len(at))
    if at and len(at) < min(16, rows):
        assert judging_entries([rows - 1 - step * rows // (len(at) + 1) for step in range(len(at) + 1)]) > allowed


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_pattern_that_holds_most_of_the_judges_attention_is_best(softcap: float | None) -> None:
    query, key, value = sharp(60)
    rows = torch.tensor([5, 31, 59])
    seen = [torch.rand(4, 3, 60, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in range(5)]
    exact = exact_weights(query, key, 0.4, softcap)[:, rows]
    held = torch.stack([(exact * each).sum((1, 2)) for each in seen])
    found = judge(query, key, value, rows, seen, Scoring(0.4, softcap=softcap))
    assert found.best.tolist() == held.argmax(0).tolist() and len(set(found.best.tolist())) > 1
    want = causal_attention(query, key, value, Scoring(0.4, softcap=softcap))[:, rows]
    torch.testing.assert_close(found.out, want, rtol=1e-4, atol=1e-5)


def heads_of_each_kind(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three heads: one looks at its neighbours, one at a few columns, one at blocks of its own kind far behind."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, tokens, 16, generator=generator) * 0.1 for _ in range(3))
    at = torch.arange(tokens)
    angle = at[:, None] / tokens * 40 * torch.tensor([1.0, 2.0, 4.0, 8.0])
    wave = torch.cat([angle.cos(), angle.sin()], 1)
    query[0, :, :8] += 4 * wave
    key[0, :, :8] += 4 * wave
    query[1, :, 0] += 8
    key[1, [17, 40, 41, 77, 103, 150, 222], 0] += 8
    kind = torch.randn(12, 16, generator=generator)[torch.randint(0, 12, (tokens // 16 + 1,), generator=generator)]
    kinds = kind.repeat_interleave(16, 0)[:tokens]
    query[2] += 1.5 * kinds
    key[2] += 1.5 * kinds
    return query, key, value


def test_each_head_gets_the_pattern_that_suits_it() -> None:
    query, key, value = heads_of_each_kind(400)
    want = causal_attention(query, key, value, Scoring(1.0))

    def errors(pattern: str) -> Tensor:
        got, _ = attend(BlockSparse(budget=0.3, pattern=pattern, block=16), (query, key, value), Scoring(1.0))
        return (got - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))

    alone = torch.stack([errors(pattern) for pattern in ("a-shape", "vertical-slash", "block")])
    assert alone.argmin(0).unique().numel() > 1  # no pattern suits all
    found = errors("search")
    assert float(found.sum()) < float(alone.sum(1).min())
    assert found[2] < 0.8 * alone[1, 2]  # where blocks serve, lines are not taken


def test_a_mixture_is_one_pattern_more_to_search() -> None:
    tensors = sharp(300)
    plain, mixed = (attend(BlockSparse(budget=0.3, mixture=on), tensors)[0] for on in (False, True))
    want = causal_attention(*tensors, Scoring(0.4))
    assert (mixed - want).norm() < (plain - want).norm()


# --- Blocks


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize(("tokens", "budget"), [(30, 0.6), (64, 0.4), (133, 0.3), (133, 0.7)])
def test_blocks_with_the_largest_mean_products_are_computed(tokens: int, budget: float, sinks: bool) -> None:
    query, key, value = sharp(tokens)
    plan = blocks_within(tokens, int(budget * visible_entries(tokens)), 16)
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
    rows = torch.arange(0, tokens, 7)
    assert torch.equal(blocks_seen(query, key, plan, rows, tokens, sinks=sinks), seen[:, rows])


@pytest.mark.parametrize("pattern", ["search", "a-shape", "vertical-slash", "block"])
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
        BlockSparse(budget=0.05, mixture=True),
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


def test_each_head_is_filled_in_its_own_pattern() -> None:
    query, _, value = tensors = sharp(50)
    first, best = 40, [2, 0, 1, 2]
    probes = probed(*tensors, first, Scoring(0.4))
    lines = [heaviest(probes.columns[:, :first], probes.diagonals[:, :first], 300, share) for share in (0.2, 0.8)]
    plan, rows = blocks_within(first, 500, 8), torch.arange(first)
    out = torch.full((len(query), first, value.shape[-1]), torch.nan)
    computed = fill_heads(out, *tensors, best, lines, plan, Scoring(0.4), sinks=True)
    of_prompt = [x[:, :first] for x in tensors]
    seen = [*(each.seen(rows, first) for each in lines), blocks_seen(*of_prompt[:2], plan, rows, first, sinks=True)]
    own = torch.stack([seen[choice][head] for head, choice in enumerate(best)])
    torch.testing.assert_close(out, on_pairs(*of_prompt, own, 0.4, None), rtol=1e-4, atol=1e-5)
    counted = [plan.entries if choice == 2 else int(lines[choice].entries()[head]) for head, choice in enumerate(best)]
    assert computed == sum(counted)
