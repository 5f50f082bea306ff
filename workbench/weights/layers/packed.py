"""Linear layers at a few bits a weight, with a scale and a zero for each group of columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.precision import half
from workbench.weights.layers.compact import CompactLinear, Description
from workbench_kernels.dispatch import learning, on_gpu
from workbench_kernels.packed_linear import fits, packed_linear
from workbench_kernels.packing import pack
from workbench_kernels.weight import packed_codes, packed_weight, scaled_weight

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # how many bits lie in which buffer


class PackedLinear(CompactLinear):
    """A linear layer with its weight [o, i] at 1 to 8 bits: weight = (code - zero) * scale.

    plane0, plane1: uint8, the lowest bits of the codes and, at 3, 5 and 6 bits, the rest, packed row by row as
    `workbench_kernels.packing` does. scale: float16 [o, g], one for each `group` neighbouring columns; the last group
    of a row may be shorter. zero: [o, g], whole numbers as uint8 or any as float16; None where it is 2 ** (bits - 1)
    everywhere, or, at 1 bit, 0.5: both levels are equally far from zero. columns: float16 [i], by which a weight's
    columns are multiplied besides; None: 1.
    """

    plane0: Tensor
    scale: Tensor
    zero: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        bias: nn.Parameter | None = None,
        *,
        group: int | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """codes: uint8 [o, i], below 2 ** bits; scale, zero: [o, g]; group: columns that share one (default: i / g)."""
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.bits = bits
        self.group = group or codes.shape[1] // scale.shape[1]
        if -(-self.in_features // self.group) != scale.shape[1]:
            raise ValueError(f"{scale.shape[1]} scales a row for {self.in_features} columns in groups of {self.group}")
        below = 0
        for index, width in enumerate(PLANES[bits]):
            self.register_buffer(f"plane{index}", pack(codes >> below & 2**width - 1, width).contiguous().clone())
            below += width
        self.register_buffer("scale", half(scale, "its scales"))
        self.register_buffer("zero", _zeros(zero))
        self.register_buffer("columns", None if columns is None else half(columns, "the factors of its columns"))

    def planes(self, first: int = 0, last: int | None = None) -> list[Tensor]:
        """The packed bytes of some outputs (default: of all), uint8 [last - first, b] each."""
        return [getattr(self, f"plane{index}")[first:last] for index in range(len(PLANES[self.bits]))]

    def codes(self, first: int = 0, last: int | None = None) -> Tensor:
        """The codes of some outputs (default: of all), uint8 [last - first, i]."""
        return packed_codes(self.planes(first, last), PLANES[self.bits], self.in_features)

    def numbers(self, first: int, last: int) -> Tensor:
        """What the codes of some outputs stand for before zeros and scales: [last - first, i], the codes themselves."""
        return self.codes(first, last)

    @property
    def plain(self) -> bool:
        """Whether codes stand for themselves."""
        return type(self).numbers is PackedLinear.numbers

    @property
    def middle(self) -> float:
        """What is taken off these numbers where there are no zeros."""
        return 2.0 ** (self.bits - 1) if self.bits > 1 else 0.5

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        zero = None if self.zero is None else self.zero[first:last]
        scale, columns, group, middle = self.scale[first:last], self.columns, self.group, self.middle
        if not self.plain:
            return scaled_weight(self.numbers(first, last), scale, zero, columns, group, middle, dtype)
        planes, widths = self.planes(first, last), PLANES[self.bits]
        return packed_weight(planes, widths, scale, zero, columns, group, middle, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if not self._read_as_it_lies(flat):
            return super().forward(x)
        out = packed_linear(flat, self.plane0, self.scale, self.zero, self.columns, self.bits, self.group, self.middle)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out.add_(self.bias)

    def _read_as_it_lies(self, x: Tensor) -> bool:
        """Whether a GPU's kernel multiplies x [n, i] with the packed codes: no weight is made float then."""
        single = self.plain and len(PLANES[self.bits]) == 1
        return single and not learning(x) and on_gpu(x, self.plane0) and fits(x, self.plane0, self.bits, self.group)

    def describe(self) -> Description:
        return {**super().describe(), "code_bits": self.bits, "group": self.group}


def _zeros(zero: Tensor | None) -> Tensor | None:
    if zero is None or zero.dtype == torch.uint8:
        return None if zero is None else zero.clone(memory_format=torch.contiguous_format)
    return half(zero, "its zeros")


def packed_nbytes(
    out_features: int, in_features: int, bits: int, group: int, *, zero_bytes: int = 2, columns: bool = False
) -> int:
    """Bytes of a PackedLinear: codes, scales, zeros of `zero_bytes` (2: float16, 1: uint8, 0: none), and `columns`."""
    codes = sum(-(-in_features * width // 8) for width in PLANES[bits])
    return out_features * (codes + -(-in_features // group) * (2 + zero_bytes)) + 2 * in_features * columns
