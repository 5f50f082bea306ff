"""Which positions each layer and KV head keeps, and how precisely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from workbench.errors import BadParameter
from workbench_widgets.views import pictures
from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.pooling import pool_tiers
from workbench_widgets.views.view import View
from workbench_widgets.views.wire import pack


class KeptRaster(View):
    """A raster with a row for each layer and KV head and a column for each position, coloured by precision tier.

    Click or press Enter to set `selected` to (layer, head). `marked` draws a line at a position, for instance at the
    token selected in a `TokenText`.
    """

    module: ClassVar[str] = "kept_raster.js"
    kept: bytes = b""  # uint8 [layers * heads, n] tiers, or [2, layers * heads, pixels]: main tier and share kept
    layers: int = 0
    numbers: list[int]  # what the model calls these layers; empty: as they are counted
    heads: int = 0
    positions: int = 0
    tiers: list[str]
    tokens: list[str]
    label: str = "Kept positions"
    selected: tuple[int, int] | None = None
    marked: int | None = None

    @classmethod
    def drawings(cls, fields: Mapping[str, Any]) -> Sequence[Drawing]:
        return [pictures.kept(fields)]

    @classmethod
    def data(
        cls,
        kept: ArrayLike,
        *,
        tiers: Sequence[str] = ("dropped", "kept"),
        tokens: Sequence[str] = (),
        numbers: Sequence[int] = (),
        pixels: int = 8192,
    ) -> dict[str, object]:
        """Field values from `kept` [layers, heads, n]: bool, or for each cell its index into `tiers` (0 is dropped).

        numbers: what the layers are called, where the model has others too. Beyond `pixels` positions, columns are
        pooled: a pixel shows the most frequent tier, as strong as the share kept. Raises `BadParameter` for other
        shapes and for tiers that have no name.
        """
        cells = np.asarray(kept)
        if cells.ndim != 3 or cells.dtype.kind not in "biu":
            raise BadParameter(
                f"KeptRaster: kept must be bool or integer [layers, heads, positions], not {cells.dtype} {cells.shape}"
            )
        if cells.size and not (cells.min() >= 0 and cells.max() < len(tiers)):
            raise BadParameter(
                f"KeptRaster: kept holds values beyond 0..{len(tiers) - 1}, the places in tiers {list(tiers)}"
            )
        layers, heads, n = cells.shape
        grid = cells.reshape(layers * heads, n).astype(np.uint8)
        return {
            "kept": pack(grid if n <= pixels else pool_tiers(grid, pixels)),
            "layers": layers,
            "numbers": list(numbers),
            "heads": heads,
            "positions": n,
            "tiers": list(tiers),
            "tokens": [str(token) for token in tokens],
        }
