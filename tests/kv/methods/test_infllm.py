"""InfLLM: a window, blocks of distant context fetched from host memory, and nothing further away than the window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, reading
from workbench.errors import BudgetTooSmall, PromptTooLong
from workbench.kv import InfLLM
from workbench.kv.stores import DenseStore
from workbench.kv.stores.blocks import BlockStore
from workbench.models import tiny
from workbench.runtime.planning import make_plan
from workbench_kernels.rotary import rotate

if TYPE_CHECKING:
    from workbench.trace import LayerTrace

SIZES = {"room": 22, "sinks": 2, "window": 12, "block": 4, "representatives": 2, "blocks": 3}


def store_of(layer: LayerTrace) -> BlockStore:
    return BlockStore.empty(layer.keys[:, :0], layer.values[:, :0], layer.rotation, **SIZES)


def fed(layer: LayerTrace, store: BlockStore, pieces: list[tuple[int, int]]) -> Tensor:
    """What the layer's queries get when its tokens enter piece by piece, [h, n, dv]."""
    outs = []
    for start, end in pieces:
        at = torch.arange(start, end)
        store.append(layer.keys[:, start:end], layer.values[:, start:end], at)
        outs.append(store.attend(layer.queries[:, start:end], at, layer.scoring)[0])
    return torch.cat(outs, dim=1)


def by_hand(layer: LayerTrace, pieces: list[tuple[int, int]]) -> tuple[Tensor, list[list[int]]]:
    """The same in plain loops: outputs [h, n, dv], and the positions of the blocks in host memory."""
    everywhere = torch.arange(layer.tokens)
    keys = layer.rotation.turned_back(layer.keys, everywhere).double()  # before rotary embedding
    queries = layer.rotation.turned_back(layer.queries, everywhere).double()
    values, groups = layer.values.double(), layer.groups
    window, block = SIZES["window"], SIZES["block"]

    def score(head: int, p: int, j: int, distance: int) -> float:
        cos, sin = layer.rotation(torch.tensor([distance]))
        turned = rotate(queries[head, p : p + 1], cos.double(), sin.double())
        return float(turned[0] @ keys[head // groups, j])

    near: list[int] = []
    blocks: list[list[int]] = []
    chosen: list[list[list[int]]] = []  # of each block and KV head, the representatives
    mass = torch.zeros(layer.kv_heads, layer.tokens, dtype=torch.float64)
    out = torch.zeros(layer.heads, layer.tokens, values.shape[-1], dtype=torch.float64)
    for start, end in pieces:
        while len(near) + end - start > SIZES["room"] and len(near) - SIZES["sinks"] >= block:
            leaving, near = near[2 : 2 + block], near[:2] + near[2 + block :]
            blocks.append(leaving)
            ordered = [row[leaving].argsort(descending=True).tolist() for row in mass]
            chosen.append([[leaving[i] for i in order[:2]] for order in ordered])
        near += range(start, end)
        relevance = []
        for representatives in chosen:
            total = 0.0
            for p in range(start, end):
                for head in range(layer.heads):
                    total += sum(score(head, p, j, window) for j in representatives[head // groups])
            relevance.append(total)
        best = sorted(range(len(blocks)), key=lambda b: -relevance[b])[: SIZES["blocks"]]
        fetched = [j for b in best for j in blocks[b]]
        for p in range(start, end):
            seen = [j for j in near + fetched if j <= p]
            for head in range(layer.heads):
                scores = [score(head, p, j, min(p - j, window)) * layer.scale for j in seen]
                weights = [math.exp(s - max(scores)) for s in scores]
                for j, weight in zip(seen, [w / sum(weights) for w in weights], strict=True):
                    out[head, p] += weight * values[head // groups, j]
                    if j in near and p - j < window:
                        mass[head // groups, j] += weight
    return out, blocks


@pytest.mark.parametrize("pieces", [[(i, i + 4) for i in range(0, 52, 4)], [(0, 7), (7, 20), (20, 33)]])
def test_each_pass_attends_to_sinks_window_and_its_best_blocks_at_clipped_distances(
    pieces: list[tuple[int, int]],
) -> None:
    layer = reading().trace.layers[1]
    store = store_of(layer)
    want, blocks = by_hand(layer, pieces)
    got = fed(layer, store, pieces)
    end = pieces[-1][1]
    torch.testing.assert_close(got.double(), want[:, :end], atol=1e-5, rtol=1e-4)
    assert len(blocks) > SIZES["blocks"] or len(pieces) == 3  # there was something to choose from
    assert store.far.longest == 4 * len(blocks)
    assert store.far.positions.view()[0, :, 0].tolist() == [j for block in blocks for j in block]


def test_while_everything_fits_attention_is_the_models_own() -> None:
    layer = reading().trace.layers[0]
    wide = BlockStore.empty(
        layer.keys[:, :0], layer.values[:, :0], layer.rotation, **{**SIZES, "room": 70, "window": 70}
    )
    plain = DenseStore.where(
        layer.keys, layer.values, torch.ones(layer.keys.shape[:2], dtype=torch.bool), torch.float32
    )
    want, _ = plain.attend(layer.queries, torch.arange(70), layer.scoring)
    torch.testing.assert_close(fed(layer, wide, [(0, 30), (30, 70)]), want, atol=1e-5, rtol=1e-4)


def test_answers_do_not_depend_on_how_far_away_distant_context_is() -> None:
    # The same sinks, blocks and window, with a gap of any length behind the sinks: the same output.
    layer = reading().trace.layers[1]
    everywhere = torch.arange(70)
    keys, queries = (layer.rotation.turned_back(x, everywhere) for x in (layer.keys, layer.queries))

    def last(gap: int, store: BlockStore | DenseStore) -> Tensor:
        at = torch.arange(70) + torch.where(torch.arange(70) < 2, 0, gap)
        moved = layer.rotation(at)
        turned = [rotate(x, *moved) for x in (keys, queries)]
        for start in range(0, 70, 5):
            part = slice(start, start + 5)
            store.append(turned[0][:, part], layer.values[:, part], at[part])
            out, _ = store.attend(turned[1][:, part], at[part], layer.scoring)
        return out

    def plain() -> DenseStore:
        return DenseStore.of(keys[:, :0], layer.values[:, :0], torch.zeros(1, 0), torch.ones(2, 0) > 0, torch.float32)

    close = 5e-3  # angles of large positions round
    assert float((last(5_000, store_of(layer)) - last(100, store_of(layer))).abs().max()) < close
    assert float((last(5_000, plain()) - last(100, plain())).abs().max()) > 2 * close


def test_a_text_ten_times_the_bound_is_read_within_it() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(640), record=False)
    plan = session.plan(InfLLM(budget="64 tokens", block=8, sinks=2))
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    kv = [sum(v for name, v in sample.categories.items() if name.startswith("kv ")) for sample in reads]
    assert max(kv) <= 64 / 640 * plan.full_nbytes and kv[-1] > 0.85 * 64 / 640 * plan.full_nbytes
    assert plan.host_nbytes > 0.8 * plan.full_nbytes and (plan.tiers > 0).all()  # nothing is lost
    assert plan.precisions == ("bfloat16", "host")


def test_texts_beyond_the_models_positions_are_read_and_answered() -> None:
    session = wb.Session((tiny("llama"), None))
    longest = session.facts.max_positions
    session.read(ids_of(longest + 60), record=False)
    run = session.run(InfLLM(budget=0.3, block=16), question=ids_of(9), max_new_tokens=4)
    assert len(run.tokens) == 4 and run.plan.endless
    assert run.ask(ids_of(5), max_new_tokens=2).tokens
    with pytest.raises(PromptTooLong, match="true positions"):  # nothing limits distances where all of it fits
        session.plan(InfLLM(budget=1.0))


def test_the_window_is_no_wider_than_the_models_positions() -> None:
    session = wb.Session((tiny("llama"), None))
    longest = session.facts.max_positions
    session.read(ids_of(3 * longest), record=False)
    store = session.plan(InfLLM(budget=0.6, block=64)).stores()[0]
    assert isinstance(store, BlockStore) and store.reach == longest < store.near.longest


def test_a_text_whose_index_alone_outgrows_the_budget_is_refused_with_the_smallest_that_works() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(300), record=False)
    with pytest.raises(BudgetTooSmall) as refusal:
        session.plan(InfLLM(budget="20 tokens", block=2, sinks=2))
    smallest = refusal.value.smallest
    assert session.plan(InfLLM(budget=smallest, block=2, sinks=2)).share <= smallest


def test_blocks_leave_the_window_while_answering_too() -> None:
    found = reading()
    plan = make_plan(found.trace, [InfLLM(budget=0.5, block=4, sinks=2)], torch.float32, model=found.model)
    store = plan.stores()[0]
    assert isinstance(store, BlockStore)
    layer, before = found.trace.layers[0], store.far.longest
    for step in range(12):
        store.append(layer.keys[:, :1], layer.values[:, :1], torch.tensor([70 + step]))
        assert store.near.longest <= store.room
    assert store.far.longest == before + 12 and store.means.longest == store.far.longest // 4
    assert store.positions[0].tolist() == list(range(82))
