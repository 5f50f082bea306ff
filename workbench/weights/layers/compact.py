"""What all linear layers with small weights have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.measure.memory import tensor_bytes

_TILE = 32 << 20  # bytes of weights made float at a time: a whole layer of a small model, a slice of a large one's
Description = dict[str, float | str]
"""What was chosen for a layer, for tables."""

MARK = 256  # slices begin at multiples of so many rows, wherever they are as tall


class CompactLinear(nn.Module):
    """A linear layer whose weight [o, i] is held in some smaller form, and made float only while it is used.

    A subclass holds its tensors as buffers, and says in `rows` what they stand for. bias: the original's own, shared,
    which is why `nbytes` leaves it out.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The weights of the outputs `first` to before `last`: [last - first, i]."""
        raise NotImplementedError

    def describe(self) -> Description:
        """What was chosen for this layer, for tables: `bits` (of each weight, on average, everything counted) and,
        where they apply, `rank` and `density` (share of the weights that are not zero).
        """
        return {"bits": 8 * self.nbytes / (self.in_features * self.out_features)}

    @property
    def nbytes(self) -> int:
        """Live bytes of everything that stands for the weight."""
        return tensor_bytes(self.buffers())

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [o, i] that is stood for."""
        return self.rows(0, self.out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        tall = max(_TILE // (self.in_features * x.element_size()), 16)
        tall = tall // MARK * MARK or tall
        if tall >= self.out_features:
            return linear(x, self.rows(0, self.out_features, x.dtype), self.bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for first in range(0, self.out_features, tall):
            last = min(first + tall, self.out_features)
            bias = None if self.bias is None else self.bias[first:last]
            out[..., first:last] = linear(x, self.rows(first, last, x.dtype), bias)
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.describe()['bits']:.3g} bits"
