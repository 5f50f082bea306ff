"""What every KV method promises, and what single ones do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kv.support import SHORT, TOKENS, feasible, kept_sets, model_of, random_ranking, softmax_rows, trace_of
from workbench import testing
from workbench.budget import Budget
from workbench.core.rope import Rotation
from workbench.errors import BadBudget, BadParameter, BadRecipe, BudgetTooSmall
from workbench.kv import (
    H2O,
    KIVI,
    TOVA,
    AdaKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LagKV,
    MiKV,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from workbench.kv.base import KVMethod, Study
from workbench.kv.plan import Plan, rank
from workbench.kv.ranking import Ranking
from workbench.kv.stores import DenseStore
from workbench.kv.stores.format import DenseFormat, PackedFormat, Shape, balancer
from workbench.models import TINY_ARCHITECTURES, tiny
from workbench.prompt import Prompt
from workbench.registry import find, registered
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan, study_of
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)
KEYS = [cls.key for cls in registered("kv")]
BUDGETED = [key for key in KEYS if find(key).takes_budget()]
SELECTING = [key for key in BUDGETED if find(key)().supplies("score")]
# ZipCache's budget raises the bits of both tiers before it makes more tokens salient.
FIXED = [key for key in SELECTING if not find(key)().supplies("allocate") and key != "zipcache"]


def described(key: str, **parameters: Any) -> KVMethod:
    found = find(key)(**{**SHORT.get(key, {}), **parameters})
    assert isinstance(found, KVMethod)
    return found


def plan_of(key: str, budget: Any, trace: Trace, dtype: torch.dtype = torch.bfloat16, **parameters: Any) -> Plan:
    asked = described(key, **parameters)
    methods: Any = [asked if budget is None else asked.with_budget(budget)]
    return make_plan(trace, methods, dtype, model=model_of(trace))


def within(key: str, budget: float, trace: Trace, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The plan at this budget, or at the smallest one that the refusal names."""
    return feasible(lambda share: plan_of(key, share, trace, dtype), budget)


# -- every method


@pytest.mark.parametrize("promise", testing.PROMISES[KVMethod], ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("key", KEYS)
def test_every_method_keeps_every_promise(key: str, promise: testing.Promise, subjects: testing.Subjects) -> None:
    testing.check_promise(promise, find(key), subjects, **SHORT.get(key, {}))


@pytest.mark.parametrize("key", BUDGETED)
def test_half_a_budget_is_used_rather_than_wasted(key: str) -> None:
    # Trap 19: budgets not reached.
    plan = within(key, 0.5, trace_of(tokens=200))
    least = 0.25 if key == "fireq" else 0.42  # which has 4 bits or 8, and nothing between
    # Two leave values, or keys, alone; one merges two layers of three.
    assert least <= plan.share <= {"think": 0.6, "kcache": 0.6, "minicache": 0.75}.get(key, 0.5)


@pytest.mark.parametrize("key", FIXED)
def test_a_larger_budget_only_adds(key: str) -> None:
    plans = [within(key, budget, trace_of()) for budget in BUDGETS]
    for smaller, larger in pairwise(plans):
        assert all(few <= many for few, many in zip(kept_sets(smaller), kept_sets(larger), strict=True))


# Their scores are places or come of whole steps.
TYING = ("h2o", "lagkv", "look-m", "lazyeviction")


@pytest.mark.parametrize("key", [key for key in KEYS if key not in TYING])
def test_scores_of_a_bfloat16_model_do_not_tie(key: str) -> None:
    # Trap 20: three quarters of a head's scores tie in bfloat16.
    # The maximum over neighbours is theirs too.
    unpooled = {"kernel": 1} if "kernel" in find(key).model_fields else {}
    plan = plan_of(key, None, trace_of(dtype=torch.bfloat16), **unpooled)
    if plan.stages.score is not None:
        scores = plan.stages.score.scores(study_of(plan.trace, model_of(plan.trace)))[1, 0]
        finite = scores[scores.isfinite()]
        assert len(finite.unique()) > 0.9 * finite.numel()


def test_where_every_layer_slides_a_refusal_says_so() -> None:
    with pytest.raises(BudgetTooSmall, match="no layer"):
        plan_of("snapkv", 0.5, trace_of("mistral"))


def test_a_number_of_tokens_is_met_to_the_token() -> None:
    # Trap 19: 48 kept of 64 asked.
    for key in SELECTING:
        plan = plan_of(key, "24 tokens", trace_of())
        assert int((plan.tiers == 1).sum()) == 24 * 3 * 2, key


# -- scores against plain loops


def test_snapkv_scores_are_pooled_votes_of_the_window() -> None:
    layer, window = trace_of().layers[1], 8
    rows, got = softmax_rows(layer), described("snapkv", kernel=3, pooling="avg").score(layer)
    for head in range(layer.kv_heads):
        votes = rows[2 * head : 2 * head + 2, -window:, :-window].mean(dim=(0, 1)).tolist()
        padded = [0.0, *votes, 0.0]
        pooled = [sum(padded[i : i + 3]) / 3 for i in range(len(votes))]
        assert torch.allclose(got[head, :-window], torch.tensor(pooled), atol=1e-6)
        highest = [max(padded[i : i + 3]) for i in range(len(votes))]
        most = described("snapkv", kernel=3, pooling="max").score(layer)
        assert torch.allclose(most[head, :-window], torch.tensor(highest), atol=1e-6)
    assert bool(got[:, -window:].isinf().all())


def test_h2o_sums_what_every_query_gave() -> None:
    layer = trace_of().layers[1]
    rows = softmax_rows(layer)
    expected = torch.stack([sum(rows[2 * head + g, q] for g in range(2) for q in range(TOKENS)) for head in range(2)])
    assert torch.allclose(H2O().eviction_state(layer), expected.float(), atol=1e-4)


def test_h2o_keeps_the_recent_and_the_heavy() -> None:
    trace = trace_of()
    plan, each = plan_of("h2o", "20 tokens", trace), 20
    for layer in trace.layers:
        received = H2O().eviction_state(layer)
        for head in range(2):
            kept = set(plan.kept(layer.index, head).tolist())
            assert set(range(TOKENS - each // 2, TOKENS)) <= kept
            assert set(received[head].topk(each // 2).indices.tolist()) <= kept


def test_tova_scores_by_the_last_query_over_all_heads() -> None:
    layer = trace_of().layers[1]
    expected = softmax_rows(layer)[:, -1].mean(dim=0).float()
    got = TOVA().score(layer)
    assert torch.allclose(got[:, :-1], expected[:-1].expand(2, -1), atol=1e-6) and bool(got[:, -1].isinf().all())


def test_knorm_and_keydiff_read_keys_only() -> None:
    layer = trace_of().layers[1]
    for head in range(2):
        keys = layer.keys[head]
        lengths = torch.stack([key.square().sum().sqrt() for key in keys])
        assert torch.allclose(Knorm().score(layer)[head], -lengths)
        anchor = (keys / lengths[:, None]).mean(dim=0)
        cosine = torch.stack([key @ anchor / key.norm() / anchor.norm() for key in keys])
        assert torch.allclose(KeyDiff().score(layer)[head], -cosine, atol=1e-5)


def test_streaming_llm_keeps_sinks_then_the_most_recent() -> None:
    plan = plan_of("streaming-llm", "10 tokens", trace_of())
    assert plan.kept(2, 1).tolist() == [0, 1, 2, 3, *range(TOKENS - 6, TOKENS)]
    assert plan_of("streaming-llm", "2 tokens", trace_of()).kept(0, 0).tolist() == [0, 1]


def test_lagkv_keeps_the_same_share_of_every_stretch() -> None:
    trace, lag, sinks = trace_of(tokens=84), 16, 4  # sinks and five stretches, of which four have a next one
    plan = plan_of("lagkv", f"{sinks + lag + 4 * 5} tokens", trace, sinks=sinks)
    for layer in trace.layers:
        for head in range(2):
            kept = plan.kept(layer.index, head).tolist()
            assert kept[:4] == [0, 1, 2, 3] and kept[-lag:] == list(range(84 - lag, 84))
            for start in range(sinks, 84 - lag, lag):
                told = torch.zeros(lag)
                for x in (layer.keys[head], layer.values[head]):
                    after = x[start + lag : start + 2 * lag]
                    scaled = (x[start : start + lag] - after.amin(0)) / (after.amax(0) - after.amin(0))
                    told += scaled.std(dim=-1).softmax(dim=-1)
                assert [p - start for p in kept if start <= p < start + lag] == sorted(told.topk(5).indices.tolist())


def test_lagkv_without_a_stretch_to_compare_keeps_sinks_and_the_most_recent() -> None:
    plan = plan_of("lagkv", "10 tokens", trace_of(tokens=30), lag=16, sinks=4)
    assert plan.kept(0, 0).tolist() == [0, 1, 2, 3, *range(24, 30)]


def scaled_part(positions: Tensor) -> tuple[Tensor, Tensor]:
    """A table that rotates 8 of 16 channels and scales them, as LongRoPE and YaRN do."""
    angles = positions[:, None] * 50.0 ** -(torch.arange(4) / 4).repeat(2)
    return 1.3 * angles.cos(), 1.3 * angles.sin()


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3", "partly rotated and scaled"])
def test_expected_attention_is_the_mean_of_a_gaussian_of_queries_to_come(architecture: str) -> None:
    # Trap 11: queries of later positions rotated as if they stood where they were read.
    part = architecture not in TINY_ARCHITECTURES
    layer, sinks, ahead = trace_of("llama" if part else architecture).layers[1], 4, 32
    if part:
        layer = replace(layer, rotary=lambda read: Rotation(scaled_part))
    cos, sin = layer.rotation(torch.arange(TOKENS + ahead))
    width = cos.shape[-1]

    def turned(x: Tensor, at: int) -> Tensor:  # one vector [d] as the model itself rotates it at a position
        half = x[:width].roll(width // 2)
        half[: width // 2] *= -1
        return torch.cat([x[:width] * cos[at] + half * sin[at], x[width:]])

    matrices = [
        torch.stack([turned(unit, at) for unit in torch.eye(layer.keys.shape[-1])], dim=1)
        for at in range(TOKENS + ahead)
    ]
    mean_rotation = torch.stack(matrices[TOKENS:]).mean(dim=0)
    got = ExpectedAttention(n_future_positions=ahead, sinks=sinks, epsilon=0.03).score(layer)
    groups = layer.heads // layer.kv_heads
    for head in range(layer.kv_heads):
        total = torch.zeros(TOKENS - sinks)
        for query_head in range(head * groups, (head + 1) * groups):
            plain = torch.stack(
                [torch.linalg.solve(matrices[at], layer.queries[query_head, at]) for at in range(sinks, TOKENS)]
            )
            mean = mean_rotation @ plain.mean(dim=0)
            spread = mean_rotation @ torch.cov(plain.T, correction=0) @ mean_rotation.T
            keys = layer.keys[head, sinks:]
            logits = torch.stack([k @ mean * layer.scale + k @ spread @ k * layer.scale**2 / 2 for k in keys])
            total += logits.softmax(dim=0) / groups
        weighted = (total + 0.03) * layer.values[head, sinks:].norm(dim=-1)
        assert torch.allclose(got[head, sinks:], weighted, rtol=1e-3, atol=1e-6)
    assert bool(got[:, :sinks].isinf().all())


# -- allocation


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0])
def test_the_pyramid_falls_linearly_and_costs_what_equal_layers_cost(share: float) -> None:
    layers, heads, tokens, window, beta = 9, 2, 400, 20, 20
    ranking = random_ranking(layers, heads, tokens)
    entries = int(share * layers * heads * tokens)
    counts = PyramidKV(window=window, beta=beta).allocate(ranking, entries)
    assert int(counts.max()) <= tokens and int(counts.min()) >= 1
    assert entries - heads * layers < int(counts.sum()) <= entries
    beyond = counts[:, 0].double() - window
    average = entries / layers / heads - window
    if average <= 0:
        assert len(counts.unique()) == 1
        return
    # Last layer average / beta, first 2 * average - that, but never more than there are.
    first = min(2 * average - average / beta, tokens - window)
    expected = torch.linspace(first, 2 * average - first, layers, dtype=torch.float64)
    assert float((beyond - expected).abs().max()) <= 1


def test_adakv_mixes_the_best_of_the_layer_with_an_equal_split_beyond_the_window() -> None:
    layers, heads, tokens, window, share = 3, 4, 50, 4, 0.2
    ranking = random_ranking(layers, heads, tokens, window=window)
    for each in (5, 6, 13, 21, 40, 49, 50):
        counts = AdaKV(safeguard=share).allocate(ranking, each * layers * heads)
        assert counts.sum(dim=1).tolist() == [each * heads] * layers and int(counts.max()) <= tokens
        base = each - window
        for layer in range(layers):
            older = [(float(s), head) for head in range(heads) for s in ranking.scores[layer, head, : tokens - window]]
            best = [head for _, head in sorted(older, reverse=True)[: base * heads]]
            for head in range(heads):  # as the authors' code rounds, to one entry: it leaves a few unused
                published = round((1 - share) * best.count(head) + int(share * base))
                assert abs(int(counts[layer, head]) - window - published) <= 1


def test_adakv_with_little_more_than_the_window_gives_every_head_something() -> None:
    ranking = random_ranking(3, 4, 50, window=6)
    for each in range(1, 8):
        counts = AdaKV().allocate(ranking, each * 3 * 4)
        assert counts.sum(dim=1).tolist() == [4 * each] * 3 and int(counts.min()) >= 1


def test_adakv_of_kvpress_takes_the_best_of_the_layer_beyond_what_every_head_is_certain_of() -> None:
    layers, heads, tokens = 3, 4, 50
    ranking = random_ranking(layers, heads, tokens, window=4)
    for each in (1, 3, 5, 13, 40, 50):
        counts = AdaKV(safeguard=0.3, floor="least").allocate(ranking, each * layers * heads)
        certain = max(int(0.3 * each), 1)
        assert counts.sum(dim=1).tolist() == [each * heads] * layers and int(counts.min()) >= certain
        for layer in range(layers):
            best = [ranking.scores[layer, head].sort(descending=True).values for head in range(heads)]
            pool = sorted(((float(s), head) for head in range(heads) for s in best[head][certain:]), reverse=True)
            last = pool[each * heads - heads * certain - 1][0] if each > 1 else float("inf")
            for head in range(heads):
                surely = sum(float(s) > last for s in best[head][certain:])
                ties = sum(float(s) == last for s in best[head][certain:])
                assert certain + surely <= counts[layer, head] <= certain + surely + ties


def test_adakv_gives_no_less_than_what_is_certain_where_heads_differ_in_it() -> None:
    scores = random_ranking(2, 3, 40).scores.clone()
    scores[0, 0, 20:] = torch.inf  # one head must keep more than an equal split
    ranking = Ranking(scores)
    for each in (2, 7, 12, 19, 30, 40):
        counts = AdaKV().allocate(ranking, each * 6)
        assert counts.sum(dim=1).tolist() == [3 * each] * 2 and 1 <= int(counts.min()) <= int(counts.max()) <= 40
        if each >= 12:
            assert int(counts[0, 0]) >= 20


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_expected_attention_shares_a_layer_out_as_adakv_of_kvpress_does(share: float) -> None:
    ranking = random_ranking(3, 4, 50, window=2)
    for entries in (12, 100, 333, 600):
        got = ExpectedAttention(safeguard=share).allocate(ranking, entries)
        assert torch.equal(got, AdaKV(safeguard=share, floor="least").allocate(ranking, entries))
        equal = ExpectedAttention(heads="equal").allocate(ranking, entries)
        assert bool((equal == entries // 12).all())


def test_adakv_with_certainty_for_all_is_an_equal_split() -> None:
    counts = AdaKV(safeguard=1.0).allocate(random_ranking(3, 4, 50), 3 * 4 * 20)
    assert bool((counts == 20).all())


def test_heads_that_tie_are_served_in_turns() -> None:
    # A window that must stay scores the same in every head: no head may be served before the others.
    counts = AdaKV(safeguard=0.0).allocate(Ranking(torch.full((1, 4, 20), torch.inf)), 4 * 6)
    assert counts.tolist() == [[6, 6, 6, 6]]


@pytest.mark.parametrize("scorer", ["knorm", "streaming-llm", "tova", "h2o", "keydiff"])
def test_adakv_divides_the_room_for_any_scorer(scorer: str) -> None:
    trace = trace_of()
    alone = {"decode": False} if scorer == "tova" else {}  # heads of unequal length cannot evict together
    methods = [described(scorer, budget=0.5, **alone), AdaKV()]
    plan = make_plan(trace, methods, torch.bfloat16)
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= 0.5 * plan.full_nbytes
    assert plan.stages.score is methods[0] and plan.stages.allocate is methods[1]
    ours = rank(Study(trace), methods[0])
    assert torch.equal(plan.tiers == 1, ours.selected(plan.counts))


# -- decoding


def decoded(key: str, budget: str, steps: int) -> tuple[Trace, Plan, Decoder, list[list[tuple[Tensor, Tensor]]]]:
    """A run of `steps` tokens, and what each layer's attention was given at each: query [h, 1, d] and key [k, 1, d]."""
    trace, model = trace_of(), tiny("llama")
    plan = plan_of(key, budget, trace, torch.float32)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in trace.layers]

    class Watched(Decoder):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            seen[layer].append((query.clone(), key.clone()))
            return super().attend(layer, query, key, value, scoring)

    decoder = Watched(model, plan.stores(), TOKENS, plan.stages.evict)
    for step in range(steps):
        decoder.feed(torch.tensor([(7 * step + 3) % 256]))
    return trace, plan, decoder, seen


def simulated(
    key: str, plan: Plan, layer: LayerTrace, seen: list[tuple[Tensor, Tensor]], room: int
) -> list[dict[int, float]]:
    """Which positions each head holds in the end, and what it remembers of each, by dictionaries and loops."""
    heads = range(layer.kv_heads)
    held = [{p: layer.keys[h, p] for p in plan.kept(layer.index, h).tolist()} for h in heads]
    rows = softmax_rows(layer)
    if key == "h2o":
        mass = [{p: float(rows[2 * h : 2 * h + 2, :, p].sum()) for p in held[h]} for h in heads]
    else:
        mass = [{p: float(rows[:, -1, p].mean()) for p in held[h]} for h in heads]
    for step, (query, new) in enumerate(seen):
        given = []
        for h in heads:
            if key == "streaming-llm":
                out = min(p for p in held[h] if p >= 4)
            elif key == "tova":
                out = min(mass[h], key=lambda p: mass[h][p])
            else:
                recent = sorted(held[h])[len(held[h]) - room // 2 :]
                out = min((p for p in held[h] if p not in recent), key=lambda p: mass[h][p])
            del held[h][out], mass[h][out]
            held[h][TOKENS + step] = new[h, 0]
            mass[h][TOKENS + step] = 0.0
            positions = list(held[h])
            keys = torch.stack([held[h][p] for p in positions])
            probs = [(query[q, 0] @ keys.T * layer.scale).softmax(dim=0) for q in (2 * h, 2 * h + 1)]
            given.append({p: [float(row[i]) for row in probs] for i, p in enumerate(positions)})
        for h in heads:
            for p in held[h]:
                if key == "h2o":
                    mass[h][p] += sum(given[h][p])
                elif key == "tova":
                    mass[h][p] = sum(sum(g[p]) for g in given) / layer.heads
    return mass


@pytest.mark.parametrize("key", ["h2o", "tova", "streaming-llm"])
def test_eviction_while_decoding_follows_the_plain_rule(key: str) -> None:
    # Trap 7: after unsorted eviction, position-based policies later drop the sinks.
    room = 20
    trace, plan, decoder, seen = decoded(key, f"{room} tokens", steps=24)
    for layer in trace.layers:
        store, expected = decoder.stores[layer.index], simulated(key, plan, layer, seen[layer.index], room)
        assert store.evictable is not None
        assert [row.tolist() for row in store.positions] == [sorted(row) for row in expected]
        if key == "streaming-llm":  # remembers nothing
            continue
        assert isinstance(store, DenseStore) and store.state is not None
        for head, (slots, mass) in enumerate(zip(store.slot_positions, store.state.view()[..., 0], strict=True)):
            remembered = torch.tensor([expected[head][int(p)] for p in slots])
            assert torch.allclose(mass, remembered, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("key", ["h2o", "tova", "streaming-llm"])
def test_a_cache_that_evicts_while_decoding_never_outgrows_its_plan(key: str) -> None:
    _, plan, decoder, _ = decoded(key, "20 tokens", steps=12)
    assert sum(store.nbytes for store in decoder.stores) == plan.nbytes
    grown = plan_of(key, "20 tokens", trace_of(), decode=False)
    assert not grown.evicts and all(store.evictable is None for store in grown.stores())


# -- KIVI and MiKV


def test_kivi_takes_the_most_bits_that_fit() -> None:
    trace = trace_of(tokens=400)
    forms = [make_plan(trace, [KIVI(budget=budget)], torch.bfloat16).format for budget in (1.0, 0.9, 0.6, 0.28)]
    assert isinstance(forms[0], DenseFormat)
    assert [form.bits for form in forms[1:] if isinstance(form, PackedFormat)] == [8, 4, 2]
    free = make_plan(trace, [KIVI()], torch.bfloat16).format
    assert free == PackedFormat(torch.bfloat16, 2, 32, 128)  # the published defaults


def test_kivi_lowers_the_residual_before_it_gives_up() -> None:
    trace = trace_of(tokens=400)
    residuals = []
    for budget in (0.4, 0.33, 0.28):
        form = make_plan(trace, [KIVI(bits=2, budget=budget)], torch.bfloat16).format
        assert isinstance(form, PackedFormat) and form.residual % 32 == 0
        residuals.append(form.residual)
    assert residuals[0] == 128 and residuals == sorted(residuals, reverse=True) and residuals[-1] < 128
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(trace, [KIVI(bits=2, budget=0.05)], torch.bfloat16)
    least = make_plan(trace, [KIVI(bits=2, budget=refusal.value.smallest)], torch.bfloat16).format
    assert isinstance(least, PackedFormat) and least.residual == 0


def test_kivi_refuses_a_residual_that_its_groups_do_not_divide() -> None:
    with pytest.raises(BadParameter, match="residual=96"):
        KIVI(residual=100)


def test_kivi_keeps_every_token_and_so_refuses_a_number_of_tokens() -> None:
    with pytest.raises(BadBudget, match="keeps every token"):
        make_plan(trace_of(), [KIVI(budget="20 tokens")], torch.bfloat16)


@pytest.mark.parametrize("width", [16, 18, 20, 33])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_head_sizes_that_groups_do_not_divide_are_stored_and_counted(width: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 75, width, generator=generator), torch.randn(2, 75, width + 1, generator=generator)
    layer = LayerTrace(0, keys, values, keys.repeat(2, 1, 1), torch.device("cpu"), Scoring(width**-0.5))
    shape = Shape(2, 75, width, width + 1, 2)
    form = PackedFormat(torch.bfloat16, bits, 16, 32)
    for counts in ([75, 75], [75, 40], [3, 60], [0, 75]):
        keep = torch.arange(75) < torch.tensor(counts)[:, None]
        store = form.build(layer, keep.to(torch.uint8), None)
        assert store.nbytes == form.nbytes(shape, torch.tensor([counts]))
        assert [row.numel() for row in store.positions] == counts


def test_more_bits_are_closer_and_quantising_beats_dropping() -> None:
    trace = trace_of(tokens=200)
    errors = [float(make_plan(trace, [KIVI(bits=b, residual=32)], torch.float32).error.mean()) for b in (8, 4, 2)]
    assert errors == sorted(errors) and errors[0] < 0.02
    four = make_plan(trace, [KIVI(bits=4, budget=0.5)], torch.bfloat16)
    assert float(four.error.mean()) < float(plan_of("streaming-llm", 0.5, trace).error.mean())


def test_mikv_keeps_every_token_and_shares_its_budget_between_precisions() -> None:
    trace = trace_of(tokens=200)
    shares = []
    for budget in (0.45, 0.6, 0.8):
        plan = make_plan(trace, [MiKV(budget=budget)], torch.bfloat16)
        assert bool((plan.counts == 200).all()) and plan.precisions == ("bfloat16", "2-bit")
        assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= budget * plan.full_nbytes
        shares.append(float((plan.tiers == 1).float().mean()))
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] < 1


def test_the_balancer_is_the_root_of_the_largest_query_over_the_largest_key() -> None:
    layer = trace_of().layers[1]
    factors = balancer(layer)
    assert factors.dtype == torch.float16 and factors.shape == (2, 16)
    for head in range(2):
        for channel in range(16):
            query = max(float(layer.queries[q, :, channel].abs().max()) for q in (2 * head, 2 * head + 1))
            expected = (query / float(layer.keys[head, :, channel].abs().max())) ** 0.5
            assert float(factors[head, channel]) == pytest.approx(expected, rel=2e-3)


def test_balancing_protects_attention_from_outlier_channels() -> None:
    base = trace_of(tokens=120).layers[1]
    keys, queries = base.keys.clone(), base.queries.clone()
    keys[:, :, 3] *= 40
    queries[:, :, 3] /= 40  # the same products
    layer = LayerTrace(0, keys, base.values, queries, base.device, base.scoring)
    trace = Trace(Prompt(torch.zeros(120, dtype=torch.long), chat=False), (layer,), torch.zeros(1), 0.0)
    balanced, plain = (
        float(make_plan(trace, [MiKV(low_bits=4, budget=0.6, balance=balance)], torch.float32).error.mean())
        for balance in (True, False)
    )
    assert balanced < 0.5 * plain


def test_selection_allocation_and_precision_combine() -> None:
    trace = trace_of(tokens=200)
    methods = [SnapKV(budget=0.25), AdaKV(), MiKV(low_bits=2)]
    plan = make_plan(trace, methods, torch.bfloat16)
    assert [stage.key for stage in (plan.stages.score, plan.stages.allocate, plan.stages.store) if stage] == [
        "snapkv",
        "adakv",
        "mikv",
    ]
    assert bool((plan.counts == 200).all()) and len((plan.tiers == 1).sum(dim=-1).unique()) > 1
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes
    together = make_plan(trace, methods, torch.bfloat16, Budget.parse(0.5))
    assert sum(store.nbytes for store in together.stores()) == together.nbytes <= 0.5 * together.full_nbytes
    few = make_plan(trace, [SnapKV(budget=0.5), KIVI(bits=4, residual=32)], torch.bfloat16)
    assert few.nbytes < 0.3 * few.full_nbytes and sum(store.nbytes for store in few.stores()) == few.nbytes


def test_methods_that_contradict_each_other_are_refused() -> None:
    trace = trace_of()
    refused = (
        [SnapKV(), Knorm()],
        [PyramidKV(), AdaKV()],
        [KIVI(), MiKV()],
        [H2O(), KIVI()],
        [TOVA(), MiKV()],
        [TOVA(), AdaKV()],
    )
    for methods in refused:
        with pytest.raises(BadRecipe):
            make_plan(trace, methods, torch.bfloat16)
    make_plan(trace, [StreamingLLM(decode=False), KIVI(group=8, residual=16)], torch.bfloat16)
    assert LagKV().label() == "lagkv 0.5"


def test_a_store_on_top_lowers_its_precision_to_meet_its_own_budget() -> None:
    trace = trace_of()
    store = KIVI(budget=0.22, group=8, residual=16)
    plan = make_plan(trace, [SnapKV(budget=0.5), store], torch.bfloat16)
    assert plan.precisions == ("2-bit",)
    assert sum(s.nbytes for s in plan.stores()) == plan.nbytes <= 0.22 * plan.full_nbytes
    alone = make_plan(trace, [SnapKV(budget=0.5)], torch.bfloat16)
    assert torch.equal(plan.tiers, alone.tiers)  # what is selected stays the scorer's business
