"""The attention maps of all layers and heads of a model as one tensor, to look at side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench import arguments
from workbench.formatting import Brief
from workbench.measure.attention import PooledMap, Pooling, same_cells


@dataclass(frozen=True, eq=False, repr=False)
class GridOfMaps(Brief):
    """One pooled map a layer and query head, all on the same cells; see `PooledMap` for what a cell stands for."""

    values: Tensor
    """[l, h, rows, cols] float32, on the CPU"""
    row_edges: Tensor
    """[rows + 1] int64 positions"""
    col_edges: Tensor
    """[cols + 1] int64 positions"""
    pooling: Pooling
    numbers: tuple[int, ...] = ()
    """what the model calls the layers; empty: as they are counted, from 0"""

    @classmethod
    def of(cls, layers: Sequence[Sequence[PooledMap]], numbers: Sequence[int] = ()) -> GridOfMaps:
        """The grid of maps [l][h] with the same cells; numbers: those of the layers."""
        first = layers[0][0]
        for layer in layers:
            same_cells(first, layer[0])
        values = torch.stack([torch.stack([each.values for each in layer]) for layer in layers])
        return cls(values, first.row_edges, first.col_edges, first.pooling, tuple(numbers))

    def map(self, layer: int, head: int) -> PooledMap:
        """One of the maps, by the layer's number. Raises BadParameter where there is no such layer or head."""
        layers, heads = self.values.shape[:2]
        if self.numbers not in ((), tuple(range(layers))):
            layer = self.numbers.index(arguments.choice("layer", layer, self.numbers))
        layer = arguments.index("layer", layer, layers, "the maps' layers")
        head = arguments.index("head", head, heads, "the maps' query heads")
        return PooledMap(self.values[layer, head], self.row_edges, self.col_edges, self.pooling)

    def minus(self, other: GridOfMaps) -> GridOfMaps:
        """The differences of all maps, as in `PooledMap.minus`."""
        same_cells(self, other)
        return replace(self, values=self.values - other.values)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: pooling, row_edges, col_edges, and values as nested lists [l][h][rows][cols]."""
        return {
            "pooling": self.pooling,
            "row_edges": self.row_edges.tolist(),
            "col_edges": self.col_edges.tolist(),
            "values": self.values.tolist(),
        }
