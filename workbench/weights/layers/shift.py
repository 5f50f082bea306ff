"""Linear layers whose weights are signed powers of two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.weights.layers.packed import PackedLinear


class ShiftLinear(PackedLinear):
    """A packed linear layer whose codes stand for signs and shifts: weight = ± 2 ** -shift * scale, never zero.

    The highest bit of a code is the sign (1: negative), the others are the shift. Within a group, a processor would
    shift and add inputs, and multiply once; here powers are looked up and multiplied as floating point.
    """

    middle = 0.0

    def __init__(
        self, codes: Tensor, scale: Tensor, bits: int, bias: nn.Parameter | None = None, *, group: int | None = None
    ) -> None:
        """codes: uint8 [o, i], below 2 ** bits; scale: [o, g]; group: columns that share one (default: i / g)."""
        super().__init__(codes, scale, None, bits, bias, group=group)

    def numbers(self, first: int, last: int) -> Tensor:
        table = powers(self.bits, self.scale.device)
        return table.index_select(0, self.codes(first, last).flatten().int()).view(-1, self.in_features)


def powers(bits: int, device: torch.device | None = None) -> Tensor:
    """What each code of so many bits stands for, float32 [2 ** bits]."""
    sizes = torch.exp2(-torch.arange(2 ** (bits - 1), dtype=torch.float32, device=device))
    return torch.cat([sizes, -sizes])
