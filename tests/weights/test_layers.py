"""Packed layers and grids: the numbers that are stood for, and exactly the bytes that are counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from tests.weights.support import drawn
from workbench.measure.memory import tensor_bytes
from workbench.weights.layers import PackedLinear, Parts, compact, packed_nbytes
from workbench.weights.solvers.quantisation_grid import fit


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 70),
    group=st.integers(1, 40),
    kind=st.sampled_from(["none", "uint8", "float16"]),
    seed=st.integers(0, 2**16),
)
def test_packed_layers_stand_for_their_codes_at_any_width(
    bits: int, outputs: int, inputs: int, group: int, kind: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=draw, dtype=torch.uint8)
    scale, columns = torch.rand(outputs, groups, generator=draw).half(), torch.rand(inputs, generator=draw).half()
    zero = {
        "none": None,
        "uint8": torch.randint(0, 2**bits, (outputs, groups), generator=draw, dtype=torch.uint8),
        "float16": torch.rand(outputs, groups, generator=draw).half(),
    }[kind]
    layer = PackedLinear(codes, scale, zero, bits, group=group, columns=columns)
    for o in range(outputs):
        for i in range(inputs):
            middle = 2 ** (bits - 1) if bits > 1 else 0.5
            offset = middle if zero is None else float(zero[o, i // group])
            want = (int(codes[o, i]) - offset) * float(scale[o, i // group]) * float(columns[i])
            assert float(layer.dequantised()[o, i]) == pytest.approx(want, rel=1e-5, abs=1e-6)
    zero_bytes = 0 if zero is None else zero.element_size()
    foretold = packed_nbytes(outputs, inputs, bits, group, zero_bytes=zero_bytes, columns=True)
    assert layer.nbytes == tensor_bytes(layer.buffers()) == foretold


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 50),
    group=st.integers(1, 32),
    symmetric=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_rounding_errs_by_half_a_step_and_keeps_zero(
    bits: int, inputs: int, group: int, symmetric: bool, scale: float, seed: int
) -> None:
    weight = scale * drawn(3, inputs, seed=seed)
    weight[:, ::5] = 0
    grid = fit(weight, bits, group, symmetric=symmetric)
    step = grid.spread(grid.scale, inputs)
    nearest = grid.nearest(weight)
    # Half a step, and what rounding the scale to 16 bits and the zero to a level moves the ends by.
    assert bool(((nearest - weight).abs() <= step * (1.0 if not symmetric else 0.5) + 2e-3 * weight.abs()).all())
    assert bool((nearest[:, ::5] == 0).all())


def test_large_layers_are_made_float_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = drawn(100, 40), nn.Parameter(drawn(100, seed=1)), drawn(2, 7, 40, seed=2)
    grid = fit(weight, 4, 16)
    layer = PackedLinear(grid.codes(weight), grid.scale, grid.zero.to(torch.uint8), 4, bias, group=16)
    whole = layer(x)
    monkeypatch.setattr(compact, "_TILE", 40 * 4 * 20)
    asked: list[int] = []
    rows = layer.rows
    monkeypatch.setattr(
        layer, "rows", lambda first, last, dtype: asked.append(last - first) or rows(first, last, dtype)
    )
    torch.testing.assert_close(layer(x), whole)
    assert asked == [20] * 5
    torch.testing.assert_close(whole, linear(x, grid.nearest(weight), bias), rtol=1e-4, atol=1e-4)


def test_parts_add_up_on_their_columns() -> None:
    weight, bias, x = drawn(12, 30), nn.Parameter(drawn(12, seed=1)), drawn(5, 30, seed=2)
    salient = torch.tensor([1, 4, 17, 29])
    rest = torch.tensor([i for i in range(30) if i not in salient.tolist()])
    layers, want = [], torch.zeros(12, 30)
    for chosen, bits in ((salient, 8), (rest, 3)):
        part = weight[:, chosen]
        grid = fit(part, bits, 8)
        layers.append(PackedLinear(grid.codes(part), grid.scale, grid.zero.to(torch.uint8), bits, group=8))
        want[:, chosen] = grid.nearest(part)
    everything = PackedLinear(torch.ones(12, 30, dtype=torch.uint8), torch.ones(12, 1), None, 1, group=30)
    layer = Parts([*layers, everything], [salient, rest, None], 30, bias)
    want += 0.5  # what everything's ones stand for at 1 bit
    torch.testing.assert_close(layer.dequantised(), want)
    torch.testing.assert_close(layer(x), linear(x, want, bias), rtol=1e-4, atol=1e-4)
    assert layer.nbytes == sum(part.nbytes for part in (*layers, everything)) + 2 * 30
    with pytest.raises(ValueError, match="cannot be added"):
        Parts(layers, [salient, salient], 30)
