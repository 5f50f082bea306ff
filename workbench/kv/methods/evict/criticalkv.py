"""CriticalKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.kv.base import Study
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import places
from workbench.models.output_projection import output_projection
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class CriticalKV(SnapKV):
    """Choose the first half by attention, the rest by what attention and value together write.

    Of the room of a head a `first` share goes to the best scores. The rest goes to the largest product of score and
    length (L1) of what the value becomes in the output projection, averaged over the query heads of a group: it bounds
    how far the attention's output moves (theorem 3.3, algorithm 2). Scores are SnapKV's, or those of any other method
    in the recipe.
    """

    key = "criticalkv"
    title = "CriticalKV"
    paper = Paper(
        "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
        "Feng et al. 2025",
        "2502.03805",
    )
    claim = "half of SnapKV's and Ada-KV's loss of quality on LongBench"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, the authors': presses/criticalkv_press.py, with its SnapKV, 8bb29b9",
            window=64, kernel=5, pooling="avg", first=0.5, epsilon=1e-4,
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(64, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    kernel: int = param(5, ge=1, le=63, odd=True, unit="tokens", help="width of the pooling along the sequence")
    pooling: Literal["avg", "max"] = param("avg", help="how neighbouring scores are pooled")
    first: float = param(0.5, ge=0, le=1, help="share of a head's room that goes by the scores alone")
    epsilon: float = param(1e-4, ge=0, le=1, help="added to the scores before they are weighted")

    def refine(self, study: Study, scores: Tensor, share: float) -> Tensor:
        norms = study.trace.once("criticalkv", lambda: written_norms(study))
        certain = max(int(share * scores.shape[-1] * self.first + 1e-6), 1 if self.first else 0)
        best = places(scores) < certain
        return ((scores + self.epsilon) * norms).masked_fill(best, torch.inf)


def written_norms(study: Study) -> Tensor:
    """L1 norms of what each value adds to its layer's output at full attention, averaged over the query heads of a
    group: float32 [l, k, n]. Raises NotApplicable where the model is not there, or a layer's projection is not known.
    """
    model = study.reader("criticalkv")
    return stacked([_written(layer, model) for layer in study.trace.compressible])


def _written(layer: LayerTrace, model: PreTrainedModel) -> Tensor:
    """The norms [k, n] of one layer."""
    values = layer.values
    weight = output_projection(model, layer.called, layer.heads * values.shape[-1])
    by_head = weight.detach().to(values.dtype).unflatten(1, (layer.heads, -1)).permute(1, 2, 0)  # [h, dv, hidden]
    norms = [
        (values[head // layer.groups] @ by_head[head].to(values.device)).float().abs().sum(dim=-1)
        for head in range(layer.heads)
    ]
    by_kv_head: Tensor = torch.stack(norms).unflatten(0, (layer.kv_heads, -1)).mean(dim=1)
    return by_kv_head
