"""Linear layers of which only a few weights are held, each with its place: what others could not represent."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from workbench.core.precision import checked, half
from workbench.weights.layers.compact import CompactLinear, Description
from workbench.weights.layers.marks import marks, starting
from workbench_kernels.packing import pack
from workbench_kernels.weight import sparse_weight


class OutliersLinear(CompactLinear):
    """A linear layer of which a few weights [o, i] are held, row by row; the others are zero.

    starts: int32 [o + 1], where each row begins among the values. places: int16 (int32 beyond 32,768 columns), the
    column of each value; or, where that is smaller, `map`: uint8 [o, i / 8], one bit for each weight. values: 16-bit
    numbers; or whole numbers as int8, and a float16 `scale` [o] for each row.
    """

    starts: Tensor
    places: Tensor | None
    map: Tensor | None
    values: Tensor
    scale: Tensor | None

    def __init__(
        self, weight: Tensor, chosen: Tensor, bias: nn.Parameter | None = None, *, scale: Tensor | None = None
    ) -> None:
        """weight: [o, i], bfloat16 or anything that float16 holds; chosen: bool [o, i], which of it to hold; scale: of
        each row [o], to hold them as the nearest whole numbers from -127 to 127 (`nearest_eight`).
        """
        super().__init__(weight.shape[1], weight.shape[0], bias)
        counts = chosen.sum(dim=1)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.register_buffer("starts", starts.to(torch.int32))
        self.marks = marks(starts)
        mapped = _map_bytes(*weight.shape) < _place_bytes(weight.shape[1]) * int(starts[-1])
        places = None if mapped else chosen.nonzero()[:, 1].to(_place_type(weight.shape[1]))
        self.register_buffer("places", places)
        self.register_buffer("map", pack(chosen.to(torch.uint8), 1).contiguous().clone() if mapped else None)
        self.register_buffer("scale", None if scale is None else half(scale, "its scales"))
        if scale is None:
            self.register_buffer("values", checked(weight[chosen], _sixteen(weight.dtype), "its outliers"))
        else:
            self.register_buffer("values", nearest_eight(weight, scale[:, None])[chosen].to(torch.int8))

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        values = self.values[self._span(first, last)]
        if self.map is not None:
            starts = self.starts[first : last + 1]
            weight = sparse_weight(self.map[first:last], values, starts, self.in_features, dtype)
        else:
            weight = values.new_zeros(last - first, self.in_features, dtype=dtype)
            weight[self._places(first, last)] = values.to(dtype)
        return weight if self.scale is None else weight.mul_(self.scale[first:last, None].to(dtype))

    def _places(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The row (counted from `first`) and column of each value of some rows, int64."""
        assert self.places is not None
        held, counts = self.places[self._span(first, last)], self.starts[first : last + 1].diff()
        rows = torch.arange(last - first, device=counts.device)
        return rows.repeat_interleave(counts.long(), output_size=held.numel()), held.long()

    def _span(self, first: int, last: int) -> slice:
        """Which of the values are those of some rows."""
        return slice(*(starting(self.starts, self.marks, row) for row in (first, last)))

    def forward(self, x: Tensor) -> Tensor:
        products = x.numel() // self.in_features * self.values.numel()
        if self.map is not None or products > self.in_features * self.out_features:
            return super().forward(x)
        rows, columns = self._places(0, self.out_features)  # cheaper than a weight that is mostly zeros
        wide = torch.promote_types(x.dtype, torch.float32)  # sums of a few at a time, which 16 bits would round again
        values = self.values.to(wide)
        if self.scale is not None:
            values = values * self.scale.to(wide)[rows]
        out = x.new_zeros(*x.shape[:-1], self.out_features, dtype=wide)
        out.index_add_(-1, rows, x.index_select(-1, columns) * values)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)

    def describe(self) -> Description:
        return {**super().describe(), "density": self.values.numel() / (self.in_features * self.out_features)}


def outliers_nbytes(out_features: int, in_features: int, count: int, bits: Literal[8, 16] = 16) -> int:
    """Bytes of an OutliersLinear that holds `count` weights."""
    places = min(_place_bytes(in_features) * count, _map_bytes(out_features, in_features))
    scale = 2 * out_features if bits == 8 else 0
    return 4 * (out_features + 1) + places + count * bits // 8 + scale


def nearest_eight(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest whole numbers from -127 to 127 of a weight, in steps that broadcast with it; float32."""
    return (weight.float() / scale).round_().clamp_(-127, 127)


def _sixteen(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float16


def _place_type(in_features: int) -> torch.dtype:
    return torch.int16 if in_features <= 2**15 else torch.int32


def _place_bytes(in_features: int) -> int:
    return _place_type(in_features).itemsize


def _map_bytes(out_features: int, in_features: int) -> int:
    return out_features * -(-in_features // 8)
