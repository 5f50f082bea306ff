"""The maps of attention methods are those that they compute, entry by entry."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench import testing
from workbench.attention import BlockSparse, MemoryEfficient, StreamingWindow
from workbench.attention.base import AttentionMethod, Pass
from workbench.attention.implied import implied_map
from workbench.registry import registered


@pytest.mark.parametrize("key", [cls.key for cls in registered("attention") if cls.key != "uniattn"])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_the_map_times_the_values_is_what_comes_out(key: str, pooling: str) -> None:
    trace = testing.reading().trace
    layer, method = trace.layers[1], wb.method(key)
    assert isinstance(method, AttentionMethod)
    options = {"scale": layer.scale, "window": None, "softcap": None}
    out = method.attend(layer.queries, layer.keys, layer.values, at=Pass(3, layer.tokens, 1), **options)
    for head in (0, 3):
        found = implied_map(method, layer, head, 3, pixels=layer.tokens, pooling=pooling)  # type: ignore[arg-type]
        assert found.values.shape == (layer.tokens, layer.tokens)
        kv = head // layer.groups
        if key != "l-mul":  # which adds in place of multiplying
            torch.testing.assert_close(found.values @ layer.values[kv], out[head], rtol=1e-3, atol=1e-4)
        assert bool((found.values.triu(1).abs() < 1e-12).all())  # nothing of what comes later


def test_pooled_and_zoomed_maps_are_pools_and_parts_of_the_whole() -> None:
    layer, method = testing.reading().trace.layers[1], BlockSparse(budget=0.4)
    whole = implied_map(method, layer, 2, 3, pixels=70).values
    for pooling, pool in (("max", torch.amax), ("sum", torch.sum)):
        small = implied_map(method, layer, 2, 3, pixels=7, pooling=pooling)  # type: ignore[arg-type]
        want = pool(whole.unflatten(0, (7, 10)).unflatten(2, (7, 10)), dim=(1, 3))  # type: ignore[operator]
        torch.testing.assert_close(small.values, want, rtol=1e-4, atol=1e-5)
    part = implied_map(method, layer, 2, 3, pixels=70, rows=(20, 50), cols=(10, 40)).values
    assert torch.allclose(part, whole[20:50, 10:40], atol=1e-6)


def test_what_a_sparse_method_leaves_out_is_empty() -> None:
    layer = testing.reading().trace.layers[1]
    window = implied_map(StreamingWindow(budget=0.3), layer, 0, 3, pixels=70).values
    exact = implied_map(MemoryEfficient(), layer, 0, 3, pixels=70).values
    assert int((window > 0).sum()) < 0.4 * int((exact > 0).sum())


def test_a_session_shows_the_map_that_the_recipe_computed() -> None:
    found = testing.reading()
    session = wb.Session((found.model, None))
    session.read(found.trace.ids)
    shown = session.attention(1, 2, StreamingWindow(budget=0.3), pixels=70)
    trace = session._trace(wb.Recipe.of(StreamingWindow(budget=0.3)))  # its own reading, whose queries differ
    assert torch.equal(shown.values, implied_map(StreamingWindow(budget=0.3), trace.layers[1], 2, 3, pixels=70).values)
    exact = session.attention(1, 2, "memory-efficient", pixels=70)
    torch.testing.assert_close(exact.values, session.attention(1, 2, pixels=70).values, rtol=1e-3, atol=1e-4)
