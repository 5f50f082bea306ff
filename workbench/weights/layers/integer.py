"""Linear layers that round what enters them too, and multiply integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from workbench.weights.layers.packed import PackedLinear
from workbench_kernels.weight import nibbles

_EXACT = 1024  # columns whose products of 8-bit numbers float32 sums without rounding: 128 * 128 * 1024 = 2 ** 24
_TINY = 1e-12  # a token of zeros has some step too


class IntegerLinear(PackedLinear):
    """A packed linear layer that rounds each token of its input [n, i] to integers.

    input_bits: of each input, 2 to 8. The step of an input x is the largest |x| of its token over 2 ** (input_bits - 1)
    - 1; with `inputs` float16 [i], the step of x_j is that to the power `exponent`, times inputs_j. So a token's
    numbers depend on itself alone, however many others are computed with it.

    Where steps are one for each token and scales one for each output (groups as wide as the layer, without zeros, of 4
    or 8 bits), integers are multiplied and summed exactly (`integer_product`), 4-bit ones as their codes stand in the
    upper half of a byte: 16 times too large, which the scale takes back (FastGEMM, Li et al. 2023, arXiv:2311.09550).
    Otherwise the factor of each column or group stands inside the sum, and the rounded numbers are multiplied as
    floating point.
    """

    inputs: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        bias: nn.Parameter | None = None,
        *,
        group: int | None = None,
        input_bits: int = 8,
        inputs: Tensor | None = None,
        exponent: float = 1.0,
    ) -> None:
        super().__init__(codes, scale, zero, bits, bias, group=group)
        self.input_bits, self.exponent = input_bits, exponent
        self.register_buffer("inputs", None if inputs is None else inputs.to(torch.float16, copy=True))

    @property
    def by_token(self) -> bool:
        """Whether nothing but whole numbers stands inside the sums."""
        return self.inputs is None and self.zero is None and self.scale.shape[1] == 1 and self.bits in (4, 8)

    def step(self, x: Tensor) -> Tensor:
        """The step of each input x [..., i]: float32 [..., 1] or [..., i]."""
        return input_step(x, self.input_bits, self.inputs, self.exponent)

    def forward(self, x: Tensor) -> Tensor:
        step = self.step(x)
        codes = input_codes(x, step, self.input_bits)
        if not self.by_token:
            return super().forward((codes * step).to(x.dtype))
        whole, by = self._signed()
        sums = integer_product(codes.flatten(0, -2).to(torch.int8), whole).view(*x.shape[:-1], -1)
        out = (sums * step * (self.scale[:, 0].float() / by)).to(x.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def _signed(self) -> tuple[Tensor, int]:
        """The weights' whole numbers as int8 [o, i], and how many times too large they are."""
        held: Tensor = self.plane0  # type: ignore[assignment]
        if self.bits == 8:
            return (held ^ 128).view(torch.int8), 1
        return nibbles(held)[:, : self.in_features], 16

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "input_bits": self.input_bits}


def input_step(x: Tensor, bits: int, inputs: Tensor | None = None, exponent: float = 1.0) -> Tensor:
    """The step by which inputs x [..., i] are rounded to `bits` bits: float32, [..., 1], or [..., i] with `inputs`.

    The largest |x| of each token, to the power `exponent`, times `inputs` [i] (default: 1), over 2 ** (bits - 1) - 1.
    """
    largest = x.detach().float().abs().amax(dim=-1, keepdim=True)
    step = largest.pow(exponent) if exponent != 1 else largest
    if inputs is not None:
        step = step * inputs.float()
    # Times the reciprocal, which is what a GPU makes of a division by a number: so steps are the same to the bit
    # everywhere, and ties, frequent at few bits of 16-bit inputs, fall to the same side.
    return (step * (1 / (2 ** (bits - 1) - 1))).clamp_min(_TINY)


def input_codes(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers of inputs x [..., i] in these steps, float32, from -(2 ** (bits - 1) - 1) up."""
    most = 2 ** (bits - 1) - 1
    return (x.float() / step).round_().clamp_(-most, most)


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [n, i] times weight int8 [o, i] transposed, exactly: float32 [n, o] where sums fit, else as near as it is.

    On a GPU by its integer units. Elsewhere by floating point, 1,024 columns at a time, whose sums float32 holds
    exactly: it is many times faster there than the integer product.
    """
    if x.device.type == "cuda":
        # The units want more than 16 rows, and multiples of 8 everywhere.
        rows, outs, columns = max(24 - x.shape[0], -x.shape[0] % 8), -weight.shape[0] % 8, -x.shape[1] % 8
        sums = torch._int_mm(_widened(x, rows, columns), _widened(weight, outs, columns).T)
        return sums[: x.shape[0], : weight.shape[0]].float()
    total: Tensor | None = None
    for part, own in zip(x.split(_EXACT, dim=1), weight.split(_EXACT, dim=1), strict=True):
        sums = linear(part.float(), own.float())
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total


def _widened(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with so many more rows and columns of zeros, and itself where it needs none."""
    return pad(x, (0, columns, 0, rows)) if rows or columns else x.contiguous()
