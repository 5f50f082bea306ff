"""Plain linear layers of which some weights are left out and have to stay zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench_kernels.packing import pack, unpack


class MaskedLinear(nn.Linear):
    """A linear layer with zeros where weights were left out. bitmap: uint8 [o, ceil(i / 8)], which of them stay.

    What a pruning method leaves for a method that comes after it; alone, its weights are held as a `SparseLinear`.
    """

    bitmap: Tensor

    def __init__(self, weight: Tensor, kept: Tensor, bias: nn.Parameter | None = None) -> None:
        """weight: [o, i], zero where kept, bool [o, i], is not."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("bitmap", pack(kept.to(torch.uint8), 1).contiguous())

    @property
    def kept(self) -> Tensor:
        """Which weights stay, bool [o, i]."""
        return unpack(self.bitmap, 1, self.in_features).view(torch.bool)


def kept_of(linear: nn.Linear) -> Tensor | None:
    """Which weights of a layer stay, bool [o, i]; None: all."""
    return linear.kept if isinstance(linear, MaskedLinear) else None
