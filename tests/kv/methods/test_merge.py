"""Methods that merge what they evict: EMS and LOOK-M, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kv.support import softmax_rows, trace_of
from workbench.core.nearest import nearest_kept
from workbench.errors import BadParameter
from workbench.kv import EMS, AdaKV, LookM, SnapKV
from workbench.kv.base import Study
from workbench.kv.plan import rank
from workbench.kv.stores import DenseStore
from workbench.registry import from_dict, method
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace

TOKENS = 48


def some_kept(layer: LayerTrace, count: int = 12) -> Tensor:
    """Twelve positions of each head, others in each."""
    order = torch.rand(layer.kv_heads, layer.tokens, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return torch.zeros(layer.kv_heads, layer.tokens, dtype=torch.bool).scatter_(1, order[:, :count], True)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def home_of(layer: LayerTrace, head: int, position: int, kept: list[int]) -> tuple[int, float]:
    """The kept position whose key is most similar, and how similar."""
    keys = layer.keys[head].double()
    found = {other: cosine(keys[position], keys[other]) for other in kept}
    best = max(found, key=lambda other: found[other])
    return best, found[best]


@pytest.mark.parametrize("block", [1, 7, 512])
def test_the_nearest_kept_key_is_found_in_blocks_of_any_size(block: int) -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    kept = some_kept(layer)
    similarity, home = nearest_kept(layer.keys, kept, block)
    for head in range(layer.kv_heads):
        stays = kept[head].nonzero()[:, 0].tolist()
        for position in range(TOKENS):
            where, how = home_of(layer, head, position, stays)
            assert int(home[head, position]) == where
            assert float(similarity[head, position]) == pytest.approx(how, abs=1e-5)


# -- EMS


@pytest.mark.parametrize("window", [1, 8, TOKENS])
def test_ems_scores_add_global_and_local_attention_of_equal_mean(window: int) -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    rows, got = softmax_rows(layer), EMS(window=window).score(layer)
    for head in range(layer.kv_heads):
        group = rows[2 * head : 2 * head + 2]
        older = range(TOKENS - window)
        everywhere = [float(group[:, :, p].sum()) for p in older]
        lately = [float(group[:, -window:, p].sum()) for p in older]
        for p in older:
            expected = everywhere[p] / (sum(everywhere) / len(older)) + lately[p] / (sum(lately) / len(older))
            assert float(got[head, p]) == pytest.approx(expected, rel=1e-3)
    assert bool(got[:, TOKENS - window :].isinf().all()) and bool(got[:, : TOKENS - window].isfinite().all())


def ems_by_loops(
    layer: LayerTrace, kept: Tensor, scores: Tensor, reach: float, threshold: float
) -> tuple[Tensor, Tensor]:
    keys, values = layer.keys.double().clone(), layer.values.double().clone()
    for head in range(layer.kv_heads):
        stays = kept[head].nonzero()[:, 0].tolist()
        dropped = sorted(set(range(layer.tokens)) - set(stays), key=lambda p: -float(scores[head, p]))
        members: dict[int, list[int]] = {centre: [] for centre in stays}
        for position in dropped[: int(reach * len(stays))]:
            centre, similarity = home_of(layer, head, position, stays)
            if similarity >= threshold:
                members[centre].append(position)
        for centre, joined in members.items():
            if not joined or scores[head, centre].isinf():
                continue
            together = [centre, *joined]
            weights = scores[head, together].double()
            for merged, x in ((keys, layer.keys), (values, layer.values)):
                merged[head, centre] = (weights[:, None] * x[head, together].double()).sum(0) / weights.sum()
    return keys, values


@pytest.mark.parametrize(("reach", "threshold"), [(1.0, 0.3), (0.5, 0.0), (16.0, -1.0), (2.0, 0.6)])
def test_ems_merges_into_the_most_similar_centre_by_score(reach: float, threshold: float) -> None:
    for layer in trace_of(tokens=TOKENS).layers:
        kept = some_kept(layer)
        scores = torch.rand(kept.shape, generator=torch.Generator().manual_seed(2)) + 0.1
        scores[:, -4:] = torch.inf
        kept[:, -4:] = True
        got = EMS(reach=reach, threshold=threshold).merge(layer, kept, scores)
        want = ems_by_loops(layer, kept, scores, reach, threshold)
        for ours, theirs, before in zip(got, want, (layer.keys, layer.values), strict=True):
            assert torch.allclose(ours[kept].double(), theirs[kept], atol=1e-5)
            assert not torch.allclose(ours[kept], before[kept]), "nothing was merged: the test shows nothing"


def test_the_zero_class_and_no_reach_evict_without_a_trace() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    kept, scores = some_kept(layer), torch.rand(2, TOKENS)
    for evicting in (EMS(reach=0.0, threshold=-1.0), EMS(reach=16.0, threshold=1.0)):
        keys, values = evicting.merge(layer, kept, scores)
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)


def test_ems_merges_by_scores_of_other_methods_even_negative_ones() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    kept = some_kept(layer)
    scores = -10 * torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(3))
    scores[0, 3] = -torch.inf
    keys, _ = EMS(threshold=-1.0, reach=16.0).merge(layer, kept, scores)
    assert bool(keys.isfinite().all())
    lowest = float(scores[1].amin())
    want, _ = ems_by_loops(layer, kept, scores - lowest, 16.0, -1.0)
    assert torch.allclose(keys[1][kept[1]].double(), want[1][kept[1]], atol=1e-5)


def test_a_redundant_copy_of_a_token_merges_and_leaves_no_error() -> None:
    # What merging is for: an entry that is there twice may go, and nothing is lost of what the two say together.
    base = trace_of(tokens=TOKENS).layers[1]
    keys, values = base.keys.clone(), base.values.clone()
    keys[:, 20] = keys[:, 10]
    layer = LayerTrace(1, keys, values, base.queries, base.device, base.scoring)
    kept = torch.ones(2, TOKENS, dtype=torch.bool)
    kept[:, 20] = False
    scores = torch.ones(2, TOKENS)
    merged_keys, merged_values = EMS().merge(layer, kept, scores)
    assert torch.allclose(merged_keys[:, 10], keys[:, 10], atol=1e-6)
    assert torch.allclose(merged_values[:, 10], (values[:, 10] + values[:, 20]) / 2, atol=1e-6)


def test_centres_may_keep_their_own_keys() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    kept, scores = some_kept(layer), torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(2))
    both = EMS(threshold=0.3).merge(layer, kept, scores)
    keys, values = EMS(threshold=0.3, merge_keys=False).merge(layer, kept, scores)
    assert torch.equal(keys, layer.keys) and torch.equal(values, both[1]) and not torch.equal(keys, both[0])


# -- LOOK-M


@pytest.mark.parametrize("strategy", ["averaged", "pivotal", "weighted"])
def test_look_m_merges_every_evicted_entry_into_its_nearest(strategy: Any) -> None:
    for layer in trace_of(tokens=TOKENS).layers:
        kept = some_kept(layer)
        got = LookM(strategy=strategy).merge(layer, kept, torch.zeros(kept.shape))
        for head in range(layer.kv_heads):
            stays = kept[head].nonzero()[:, 0].tolist()
            homes = {p: home_of(layer, head, p, stays) for p in range(TOKENS) if not kept[head, p]}
            for ours, x in zip(got, (layer.keys, layer.values), strict=True):
                for centre in stays:
                    own = x[head, centre].double()
                    brought = [own]
                    for position, (where, similarity) in homes.items():
                        if where == centre:
                            other = x[head, position].double()
                            brought.append(
                                {"averaged": other, "pivotal": (own + other) / 2, "weighted": similarity * other}[
                                    strategy
                                ]
                            )
                    assert torch.allclose(ours[head, centre].double(), torch.stack(brought).mean(0), atol=1e-5)


def test_no_image_token_stays_where_text_leaves() -> None:
    trace, spans = trace_of(tokens=TOKENS), ((4, 20), (30, 40))
    image = {p for first, end in spans for p in range(first, end)}
    for budget in ("8 tokens", "20 tokens", "30 tokens"):
        asked = LookM(budget=budget, image_spans=spans, recent_share=0.0)
        plan = make_plan(trace, [asked], torch.bfloat16)
        for layer in trace.layers:
            received = layer.received()
            for head in range(layer.kv_heads):
                kept = set(plan.kept(layer.index, head).tolist())
                count = len(kept)
                by_attention = sorted(range(TOKENS - 1), key=lambda p: (p in image, -float(received[head, p])))
                assert kept == {TOKENS - 1, *by_attention[: count - 1]}  # the newest token stays, as in H2O


def test_half_of_what_look_m_keeps_is_recent() -> None:
    plan = make_plan(trace_of(tokens=TOKENS), [LookM(budget="16 tokens", image_spans=((30, TOKENS),))], torch.bfloat16)
    for layer in range(3):
        for head in range(2):
            assert set(range(TOKENS - 8, TOKENS)) <= set(plan.kept(layer, head).tolist())


def test_image_spans_are_values_that_survive_json_and_text() -> None:
    spans = ((3, 9), (12, 30))
    described = LookM(image_spans=spans)
    assert from_dict(described.to_dict()) == described and hash(described) == hash(LookM(image_spans=spans))
    assert method("look-m", image_spans="3-9, 12-30") == described == method("look-m", image_spans=[[3, 9], [12, 30]])
    assert method("look-m", image_spans=()) == method("look-m", image_spans="") == LookM()
    for wrong in ("3", "a-b", "9-3", ((5, 5),), ((-1, 4),)):
        with pytest.raises(BadParameter, match="image_spans"):
            method("look-m", image_spans=wrong)


def test_spans_beyond_the_prompt_are_refused() -> None:
    with pytest.raises(BadParameter, match=f"40-{TOKENS + 1} reaches beyond the prompt, which has {TOKENS}"):
        make_plan(trace_of(tokens=TOKENS), [LookM(image_spans=((40, TOKENS + 1),))], torch.bfloat16)


# -- in plans


@pytest.mark.parametrize("merging", ["ems", "look-m"])
def test_the_store_holds_merged_entries_in_the_bytes_of_plain_ones(merging: str) -> None:
    trace = trace_of(tokens=TOKENS)
    parameters = {"window": 4, "threshold": 0.0} if merging == "ems" else {}
    plan = make_plan(trace, [method(merging, budget=0.3, **parameters)], torch.float32)  # type: ignore[list-item]
    plain = make_plan(trace, [SnapKV(window=4, budget=0.3)], torch.float32)
    assert plan.nbytes == plain.nbytes == sum(store.nbytes for store in plan.stores())
    supplier = plan.stages.merge
    assert supplier is not None and plan.stages.score is supplier
    for layer in trace.layers:
        store, kept = plan.store(layer), plan.tiers[layer.index] > 0
        keys, values = supplier.merge(layer, kept, rank(Study(trace), supplier).scores[layer.index])
        assert isinstance(store, DenseStore)
        assert torch.equal(store.contents(torch.float32).keys, keys[kept].view(2, -1, keys.shape[-1]))
        assert torch.equal(store.contents(torch.float32).values, values[kept].view(2, -1, values.shape[-1]))
        assert not torch.equal(keys[kept], layer.keys[kept])


@pytest.mark.parametrize("merging", ["ems", "look-m"])
def test_any_scorer_and_allocator_may_stand_before_a_merge(merging: str) -> None:
    trace = trace_of(tokens=TOKENS)
    for methods in (
        [SnapKV(window=4, budget=0.3), method(merging)],
        [SnapKV(window=4, budget=0.3), AdaKV(), method(merging)],
    ):
        plan = make_plan(trace, methods, torch.bfloat16)  # type: ignore[arg-type]
        assert plan.stages.score is methods[0] and plan.stages.merge is methods[-1]
        assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= 0.3 * plan.full_nbytes
        assert bool(plan.error.isfinite().all())
