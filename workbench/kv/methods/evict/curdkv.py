"""CurDKV."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.base import KVMethod, keep_first
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class CurDKV(KVMethod):
    """Keep the rows that a CUR decomposition of keys and values would choose.

    The leverage of a row is taken as its squared length, relative to the sum over its stretch of `stretch` tokens;
    scores are the products of the keys' and the values' (section 3). The first tokens always stay.
    """

    key = "curdkv"
    title = "CurDKV"
    paper = Paper(
        "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
        "Sengupta et al. 2025",
        "2509.15038",
    )
    claim = "up to 9.6 % more accuracy than SnapKV and ChunkKV at aggressive budgets"
    fidelity = Fidelity("deviates", "squared lengths stand for leverage, as in kvpress; no random projection")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, presses/cur_press.py, 8bb29b9", sinks=4, stretch=16, leverage="product",
        ),
    )  # fmt: skip
    default_budget = 0.5

    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    stretch: int = param(16, ge=0, le=8192, unit="tokens", help="tokens that leverage is relative to; 0: all")
    leverage: Literal["keys", "values", "mean", "product"] = param("product", help="whose leverage counts")

    def score(self, layer: LayerTrace) -> Tensor:
        keys, values = (relative(x.float().square().sum(dim=-1), self.stretch) for x in (layer.keys, layer.values))
        found = {"keys": keys, "values": values, "mean": (keys + values) / 2, "product": keys * values}
        return keep_first(found[self.leverage], self.sinks)


def relative(lengths: Tensor, stretch: int) -> Tensor:
    """Numbers [k, n] over the sum of their stretch of so many; 0: of all."""
    tokens = lengths.shape[1]
    width = stretch or tokens
    stretches = pad(lengths, (0, -tokens % width)).unflatten(1, (-1, width))
    found: Tensor = stretches / stretches.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    return found.flatten(1)[:, :tokens]
