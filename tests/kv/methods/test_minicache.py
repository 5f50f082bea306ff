"""MiniCache, and with it formats that share across layers: one direction of each token, and a length for each layer."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, random_layer, reading, trace_of
from workbench.errors import BadRecipe
from workbench.kv import KIVI, MiniCache, Quest, SnapKV, StreamMem
from workbench.kv.methods.cross_layer.minicache import pairs_of
from workbench.kv.stores import cloned
from workbench.kv.stores.format import Shape
from workbench.kv.stores.merged_layers import MergedLayersFormat, MergedLayerStore, between
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.testing import check_plan
from workbench.testing.stores import live_nbytes

if TYPE_CHECKING:
    from workbench.kv.base import KVMethod
    from workbench.trace import LayerTrace


def on_the_arc(first: list[float], second: list[float], towards: float) -> list[float]:
    """The unit vector at an angle of `towards` times theirs from the first, in the plane of the two (Gram-Schmidt)."""
    a, b = (math.sqrt(sum(x * x for x in v)) for v in (first, second))
    u, w = [x / a for x in first], [x / b for x in second]
    cosine = sum(x * y for x, y in zip(u, w, strict=True))
    across = [y - cosine * x for x, y in zip(u, w, strict=True)]
    length = math.sqrt(sum(x * x for x in across))
    angle = towards * math.acos(cosine)
    return [math.cos(angle) * x + math.sin(angle) * y / length for x, y in zip(u, across, strict=True)]


def angle(first: Tensor, second: Tensor) -> float:
    return math.acos(float(first @ second) / float(first.norm() * second.norm()))


def layers_of(tokens: int = 30) -> tuple[LayerTrace, LayerTrace]:
    return random_layer(tokens, seed=1), random_layer(tokens, seed=2)


def stores_of(layers: tuple[LayerTrace, LayerTrace], held: int, retained: float) -> list[MergedLayerStore]:
    form = MergedLayersFormat(torch.float32, ((1, 2),), 0.6, retained)
    cut = [layer_until(layer, held) for layer in layers]
    made = form.build_together(cut, [torch.ones(2, held, dtype=torch.uint8)] * 2)
    assert all(isinstance(store, MergedLayerStore) for store in made)
    return made  # type: ignore[return-value]


def layer_until(layer: LayerTrace, end: int) -> LayerTrace:
    parts = {name: getattr(layer, name)[:, :end] for name in ("keys_held", "values_held", "queries_held")}
    return replace(layer, **parts)


@pytest.mark.parametrize("towards", [0.0, 0.3, 0.6, 1.0])
def test_the_common_direction_is_on_the_arc_between_the_two(towards: float) -> None:
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))
    got = between(first, second, towards)
    for row, a, b in zip(got, first.tolist(), second.tolist(), strict=True):
        assert row.tolist() == pytest.approx(on_the_arc(a, b, towards), abs=1e-5)
    assert torch.allclose(between(first, 3 * first, towards), torch.nn.functional.normalize(first, dim=-1), atol=1e-6)
    assert bool(between(first, -first, 0.5).isfinite().all())


@pytest.mark.parametrize("retained", [0.0, 0.2, 1.0])
def test_each_layer_has_the_common_direction_at_its_own_length_but_for_what_differs_most(retained: float) -> None:
    layers = layers_of()
    stores = stores_of(layers, 30, retained)
    count = math.ceil(retained * 30)
    for head in range(2):
        angles = [angle(layers[0].keys[head, p], layers[1].keys[head, p]) for p in range(30)]
        exact = set(sorted(range(30), key=lambda p: -angles[p])[:count])
        for layer, store in zip(layers, stores, strict=True):
            held = store.contents(torch.float32)
            for p in range(30):
                for side in ("keys", "values"):
                    own = getattr(layer, side)[head, p]
                    pair = [getattr(other, side)[head, p].tolist() for other in layers]
                    want = own.tolist() if p in exact else [float(own.norm()) * x for x in on_the_arc(*pair, 0.6)]
                    assert getattr(held, side)[head, p].tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("steps", [[1] * 6, [3, 1, 2], [6]])
def test_new_tokens_are_exact_in_their_own_pass_and_merged_before_the_next(steps: list[int]) -> None:
    layers = layers_of()
    stores, all_at_once = stores_of(layers, 24, 0.0), stores_of(layers, 30, 0.0)
    end = 24
    for count in steps:
        part, at = slice(end, end + count), torch.arange(end, end + count)
        for layer, store in zip(layers, stores, strict=True):
            store.append(layer.keys[:, part], layer.values[:, part], at)
            held = store.contents(torch.float32)
            assert torch.equal(held.keys[:, part], layer.keys[:, part])
            assert torch.equal(held.values[:, part], layer.values[:, part])
            assert store.slot_positions[0].tolist() == list(range(end + count))
        end += count
    for store, want in zip(stores, all_at_once, strict=True):
        got, before = store.contents(torch.float32), end - steps[-1]
        torch.testing.assert_close(got.keys[:, :before], want.contents(torch.float32).keys[:, :before])


def test_copies_of_a_pair_share_with_each_other_and_not_with_the_originals() -> None:
    layers = layers_of()
    stores = stores_of(layers, 24, 0.1)
    copies = cloned(stores)
    assert [copy.partner for copy in copies] == copies[::-1] and not set(map(id, copies)) & set(map(id, stores))
    assert live_nbytes(copies) == live_nbytes(stores) == sum(store.nbytes for store in stores)
    alone = stores[1].clone()
    assert alone.partner is not None and alone.partner is not stores[0]
    for at in (24, 25):
        for layer, store in zip(layers, copies, strict=True):
            store.append(layer.keys[:, at : at + 1], layer.values[:, at : at + 1], torch.tensor([at]))
    assert [store.entries for store in stores] == [48, 48] and [store.entries for store in copies] == [52, 52]


def test_pairs_are_neighbours_of_one_shape_from_the_last_layer_down() -> None:
    def shapes(*layers: int, wide: tuple[int, ...] = ()) -> list[Shape]:
        return [Shape(2, 10, 8 if i in wide else 4, 4, 2, i) for i in layers]

    assert pairs_of(shapes(0, 1, 2, 3, 4)) == [(3, 4), (1, 2)]
    assert pairs_of(shapes(0, 1, 3, 5, 6)) == [(5, 6), (0, 1)]
    assert pairs_of(shapes(0, 1, 2, 3, wide=(3,))) == [(1, 2)]
    assert pairs_of(shapes(4)) == []


def test_without_a_budget_the_second_half_is_merged_and_with_one_as_little_as_fits() -> None:
    trace = trace_of(architecture="llama", tokens=80)
    count = len(trace.layers)
    free = make_plan(trace, [MiniCache()], torch.bfloat16)
    check_plan(free)
    assert isinstance(free.format, MergedLayersFormat)
    assert all(lower >= count // 2 and upper == lower + 1 for lower, upper in free.format.pairs)
    shares = []
    for budget in (1.0, 0.95, 0.85, free.share):
        plan = make_plan(trace, [MiniCache(budget=budget)], torch.bfloat16)
        check_plan(plan)
        shares.append(plan.share)
        assert plan.share <= budget
    assert all(a >= b for a, b in pairwise(shares)) and shares[0] == 1.0
    assert float(make_plan(trace, [MiniCache(budget=1.0)], torch.float32).error.max()) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha"])
def test_a_conversation_goes_on_over_merged_layers(architecture: str) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    session.read(ids_of(70, 1))
    exact = session.run(question=ids_of(9, 2), max_new_tokens=8)
    merged = session.run(MiniCache(start=0.0), question=ids_of(9, 2), max_new_tokens=8)
    again = session.run(MiniCache(start=0.0), question=ids_of(9, 2), max_new_tokens=8)
    assert merged.tokens == again.tokens and merged.quality.kl > 1e-6
    asked = [merged.ask(ids_of(5, 3), max_new_tokens=3) for _ in range(2)]
    assert asked[0].tokens == asked[1].tokens
    whole = session.run(MiniCache(start=0.0, retained=1.0), question=ids_of(9, 2), max_new_tokens=1)
    assert whole.tokens == exact.tokens[:1]


def test_bytes_while_decoding_are_those_of_live_tensors() -> None:
    found = reading()
    plan = make_plan(found.trace, [MiniCache(start=0.0)], torch.bfloat16)
    decoder = Decoder(found.model, plan.stores(), plan.position)
    for token in range(5):
        decoder.feed(torch.tensor([token]))
    assert live_nbytes(decoder.stores) == sum(store.nbytes for store in decoder.stores)


@pytest.mark.parametrize("other", [SnapKV(window=8), KIVI(), Quest(), StreamMem()], ids=lambda method: method.key)
def test_whoever_drops_tokens_or_stores_them_otherwise_is_refused(other: KVMethod) -> None:
    found = reading()
    with pytest.raises(BadRecipe):
        make_plan(found.trace, [other, MiniCache()], torch.bfloat16, model=found.model)
