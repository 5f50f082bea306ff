"""ChunkKV."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.base import Study
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class ChunkKV(SnapKV):
    """Keep whole chunks of neighbouring tokens, the same of all heads of a layer.

    A chunk is worth the mean of its tokens' scores, summed over the heads (algorithm 1); the best chunks stay whole.
    The last chunk for which there is room stays in part, its end, so that a budget is met to the token. Scores are
    SnapKV's, or those of any other method in the recipe.
    """

    key = "chunkkv"
    title = "ChunkKV"
    paper = Paper(
        "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
        "Liu et al. 2025",
        "2502.00299",
    )
    claim = "up to 8.7 % more precision than token by token at the same size"
    fidelity = Fidelity("deviates", "layers do not take over the chunks of the one before them, which saves time alone")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, by an author: presses/chunkkv_press.py and snapkv_press.py, 8bb29b9",
            window=64, kernel=5, pooling="avg", chunk=20,
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(64, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    kernel: int = param(5, ge=1, le=63, odd=True, unit="tokens", help="width of the pooling along the sequence")
    pooling: Literal["avg", "max"] = param("avg", help="how neighbouring scores are pooled")
    chunk: int = param(20, ge=1, le=1024, unit="tokens", help="length of the chunks that stay or go together")

    def refine(self, study: Study, scores: Tensor, share: float) -> Tensor:
        return by_chunks(scores, self.chunk)


def by_chunks(scores: Tensor, chunk: int) -> Tensor:
    """Scores [l, k, n] as the mean over the chunk of each position, summed over heads: the same for all heads."""
    tokens = scores.shape[-1]
    together = scores.sum(dim=1, keepdim=True)
    missing = -tokens % chunk
    lengths = pad(together.new_ones(tokens), (0, missing)).view(-1, chunk).sum(dim=-1)
    means = pad(together, (0, missing)).unflatten(-1, (-1, chunk)).sum(dim=-1) / lengths
    found: Tensor = means.repeat_interleave(chunk, dim=-1)[..., :tokens].expand_as(scores)
    return found
