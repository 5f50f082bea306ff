"""Kernels around products of integers, under the interpreter or compiled, against PyTorch on host memory."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from workbench_kernels.integer import input_codes, input_step, integer_linear, integer_product


@interpreted
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 64), (5, 93), (17, 600)])
def test_inputs_are_rounded_to_the_reference_s_integers(tokens: int, inputs: int, bits: int) -> None:
    from workbench_kernels.gpu.integer import rounded

    draw = torch.Generator().manual_seed(inputs)
    x = torch.randn(tokens, inputs, generator=draw).half()  # in 16 bits: many halfway between two integers
    x[-1, : inputs // 2] = 0
    x[0] = 0  # the smallest step there is
    want = input_step(x, bits)
    codes, step = rounded(x, bits, tokens + 3, inputs + 2)
    assert torch.equal(step, want[:, 0])
    assert torch.equal(codes[:tokens, :inputs].float(), input_codes(x, want, bits))
    assert not codes[tokens:].any() and not codes[:, inputs:].any()


@interpreted
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_product_of_integers_is_scaled_as_the_reference_scales_it(dtype: torch.dtype, biased: bool) -> None:
    from workbench_kernels.gpu.integer import rounded, scaled

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=draw).to(dtype)
    weight = torch.randint(-128, 128, (1100, 96), generator=draw, dtype=torch.int8)
    scale = torch.rand(1100, generator=draw) / 1000
    bias = torch.randn(1100, generator=draw).to(dtype) if biased else None
    codes, step = rounded(x, 8, 24, 96)
    sums = integer_product(codes, weight).int()
    found = scaled(sums, step, scale, bias, 1100, dtype)
    wanted = integer_linear.reference(x, weight, scale, 8, bias)
    assert found.dtype == dtype
    close = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)
