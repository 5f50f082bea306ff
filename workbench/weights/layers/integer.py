"""Linear layers that round what enters them too, and multiply integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.precision import half
from workbench.weights.layers.compact import Description
from workbench.weights.layers.packed import PackedLinear
from workbench_kernels.integer import cross_step, input_codes, input_step, integer_linear
from workbench_kernels.limits import FEW
from workbench_kernels.packed_linear import packed_linear
from workbench_kernels.weight import nibbles


class IntegerLinear(PackedLinear):
    """A packed linear layer that rounds each token of its input [n, i] to integers.

    input_bits: of each input, 2 to 8. The step of an input is the largest |x| of its token over 2 ** (input_bits - 1) -
    1; with `profile` float16 [i], those of a token are to each other as these are, and reach all its inputs. So a
    token's numbers depend on itself alone, however many others are computed with it. Not so with `alpha`: steps are
    then those of `cross_step`, of tokens and of the columns of all that are computed together.

    Where steps are one for each token and scales one for each output (groups as wide as the layer, without zeros, of 4
    or 8 bits), integers are multiplied and summed exactly (`integer_product`), 4-bit ones as their codes stand in the
    upper half of a byte: 16 times too large, which the scale takes back (FastGEMM, Li et al. 2023, arXiv:2311.09550).
    A few tokens on a GPU are multiplied with the packed codes as they lie, and summed in float32. Otherwise the factor
    of each column or group stands inside the sum, and the rounded numbers are multiplied as floating point.
    """

    profile: Tensor | None

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
        profile: Tensor | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__(codes, scale, zero, bits, bias, group=group)
        self.input_bits, self.alpha = input_bits, alpha
        held = None if profile is None else half(profile, "the profile of its steps")
        self.register_buffer("profile", held)

    @property
    def by_token(self) -> bool:
        """Whether nothing but whole numbers stands inside the sums."""
        whole = self.zero is None and self.scale.shape[1] == 1 and self.bits in (4, 8)
        return whole and self.profile is None and self.alpha is None

    def step(self, x: Tensor) -> Tensor:
        """The step of each input x [..., i]: float32 [..., 1] or [..., i]."""
        if self.alpha is not None:
            return cross_step(x, self.input_bits, self.alpha)
        return input_step(x, self.input_bits, self.profile)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if self.by_token and not (len(flat) <= FEW and self._read_as_it_lies(flat)):
            whole, by = self._signed()
            scale = self.scale[:, 0].float() / by
            return integer_linear(flat, whole, scale, self.input_bits, self.bias).view(*x.shape[:-1], -1)
        step = self.step(x)
        codes = input_codes(x, step, self.input_bits)
        if not self.by_token:
            return super().forward((codes * step).to(x.dtype))
        few = codes.view(-1, self.in_features)
        sums = packed_linear(few, self.plane0, self.scale, None, None, self.bits, self.group, self.middle)
        out = (sums.view(*x.shape[:-1], -1) * step).to(x.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def _signed(self) -> tuple[Tensor, int]:
        """The weights' whole numbers as int8 [o, i], and how many times too large they are."""
        plane = self.plane0
        if self.bits == 8:
            return (plane ^ 128).view(torch.int8), 1
        return nibbles(plane)[:, : self.in_features], 16

    def describe(self) -> Description:
        return {**super().describe(), "input_bits": self.input_bits}
