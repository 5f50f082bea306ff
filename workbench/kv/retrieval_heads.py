"""How much each head of a model retrieves, by the attention from which it predicts the answers of needle tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.core.attention_rows import attention_rows
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.engine.states import attending
from workbench.errors import NotApplicable
from workbench.kv.needle_tasks import Task
from workbench.progress import Progress
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[Tensor, Task], Tensor]
"""From the rows [h, a, n] that predict a task's answer, the score [h] of each head."""


def copied(rows: Tensor, task: Task) -> Tensor:
    """The share of the answer's tokens that each head is about to copy: rows [h, a, n] -> [h]."""
    best = rows.argmax(dim=-1)  # [h, a]
    ids = task.ids.to(rows.device)
    inside = (best >= task.start) & (best < task.start + len(task.answer))
    return (inside & (ids[best] == task.answer.to(rows.device))).float().mean(dim=1)


def reasoned(rows: Tensor, task: Task) -> Tensor:
    """The attention on the answer's place among each row's a largest weights, over a: rows [h, a, n] -> [h]."""
    count = len(task.answer)
    weights, places = rows.topk(count, dim=-1)  # [h, a, a]
    inside = (places >= task.start) & (places < task.start + count)
    return (weights * inside).sum(dim=(1, 2)) / count


def measured(model: PreTrainedModel, task: Task, score: Score, progress: Progress) -> Tensor:
    """The score of every query head on one task, float32 [layers, h] on the CPU."""
    scoring = _ScoredRows(task, score, progress)
    forward(model, scoring, task.ids, torch.arange(task.ids.numel()))
    layers = range(len(attending(model)))
    if sorted(scoring.scores) != list(layers):
        raise NotApplicable("the model has layers without attention heads that could be measured")
    return torch.stack([scoring.scores[layer] for layer in layers])


@dataclass
class _ScoredRows:
    """Exact attention that scores, at every layer, the rows from which the answer is predicted: [h] by layer."""

    task: Task
    score: Score
    progress: Progress
    scores: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.check()
        last = query[:, -len(self.task.answer) :]
        rows = [block for _, block in attention_rows(last, key, scoring)]
        self.scores[layer] = self.score(torch.cat(rows, dim=1), self.task).cpu()
        return causal_attention(query, key, value, scoring)
