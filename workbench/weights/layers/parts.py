"""A layer as the sum of several: few bits for most of a weight, more for what is salient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.weights.layers.compact import CompactLinear, Description


class Parts(CompactLinear):
    """The sum of what several layers make of the same input, or each of some of its columns.

    parts: layers without a bias. columns: for each part which columns of the input it takes, ascending int [i_p], or
    None for all of them. Held as int16 where they fit.
    """

    def __init__(
        self,
        parts: Sequence[CompactLinear],
        columns: Sequence[Tensor | None],
        in_features: int,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(in_features, parts[0].out_features, bias)
        for part, chosen in zip(parts, columns, strict=True):
            wanted = in_features if chosen is None else chosen.numel()
            if part.in_features != wanted or part.out_features != self.out_features or part.bias is not None:
                raise ValueError(
                    f"a part of {part.in_features} columns with bias {part.bias is not None} cannot be added"
                )
        self.parts = nn.ModuleList(parts)
        dtype = torch.int16 if in_features <= 2**15 else torch.int32
        for index, chosen in enumerate(columns):
            self.register_buffer(f"columns{index}", None if chosen is None else chosen.to(dtype, copy=True))

    def chosen(self, index: int) -> Tensor | None:
        """Which columns a part takes, int64; None: all."""
        columns: Tensor | None = getattr(self, f"columns{index}")
        return None if columns is None else columns.long()

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        weight: Tensor | None = None
        for index, part in enumerate(self.parts):
            assert isinstance(part, CompactLinear)
            part_weight, chosen = part.rows(first, last, dtype), self.chosen(index)
            if chosen is not None:
                part_weight = part_weight.new_zeros(last - first, self.in_features).index_add_(1, chosen, part_weight)
            weight = part_weight if weight is None else weight.add_(part_weight)
        assert weight is not None
        return weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | None = None
        for index, part in enumerate(self.parts):
            chosen = self.chosen(index)
            part_out = part(x if chosen is None else x.index_select(-1, chosen))
            out = part_out if out is None else out.add_(part_out)
        assert out is not None
        return out if self.bias is None else out.add_(self.bias)

    def describe(self) -> Description:
        kinds = [type(part).__name__.removesuffix("Linear").lower() for part in self.parts]
        return {**super().describe(), "parts": " + ".join(kinds)}
