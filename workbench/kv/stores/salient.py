"""Two tiers, both quantised: more bits for salient tokens than for the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import Format, Shape, index_nbytes
from workbench.kv.stores.frozen import ChannelRows, FrozenStore, bitmap_nbytes
from workbench.kv.stores.packed import PackedRows
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace

_HALF = 2  # scales, zeros and channel factors are float16


@dataclass(frozen=True)
class SalientFormat(Format):
    """Selected entries at `high` bits, all others at `low`; tokens that come while decoding at `dtype`.

    Within a tier the keys of a head have a scale and zero for each channel; values have them for each token, after
    each channel was divided by the root of its largest magnitude (channel-separable token-wise).
    """

    dtype: torch.dtype
    high: int
    low: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{self.high}-bit", f"{self.low}-bit")

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        return self._tier(shape, selected, self.high) + self._tier(shape, shape.tokens - selected, self.low)

    def _tier(self, shape: Shape, counts: Tensor, bits: int) -> int:
        counts = counts[(counts > 0).any(dim=1)]  # a tier that is empty in a layer has no tensors there
        entries, heads = int(counts.sum()), counts.numel()
        keys = entries * -(-shape.key_width * bits // 8) + heads * 2 * _HALF * shape.key_width
        values = entries * (-(-shape.value_width * bits // 8) + 2 * _HALF) + heads * _HALF * shape.value_width
        return keys + values + 4 * index_nbytes(counts) + bitmap_nbytes(counts, shape.tokens)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        nothing = torch.zeros_like(tiers, dtype=torch.bool)
        parts: list[Store] = [DenseStore.where(layer.keys, layer.values, nothing, self.dtype)]
        for tier, bits in ((1, self.high), (2, self.low)):
            keep = tiers == tier
            if bool(keep.any()):
                parts.append(FrozenStore.where(*self._quantised(layer, keep, bits), keep))
        return SplitStore(tuple(parts))

    def _quantised(self, layer: LayerTrace, keep: Tensor, bits: int) -> tuple[ChannelRows, PackedRows]:
        lengths = keep.sum(dim=1)
        keys, values = layer.keys.float(), layer.values.float()
        factors = channel_factors(values, keep)
        return (
            ChannelRows.of(keys[keep], lengths, bits),
            PackedRows.of(values[keep], lengths, bits, values.shape[-1], "token", factors),
        )


def channel_factors(values: Tensor, keep: Tensor) -> Tensor:
    """1 / sqrt(max |value|) of each channel over the values [k, n, d] at which keep [k, n] is True, float16 [k, d]."""
    largest = values.float().abs().mul(keep[..., None]).amax(dim=1)
    return torch.where(largest > 0, largest.rsqrt(), 1.0).clamp(2.0**-14, 2.0**14).to(torch.float16)
