"""Float weights written from packed and sparse forms, under the interpreter or compiled, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.support import interpreted
from workbench.weights.layers import SparseLinear
from workbench.weights.layers import sparse as layers
from workbench_kernels import sparse_linear as kernels
from workbench_kernels.packing import pack
from workbench_kernels.weight import nibbles, packed_weight, sparse_weight

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PACKED: list[dict[str, Any]] = [
    *({"bits": bits} for bits in PLANES),
    *({"bits": bits, "inputs": 93, "group": 31, "zeros": torch.uint8} for bits in PLANES),  # planes do not line up
    {"zeros": None, "columns": True},
    {"bits": 3, "zeros": None, "columns": True, "inputs": 129, "group": 40},
    {"inputs": 80, "group": 32},  # the last group is shorter
    {"inputs": 576, "group": 576, "outputs": 17},
    {"bits": 8, "inputs": 4500, "group": 100, "outputs": 2},  # several programs a row
    {"bits": 1, "zeros": None, "dtype": torch.bfloat16},
    {"bits": 6, "dtype": torch.float16, "columns": True},
]


def packed(
    bits: int = 4,
    outputs: int = 5,
    inputs: int = 128,
    group: int = 32,
    zeros: torch.dtype | None = torch.float16,
    columns: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, tuple[Any, ...]]:
    draw = torch.Generator().manual_seed(bits + inputs)
    groups = -(-inputs // group)
    codes = torch.randint(2**bits, (outputs, inputs), generator=draw, dtype=torch.uint8)
    planes, below = [], 0
    for width in PLANES[bits]:
        planes.append(pack(codes >> below & 2**width - 1, width))
        below += width
    scale = (torch.rand(outputs, groups, generator=draw) + 0.5).half()
    zero = None if zeros is None else (torch.rand(outputs, groups, generator=draw) * (2**bits - 1)).to(zeros)
    factor = (torch.rand(inputs, generator=draw) + 0.5).half() if columns else None
    return codes, (planes, PLANES[bits], scale, zero, factor, group, 2.0 ** (bits - 1), inputs, dtype)


def looped(codes: Tensor, given: tuple[Any, ...]) -> Tensor:
    """One weight after another."""
    _, _, scale, zero, factor, group, middle, *_ = given
    out = torch.zeros(codes.shape, dtype=torch.float64)
    for o in range(codes.shape[0]):
        steps = scale[o].tolist()
        below = [middle] * len(steps) if zero is None else zero[o].tolist()
        for i, code in enumerate(codes[o].tolist()):
            out[o, i] = (code - below[i // group]) * steps[i // group] * (1 if factor is None else float(factor[i]))
    return out


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal, but for the last bit of a bfloat16, which the interpreter does not round to the nearest."""
    if found.dtype == torch.bfloat16:
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
        return True
    return torch.equal(found, wanted)


def close(found: Tensor, wanted: Tensor) -> bool:
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    return found.shape == wanted.shape and float((found.double() - wanted).norm()) < bound * float(wanted.norm())


@pytest.mark.parametrize("given", PACKED, ids=str)
def test_the_reference_writes_what_packed_codes_stand_for(given: dict[str, Any]) -> None:
    codes, arguments = packed(**given)
    assert close(packed_weight.reference(*arguments), looped(codes, arguments))


@interpreted
@pytest.mark.parametrize("given", PACKED, ids=str)
def test_the_kernel_writes_what_packed_codes_stand_for(given: dict[str, Any]) -> None:
    from workbench_kernels.gpu.weight import packed_weight as kernel

    codes, arguments = packed(**given)
    found = kernel(*arguments)
    assert found.dtype == arguments[-1] and close(found, looped(codes, arguments))
    if arguments[4] is None:  # nothing is rounded twice
        assert same(found, packed_weight.reference(*arguments))


SPARSE = [(3, 64, 0.5), (5, 93, 0.3), (2, 8200, 0.6), (9, 24, 0.5), (3, 100, 0.0), (3, 100, 1.0)]


def sparse(outputs: int, inputs: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with zeros, which of it is held, and where each row's values begin."""
    draw = torch.Generator().manual_seed(inputs)
    held = torch.rand(outputs, inputs, generator=draw) < share
    counts = held.sum(1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return torch.randn(outputs, inputs, generator=draw).half() * held, held, starts


@interpreted
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SPARSE, ids=str)
def test_held_values_are_put_where_their_bits_stand(sizes: tuple[int, int, float], dtype: torch.dtype) -> None:
    from workbench_kernels.gpu.weight import sparse_weight as kernel

    weight, held, starts = sparse(*sizes)
    bitmap = pack(held.to(torch.uint8), 1)
    given = (bitmap, weight[held], starts, sizes[1], dtype)
    assert torch.equal(sparse_weight.reference(*given), weight.to(dtype))
    if held.any():
        assert same(kernel(*given), weight.to(dtype))
        first = 1  # a tile: values and starts of its rows alone
        part = (bitmap[first:], weight[first:][held[first:]], starts[first:], sizes[1], dtype)
        assert same(kernel(*part), weight[first:].to(dtype))


@interpreted
def test_rows_that_hold_equally_many_need_no_starts() -> None:
    from workbench_kernels.gpu.weight import sparse_weight as kernel

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 200, generator=draw)
    scores = torch.rand(7, 50, 4, generator=draw)
    held = (scores >= scores.topk(2, dim=-1).values[..., -1:]).flatten(1)  # 2:4
    given = (pack(held.to(torch.uint8), 1), weight[held].bfloat16(), None, 200, torch.float32)
    wanted = weight.bfloat16().float() * held
    assert torch.equal(sparse_weight.reference(*given), wanted)
    assert torch.equal(kernel(*given), wanted)


@interpreted
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("sizes", [each for each in SPARSE if each[2]], ids=str)
def test_a_few_tokens_are_multiplied_with_the_values_that_are_held(sizes: tuple[int, int, float], tokens: int) -> None:
    from workbench_kernels.gpu.sparse_linear import sparse_linear

    weight, held, starts = sparse(*sizes)
    x = torch.randn(tokens, sizes[1], generator=torch.Generator().manual_seed(tokens))
    given = (x, pack(held.to(torch.uint8), 1), weight[held], starts)
    for found in (sparse_linear(*given), kernels.sparse_linear.reference(*given)):
        assert close(found, x.double() @ weight.double().T)


@interpreted
def test_layers_on_a_gpu_write_no_sparse_weight_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers, kernels):
        monkeypatch.setattr(module, "on_gpu", lambda *tensors: True)
    weight, held, _ = sparse(5, 93, 0.3)
    bias = nn.Parameter(torch.randn(5), requires_grad=False)
    layer = SparseLinear(weight, held, bias)
    x = torch.randn(1, 6, 93, generator=torch.Generator().manual_seed(0))
    wanted = nn.functional.linear(x, weight.float(), bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(SparseLinear, "rows", lambda *given: pytest.fail("a weight was written"))
    torch.testing.assert_close(layer(x[:, :1]), wanted[:, :1], rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 64), (5, 93), (2, 9000)])
def test_nibbles_stand_in_the_upper_halves_of_bytes(outputs: int, inputs: int) -> None:
    from workbench_kernels.gpu.weight import nibbles as kernel

    codes = torch.randint(16, (outputs, inputs), generator=torch.Generator().manual_seed(inputs), dtype=torch.uint8)
    wanted = ((codes.int() - 8) * 16).to(torch.int8)
    for found in (kernel(pack(codes, 4)), nibbles.reference(pack(codes, 4))):
        assert found.dtype == torch.int8 and torch.equal(found[:, :inputs], wanted)
