"""The direction in which a model's queries lie, head by head, whatever it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.progress import Progress
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def query_directions(model: PreTrainedModel, ids: Tensor, progress: Progress) -> dict[int, Tensor]:
    """By layer, the mean over a group's query heads of the first right singular vector of its queries on ids [n],
    turned so that most queries lie on its side: float32 [k, d].
    """
    found = _Directions(progress)
    with torch.inference_mode():
        forward(model, found, ids, torch.arange(len(ids)))
    return found.directions


@dataclass
class _Directions:
    """Exact attention that finds the directions of its queries at every layer."""

    progress: Progress
    directions: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.check()
        first = torch.linalg.svd(query.float(), full_matrices=False).Vh[:, 0]  # [h, d]
        positive = ((query.float() @ first[..., None])[..., 0] > 0).float().mean(dim=1) > 0.5
        first = torch.where(positive[:, None], first, -first)
        self.directions[layer] = first.unflatten(0, (key.shape[0], -1)).mean(dim=1)
        return causal_attention(query, key, value, scoring)
