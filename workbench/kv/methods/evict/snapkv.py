"""SnapKV."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from workbench.kv.base import KVMethod, keep_last
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class SnapKV(KVMethod):
    """Keep what the prompt's last tokens attend to.

    Scores are the attention of the last `window` queries, averaged over the queries of a KV group and pooled along the
    sequence so that neighbours survive together; the window itself always stays.
    """

    key = "snapkv"
    title = "SnapKV"
    paper = Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "Li et al. 2024", "2404.14469")
    claim = "1,024 tokens of 16k keep LongBench quality"
    fidelity = Fidelity("as published")
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "longbench",
            "FasterDecoding/SnapKV, experiments/LongBench/config/ablation_c1024_w32_k7_maxpool.json, e216ddc",
            window=32, kernel=7, pooling="max",
        ),
        Preset(
            "code", "FasterDecoding/SnapKV, snapkv/monkeypatch/snapkv_utils.py, e216ddc",
            window=32, kernel=5, pooling="avg",
        ),
        Preset(
            "kvcache-factory", "Zefan-Cai/KVCache-Factory, run_longbench.py, c97f9d7",
            window=8, kernel=7, pooling="max",
        ),
        Preset(
            "kvpress", "NVIDIA/kvpress, presses/snapkv_press.py, 8bb29b9",
            window=64, kernel=5, pooling="avg",
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(32, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    kernel: int = param(7, ge=1, le=63, odd=True, unit="tokens", help="width of the pooling along the sequence")
    pooling: Literal["avg", "max"] = param("max", help="how neighbouring scores are pooled")

    def score(self, layer: LayerTrace) -> Tensor:
        votes = layer.attention(last=self.window).mean(dim=(1, 2))  # [k, n]
        votes[:, -self.window :] = 0  # the window stays anyway, and must not leak into its neighbours' pools
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        return keep_last(pool(votes, self.kernel, stride=1, padding=self.kernel // 2), self.window)
