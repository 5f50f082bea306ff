"""RetrievalAttention: a graph over keys that queries guide."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of
from workbench import testing
from workbench.kv import AdaKV, RetrievalAttention, SnapKV
from workbench.kv.stores.graph import Graph
from workbench.kv.stores.group_union import united
from workbench.kv.stores.offload import OffloadFormat, OffloadStore
from workbench.models import tiny
from workbench.models.fetch import cache_dir
from workbench.runtime.planning import make_plan
from workbench_kernels.cpu.library import library


def apart(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [1, count, 16] whose nearest by inner product lie far from each other, prompt queries and new ones.

    Queries live around 24 points; each point's keys agree with it in 8 channels, and in the other 8, where queries are
    zero, keys are far larger and have nothing to do with it.
    """
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(24, 8, generator=draw)
    mine = torch.randint(24, (count,), generator=draw)
    seen = points[mine] + 0.3 * torch.randn(count, 8, generator=draw)
    keys = torch.cat([seen, 6 * torch.randn(count, 8, generator=draw)], dim=1)

    def queries(each: int) -> Tensor:
        x = points.repeat(each, 1) + 0.3 * torch.randn(24 * each, 8, generator=draw)
        return torch.cat([x, torch.zeros_like(x)], dim=1)[None]

    return keys[None], queries(8), queries(2)


def recall(graph: Graph, query: Tensor, wanted: int, beam: int) -> tuple[float, float]:
    exact = (query @ graph.keys.transpose(1, 2)).topk(wanted, dim=2).indices
    found = graph.search(query, wanted, beam)
    hits = (exact[..., None] == found.keys[..., None, :]).any(-1).float().mean()
    return float(hits), float(found.visited.float().mean() / graph.keys.shape[1])


def test_queries_guide_to_what_keys_alone_do_not_find() -> None:
    # The paper's point: queries are out of the distribution of keys.
    keys, prompt, new = apart(1200)
    lengths = torch.tensor([1200])
    by_queries = Graph.guided_by(prompt, keys, lengths, neighbours=24, degree=16)
    by_keys = Graph.guided_by(keys, keys, lengths, neighbours=24, degree=16)
    hits, visited = recall(by_queries, new, 10, 20)
    others, others_visited = recall(by_keys, new, 10, 20)
    assert hits > 0.8 and visited < 0.25
    assert hits > others + 0.3 and visited < 1.1 * others_visited


@pytest.mark.parametrize(("wanted", "beam"), [(10, 20), (1, 1), (300, 40), (5, 200)])
def test_the_compiled_search_finds_what_the_one_in_torch_does(wanted: int, beam: int) -> None:
    keys, prompt, new = (torch.cat(pair) for pair in zip(apart(257, 1), apart(257, 2), strict=True))
    keys[1, 200:] = 0
    graph = Graph.guided_by(prompt, keys, torch.tensor([257, 200]), neighbours=12, degree=8)
    if library(str(cache_dir() / "compiled")) is None:
        pytest.skip("there is no compiler")
    found = graph.search(new, wanted, beam)
    most = min(max(beam, wanted), 257)
    same = graph.searched(new, wanted, most, min(max(most // 8, 4), 16, most))
    assert torch.equal(found.visited, same.visited)
    assert torch.allclose(found.scores, same.scores, rtol=1e-5, atol=1e-4)
    there = same.scores.isfinite()
    assert (found.keys == same.keys)[there].float().mean() > 0.999  # but for products that round alike


def test_the_graph_is_the_bipartite_one_projected_onto_keys() -> None:
    draw = torch.Generator().manual_seed(3)
    keys, guides = torch.randn(2, 30, 8, generator=draw), torch.randn(2, 12, 8, generator=draw)
    lengths, room = torch.tensor([30, 21]), 6
    graph = Graph.guided_by(guides, keys, lengths, neighbours=5, degree=room + 2)
    for head in range(2):
        votes: dict[tuple[int, int], int] = {}
        first = [0] * 30
        for guide in guides[head]:
            scores = [float(guide @ key) for key in keys[head, : lengths[head]]]
            near = sorted(range(len(scores)), key=lambda i: -scores[i])[:5]
            first[near[0]] += 1
            for one, other in [*((near[0], x) for x in near[1:]), *pairwise(near)]:
                for pair in ((one, other), (other, one)):
                    votes[pair] = votes.get(pair, 0) + 1
        for key in range(30):
            found = [int(x) for x in graph.links[head, key] if x >= 0]
            if key >= lengths[head]:
                assert not found
                continue
            suggested = {other: count for (one, other), count in votes.items() if one == key}
            beside = {key - 1, key + 1} & set(range(int(lengths[head])))
            assert set(found) - beside <= set(suggested)
            assert beside <= set(found)
            chosen = [int(x) for x in graph.links[head, key, :room] if x >= 0]
            assert (
                sorted((suggested[x] for x in chosen), reverse=True) == sorted(suggested.values(), reverse=True)[:room]
            )
        entries = graph.entries[head].tolist()
        assert all(0 <= x < lengths[head] for x in entries)
        assert sorted((first[x] for x in entries), reverse=True) == sorted(first[: lengths[head]], reverse=True)[:16]


@pytest.mark.parametrize("lengths", [[40, 40], [40, 9], [40, 1]])
def test_a_search_as_wide_as_the_keys_finds_all_there_are(lengths: list[int]) -> None:
    draw = torch.Generator().manual_seed(1)
    keys, query = torch.randn(2, 40, 8, generator=draw), torch.randn(2, 3, 8, generator=draw)
    graph = Graph.guided_by(torch.randn(2, 5, 8, generator=draw), keys, torch.tensor(lengths), 4, 6)
    found = graph.search(query, 40, 40)
    for head, length in enumerate(lengths):
        for one in range(3):
            want = (keys[head, :length] @ query[head, one]).sort(descending=True)
            assert found.keys[head, one, :length].tolist() == want.indices.tolist()
            assert bool((found.scores[head, one, length:] == -torch.inf).all())
            assert int(found.visited[head, one]) == length


def test_what_the_heads_of_a_group_found_is_united() -> None:
    slots = torch.tensor([[[3, 1], [5, 3], [1, 7], [0, 5]]])  # two query heads, two queries
    counts = torch.tensor([[[True, True], [True, False], [True, True], [True, True]]])
    got, valid = united(slots, counts, 2)
    assert got.shape == (1, 2, 4)
    assert [sorted(got[0, q][valid[0, q]].tolist()) for q in range(2)] == [[1, 3, 7], [0, 5]]


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
@pytest.mark.parametrize("recipe", [[], [SnapKV(window=8)], [SnapKV(window=8), AdaKV(window=8)]])
def test_fetching_everything_is_exact(architecture: str, recipe: list[wb.Method]) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:9], max_new_tokens=40)
    run = session.run([*recipe, RetrievalAttention(budget=0.7)], question=ids[:9], max_new_tokens=40)
    assert run.plan.host_nbytes > 0 and run.tokens == full.tokens and run.quality.kl < 1e-8


@pytest.mark.parametrize("guide", ["none", "queries"])
def test_each_query_head_fetches_the_keys_it_gives_most(guide: str) -> None:
    found = testing.fresh_reading()
    plan = make_plan(found.trace, [RetrievalAttention(budget=0.5, fetch=5, beam=60, guide=guide)], torch.float32)
    for layer in found.trace.layers:
        store = plan.store(layer)
        assert isinstance(store, OffloadStore)
        moved = torch.randn(layer.kv_heads, 3, layer.keys.shape[2], generator=torch.Generator().manual_seed(2))
        store.far.append(moved, moved, torch.tensor([70, 71, 72]).expand(layer.kv_heads, -1))
        store.retriever.add(moved, moved, torch.tensor([70, 71, 72]).expand(layer.kv_heads, -1))
        query = layer.queries[:, -2:]
        slots, counts = store.retriever.find(query, layer.scale)
        held = store.far.keys.view()
        for head in range(layer.kv_heads):
            for one in range(2):
                want: set[int] = set()
                for member in range(head * layer.groups, (head + 1) * layer.groups):
                    scores = [float(query[member, one] @ key) for key in held[head]]
                    want |= set(sorted(range(len(scores)), key=lambda i: -scores[i])[:5])
                assert set(slots[head, one][counts[head, one]].tolist()) == want


def test_the_graph_is_built_once_for_a_selection() -> None:
    found = testing.fresh_reading()
    plan = make_plan(found.trace, [RetrievalAttention(budget=0.5)], torch.bfloat16)
    assert isinstance(plan.format, OffloadFormat)
    first, second = (plan.store(found.trace.layers[0]) for _ in range(2))
    assert isinstance(first, OffloadStore) and isinstance(second, OffloadStore)
    shared = [{t.data_ptr() for t in store.retriever.host_tensors() if t.numel()} for store in (first, second)]
    assert shared[0] == shared[1]
    k = torch.randn(found.trace.layers[0].kv_heads, 2, found.trace.layers[0].keys.shape[2])
    before = second.host_nbytes
    first.far.append(k, k, torch.tensor([[70, 71]]).expand(len(k), -1))
    first.retriever.add(k, k, torch.tensor([[70, 71]]).expand(len(k), -1))
    assert second.host_nbytes == before < first.host_nbytes  # what one adds, the other does not see
