"""HeadKV and HeadKV-R2: room for the heads that retrieve, measured on needle tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from workbench.core.apportion import apportion
from workbench.core.attention_rows import attention_rows
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.errors import NotApplicable
from workbench.examples import needle
from workbench.kv.base import Study
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.models import max_positions
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PAPER = Paper(
    "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning",
    "Fu et al. 2024",
    "2410.19258",
)
_STATEMENT = 12  # ids of a needle that is made without a tokenizer
_CUE = 4  # ids by which such a needle is asked for


@dataclass(frozen=True)
class Task:
    """A haystack with a question and its answer, which stands at `start` too: ids [n], answer [a].

    The ids end with all of the answer but its last token, so that row n - a + i is the one that predicts answer[i].
    """

    ids: Tensor
    start: int
    answer: Tensor


Score = Callable[[Tensor, Task], Tensor]
"""From the rows [h, a, n] that predict a task's answer, the score [h] of each head."""


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
        by_kv_head: Tensor = compressible.unflatten(1, (study.trace.layers[0].kv_heads, -1)).mean(dim=2)
        return by_kv_head

    def _measured(self, study: Study) -> Tensor:
        """How much every query head of the model retrieves, averaged over the tasks, float32 [layers, h] on the CPU."""
        model, tokenizer = study.reader(self.key), study.trace.prompt.tokenizer
        tasks = list(needle_tasks(model, tokenizer, self.tasks, self.task_tokens, reasoning=self.reasoning))
        score = reasoned if self.reasoning else copied
        track = study.progress.track(tasks, "measuring heads on needle tasks", len(tasks))
        return torch.stack([_measure(model, task, score, study.progress) for task in track]).mean(dim=0)

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


def needle_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, tokens: int, *, reasoning: bool
) -> Iterator[Task]:
    """`count` tasks of about `tokens` tokens, their needles spread over the depths; the same for the same model."""
    config = model.config.get_text_config()
    tokens = min(tokens, max_positions(model) * 3 // 4)
    for index in range(count):
        depth = (index + 0.5) / count
        if tokenizer is None:
            yield _of_ids(config.vocab_size, tokens, depth, index, reasoning=reasoning)
        else:
            yield _of_text(tokenizer, tokens, depth, index, reasoning=reasoning)


def _of_text(tokenizer: PreTrainedTokenizerBase, tokens: int, depth: float, seed: int, *, reasoning: bool) -> Task:
    hay = needle(tokens, depth, seed)
    thing = hay.question.removeprefix("What is the secret number of the ").removesuffix("?")
    fact = f"The secret number of the {thing} is {hay.answer}."
    before, after = (part.strip() for part in hay.text.split(fact))
    question = hay.question
    if reasoning:
        other, decoy = random.Random(seed).choice(("bakery", "windmill", "harbour")), 99_999 - int(hay.answer or 0)
        decides = f" The secret number of the {other} is {decoy}. The {thing} is older than the {other}."
        after = f"{decides} {after}"
        question = f"What is the secret number of the older of the two, the {other} or the {thing}?"
    answer = _encoded(tokenizer, f" {fact}")
    opening = _encoded(tokenizer, before)
    rest = _encoded(tokenizer, f" {after.strip()}\n\nQuestion: {question}\nAnswer:")
    ids = torch.cat([opening, answer, rest, answer[:-1]])
    return Task(ids, len(opening), answer)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _of_ids(vocabulary: int, tokens: int, depth: float, seed: int, *, reasoning: bool) -> Task:
    """A needle of random ids behind a cue; for reasoning the question is a link that leads to the cue elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    hay = torch.randint(vocabulary, (tokens,), generator=draw)
    answer = torch.randint(vocabulary, (_STATEMENT,), generator=draw)
    cue, link, decoy_cue = torch.randint(vocabulary, (3, _CUE), generator=draw)
    decoy = torch.randint(vocabulary, (_STATEMENT,), generator=draw)
    cut = int(depth * tokens)
    opening = torch.cat([hay[:cut], cue])
    decides = [decoy_cue, decoy, link, cue] if reasoning else []
    question = link if reasoning else cue
    ids = torch.cat([opening, answer, *decides, hay[cut:], question, answer[:-1]])
    return Task(ids, len(opening), answer)


def _measure(model: PreTrainedModel, task: Task, score: Score, progress: Progress) -> Tensor:
    """The score of every query head on one task, float32 [layers, h] on the CPU."""
    scoring = _ScoredRows(task, score, progress)
    forward(model, scoring, task.ids, torch.arange(task.ids.numel()))
    layers = range(model.config.get_text_config().num_hidden_layers)
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
