"""HeadKV and HeadKV-R2: room for the heads that retrieve, measured on needle tasks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from workbench.core.apportion import apportion
from workbench.kv.base import Study
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.needle_tasks import needle_tasks
from workbench.kv.ranking import Ranking
from workbench.kv.retrieval_heads import copied, measured, reasoned
from workbench.registry import Fidelity, Paper, Preset, param, register

_PAPER = Paper(
    "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning",
    "Fu et al. 2024",
    "2410.19258",
)


class MeasuredHeads(SnapKV):
    """What HeadKV and HeadKV-R2 share: the measurement and the division; they differ in task and score."""

    fidelity = Fidelity("deviates", "heads are measured on short tasks of our own, with the answer given")
    presets = (
        Preset(
            "longbench", "FYYFU/HeadKV, run_longbench.py, 0862a09",
            window=8, kernel=7, pooling="max", beta=1.5,
        ),
        Preset(
            "kvcache-factory", "Zefan-Cai/KVCache-Factory, run_longbench.py, c97f9d7",
            window=8, kernel=7, pooling="max", beta=1.01,
        ),
    )  # fmt: skip
    head_adaptive = True
    reasoning: ClassVar[bool]

    window: int = param(8, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    beta: float = param(1.5, ge=1, le=10, help="an equal split, divided by this, goes into the pool that heads share")
    tasks: int = param(
        6, ge=1, le=100, help="needle tasks by which the model's heads are measured, once",
        own="the authors measure at 5 lengths and 10 depths, once for all; here a session waits for it",
    )  # fmt: skip
    task_tokens: int = param(
        320, ge=64, le=8192, unit="tokens", help="about how long each needle task is",
        own="the authors measure on 1,000 to 10,000 tokens, which models with a short context cannot read",
    )  # fmt: skip

    def importance(self, study: Study) -> Tensor:
        """How much each head of the compressible layers retrieves, averaged over the tasks, float32 [l, k]."""
        study.reader(self.key)  # refuses a trace without a model
        key = (self.reasoning, self.tasks, self.task_tokens, study.trace.prompt.tokenizer is None)
        importance = study.of_model.once(("retrieval heads", *key), lambda: self._measured(study))
        compressible = importance[[layer.index for layer in study.trace.compressible]]  # [l, h]
        by_kv_head: Tensor = compressible.unflatten(1, (study.trace.kv_heads, -1)).mean(dim=2)
        return by_kv_head

    def _measured(self, study: Study) -> Tensor:
        """How much every query head of the model retrieves, averaged over the tasks, float32 [layers, h] on the CPU."""
        model, tokenizer = study.reader(self.key), study.trace.prompt.tokenizer
        tasks = list(needle_tasks(model, tokenizer, self.tasks, self.task_tokens, reasoning=self.reasoning))
        score = reasoned if self.reasoning else copied
        track = study.progress.track(tasks, "measuring heads on needle tasks", len(tasks))
        return torch.stack([measured(model, task, score, study.progress) for task in track]).mean(dim=0)

    def shared(self, ranking: Ranking, entries: int) -> Tensor:
        """Beyond the window, a part of the equal split is certain and the pool goes by importance (section 3.2)."""
        heads, window = ranking.layers * ranking.kv_heads, min(self.window, ranking.tokens)
        beyond = min(entries, heads * ranking.tokens) - heads * window
        if beyond <= 0 or ranking.importance is None:
            return super().allocate(ranking, entries)
        certain = int(beyond * (1 - 1 / self.beta)) // heads
        most = torch.full_like(ranking.importance, ranking.tokens - window - certain, dtype=torch.int64)
        return window + certain + apportion(beyond - heads * certain, ranking.importance, most)


@register
class HeadKV(MeasuredHeads):
    """Give each head room by how often it copies the answer of needle tasks.

    A head scores 1 / a for each of the answer's a tokens where its largest attention weight lies on that very token in
    the needle (section 3.1, after Wu et al. 2024). Every head keeps the window and an equal part b - b / beta; the
    rest, b / beta of each head, is one pool that heads share by their scores (section 3.2). What a head keeps is
    SnapKV's choice.

    Chosen here: answers are given to the model, not generated, so small models are measured too; tasks come from the
    packaged haystack, or are made of random ids for a session without a tokenizer; query heads of a KV head are
    averaged; what exceeds the prompt goes to the other heads. Measured once for each model of a session, in `tasks`
    readings of `task_tokens` each.
    """

    key = "headkv"
    title = "HeadKV"
    paper = _PAPER
    claim = "1.5 % of the cache keeps 97 % of full question answering (with R2)"
    default_budget = 0.5
    reasoning = False

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        return self.shared(ranking, entries)


@register
class HeadKVR2(MeasuredHeads):
    """HeadKV whose tasks need a step of reasoning, and whose score counts all attention paid to the right answer.

    Of two statements a third decides which one answers the question. A head scores, for each token of the answer, the
    attention among its a largest weights that lies on the right statement, over a (section 3.1): reasoning
    heads look at the answer without being about to copy it. Division and choices are HeadKV's.
    """

    key = "headkv-r2"
    title = "HeadKV-R2"
    paper = _PAPER
    claim = "1.5 % of the cache keeps 97 % of full question answering"
    default_budget = 0.5
    reasoning = True

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        return self.shared(ranking, entries)
