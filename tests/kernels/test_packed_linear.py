"""Products with packed weights for a few tokens, under the interpreter or compiled, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.kernels.support import interpreted
from workbench.weights.layers import IntegerLinear, PackedLinear, ShiftLinear
from workbench.weights.layers import packed as layers
from workbench_kernels import packed_linear as kernels
from workbench_kernels.packed_linear import fits
from workbench_kernels.packing import pack

CASES: list[dict[str, Any]] = [
    {},
    {"bits": 8, "zeros": None, "inputs": 64},
    {"bits": 2, "group": 128, "columns": True},
    {"bits": 1, "zeros": None, "inputs": 512},
    {"tokens": 4, "outputs": 21, "group": 192, "inputs": 384},
    {"zeros": torch.uint8, "inputs": 128 * 5, "outputs": 33, "group": 320, "columns": True},
    {"outputs": 3, "inputs": 4480},  # two steps, of which the second is not full
    {"dtype": torch.float32, "tokens": 2},
]


def case(
    bits: int = 4,
    outputs: int = 5,
    inputs: int = 256,
    group: int = 64,
    tokens: int = 1,
    zeros: torch.dtype | None = torch.float16,
    columns: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(outputs + inputs)
    groups = -(-inputs // group)
    codes = torch.randint(2**bits, (outputs, inputs), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(outputs, groups, generator=draw) + 0.5).div(2**bits).half()
    zero = None if zeros is None else (torch.rand(outputs, groups, generator=draw) * (2**bits - 1)).to(zeros)
    factor = (torch.rand(inputs, generator=draw) + 0.5).half() if columns else None
    x = torch.randn(tokens, inputs, generator=draw).to(dtype)
    return codes, (x, pack(codes, bits), scale, zero, factor, bits, group, 2 ** (bits - 1) if bits > 1 else 0.5)


def looped(codes: Tensor, given: tuple[Any, ...]) -> Tensor:
    """One output after another."""
    x, _, scale, zero, factor, _, group, middle = given
    out = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    factors = [1.0] * codes.shape[1] if factor is None else factor.tolist()
    for o in range(codes.shape[0]):
        steps = scale[o].tolist()
        below = [middle] * len(steps) if zero is None else zero[o].tolist()
        weight = [
            (code - below[i // group]) * steps[i // group] * factors[i] for i, code in enumerate(codes[o].tolist())
        ]
        out[:, o] = x.double() @ torch.tensor(weight, dtype=torch.float64)
    return out


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_reference_multiplies_with_what_the_codes_stand_for(given: dict[str, Any]) -> None:
    codes, arguments = case(**given)
    wanted = looped(codes, arguments)
    found = kernels.packed_linear.reference(*arguments)
    assert found.dtype == arguments[0].dtype
    assert float((found.double() - wanted).norm()) < 1e-3 * float(wanted.norm())


@interpreted
@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_kernel_reads_packed_codes_and_multiplies_the_same(given: dict[str, Any]) -> None:
    from workbench_kernels.gpu.packed_linear import packed_linear

    codes, arguments = case(**given)
    x, plane, *_, bits, group, _ = arguments
    assert fits(x, plane, bits, group)
    wanted, found = looped(codes, arguments), packed_linear(*arguments)
    assert found.dtype == x.dtype and found.shape == wanted.shape
    assert float((found.double() - wanted).norm()) < (1e-5 if x.dtype == torch.float32 else 1e-3) * float(wanted.norm())


@interpreted
def test_every_configuration_gives_the_same() -> None:
    from workbench_kernels.gpu.packed_linear import CONFIGS, packed_linear

    codes, arguments = case(outputs=9, inputs=2432, dtype=torch.float32)
    wanted = looped(codes, arguments)
    for config in CONFIGS:
        assert float((packed_linear(*arguments, config).double() - wanted).norm()) < 1e-5 * float(wanted.norm())


@interpreted
@pytest.mark.parametrize(
    "given",
    [
        {"tokens": 5, "outputs": 70},
        {"tokens": 16, "bits": 8, "zeros": None, "inputs": 64},
        {"tokens": 9, "bits": 2, "inputs": 1280, "group": 320, "columns": True},
        {"tokens": 6, "bits": 1, "inputs": 512, "zeros": None},
        {"tokens": 7, "zeros": torch.uint8, "inputs": 128 * 7},  # one run for each program
        {"tokens": 16, "inputs": 128 * 5, "group": 128, "programs": 2},  # three for the first, two for the second
    ],
    ids=str,
)
def test_matrix_units_multiply_some_tokens_with_packed_codes(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench_kernels.gpu import packed_matmul

    given = dict(given)
    monkeypatch.setattr(packed_matmul, "_PROGRAMS", given.pop("programs", 9))
    codes, arguments = case(**given)
    x, plane, *_, bits, group, _ = arguments
    assert fits(x, plane, bits, group)
    wanted, found = looped(codes, arguments), packed_matmul.packed_matmul(*arguments)
    assert found.dtype == x.dtype and found.shape == wanted.shape
    assert float((found.double() - wanted).norm()) < 2e-3 * float(wanted.norm())
    assert torch.equal(packed_matmul.packed_matmul(*arguments), found)


def test_runs_of_two_groups_and_many_tokens_are_left_to_the_reference() -> None:
    plane = torch.zeros(3, 128, dtype=torch.uint8)
    assert fits(torch.zeros(1, 256), plane, 4, 64)
    assert fits(torch.zeros(16, 256, dtype=torch.bfloat16), plane, 4, 64)
    assert not fits(torch.zeros(5, 256), plane, 4, 64)  # too many tokens
    assert not fits(torch.zeros(17, 256, dtype=torch.bfloat16), plane, 4, 64)
    assert not fits(torch.zeros(1, 256), plane, 4, 32)  # a run would need two scales
    assert not fits(torch.zeros(1, 255), plane, 4, 64)  # codes were added to fill the last bytes
    assert not fits(torch.zeros(1, 192), plane[:, :96], 4, 64)  # the second half begins within a run


@interpreted
def test_layers_on_a_gpu_multiply_one_token_by_the_kernel_and_many_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers, kernels):
        monkeypatch.setattr(module, "on_gpu", lambda *tensors: True)
    asked: list[int] = []
    rows = PackedLinear.rows
    monkeypatch.setattr(PackedLinear, "rows", lambda self, *which: asked.append(self.bits) or rows(self, *which))
    bias = nn.Parameter(torch.randn(5), requires_grad=False)
    for bits in (1, 2, 3, 4, 8):
        codes, (_, _, scale, zero, columns, *_) = case(bits=bits, inputs=512, group=128, columns=True)
        layer = PackedLinear(codes, scale, zero, bits, bias, group=128, columns=columns)
        for tokens in (1, 9):
            x = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(bits))
            found, tiles = layer(x), len(asked)
            assert bool(asked) == (tokens > 4 or bits == 3)
            torch.testing.assert_close(found, linear(x, layer.dequantised(), bias), rtol=1e-4, atol=1e-4)
            assert tiles <= 1
            asked.clear()
    codes, (_, _, scale, *_) = case(bits=4, inputs=512, group=512)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    shifted = ShiftLinear(codes % 8, scale, 3, group=512)  # codes that stand for other numbers
    torch.testing.assert_close(shifted(x), linear(x, shifted.dequantised()), rtol=1e-4, atol=1e-4)
    rounding = IntegerLinear(codes, scale, None, 4, group=512, profile=torch.ones(512))
    asked.clear()
    found = rounding(x)
    assert not asked
    monkeypatch.setattr(layers, "on_gpu", lambda *tensors: False)
    torch.testing.assert_close(found, rounding(x), rtol=1e-4, atol=1e-4)
    whole = IntegerLinear(codes, scale[:, :1], None, 4, bias, group=512)  # nothing but integers inside the sums
    wanted = whole(x)
    monkeypatch.setattr(layers, "on_gpu", lambda *tensors: True)
    monkeypatch.setattr(whole, "_signed", lambda: pytest.fail("no weight is unpacked for one token"))
    torch.testing.assert_close(whole(x), wanted, rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    monkeypatch.setattr(layers, "on_gpu", lambda *tensors: True)
    assert PackedLinear(codes, scale, None, 4, group=512)(x).requires_grad
