"""Which tasks at which lengths, and batches of them made by other processes while the model trains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.corpus import KINDS, Corpus
from training.tasks import (
    Sources,
    Task,
    arithmetic,
    copying,
    document,
    lookups,
    needles,
    needles_in_documents,
    variables,
)


@dataclass(frozen=True)
class Stage:
    """A part of the training: until which share of its time, at which lengths (with weights), with which tasks."""

    until: float
    lengths: dict[int, float]
    shares: dict[Task, float]


_SHARES: dict[Task, float] = {
    document: 0.3,
    needles: 0.24,
    needles_in_documents: 0.14,
    lookups: 0.12,
    copying: 0.08,
    variables: 0.08,
    arithmetic: 0.04,
}
# Heads that copy and retrieve appear sooner on short rows, where what is looked for is near; then they learn to reach.
CURRICULUM = (
    Stage(0.2, {256: 1.0}, {**_SHARES, copying: 0.15}),
    Stage(0.45, {256: 0.2, 512: 0.4, 1024: 0.4}, _SHARES),
    Stage(1.0, {512: 0.15, 1024: 0.15, 2048: 0.7}, _SHARES),
)


def stage_at(share: float) -> int:
    """The index of the stage at this share of the time."""
    return next((index for index, stage in enumerate(CURRICULUM) if share < stage.until), len(CURRICULUM) - 1)


def make_batch(draw: random.Random, stage: Stage, tokens: int, sources: Sources) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint16, worth uint8), each [b, n]: rows of one length, as many as make `tokens`."""
    length = draw.choices(list(stage.lengths), weights=list(stage.lengths.values()))[0]
    tasks = draw.choices(list(stage.shares), weights=list(stage.shares.values()), k=max(1, tokens // length))
    rows = [task(draw, length, sources).filled(length) for task in tasks]
    return np.stack([ids for ids, _ in rows]), np.stack([worth for _, worth in rows])


class _Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without end; every worker draws its own."""

    def __init__(self, corpus: Corpus, stage: Any, tokens: int, seed: int) -> None:
        self.corpus, self.stage, self.tokens, self.seed = corpus, stage, tokens, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        draw = random.Random(f"{self.seed} {worker.id if worker else 0}")
        sources = Sources(self.corpus.tokenizer, {kind: self.corpus.tokens(kind) for kind in KINDS})
        while True:
            ids, worth = make_batch(draw, CURRICULUM[self.stage.value], self.tokens, sources)
            yield torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(worth)


class Batches:
    """Batches without end from `workers` processes (0: in this one); `stage` is set by whoever trains."""

    def __init__(self, corpus: Corpus, tokens: int, seed: int, workers: int, pinned: bool) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._stage = context.Value("i", 0, lock=False)
        more: dict[str, Any] = {"multiprocessing_context": "spawn", "prefetch_factor": 4} if workers else {}
        self._loader = torch.utils.data.DataLoader(
            _Stream(corpus, self._stage, tokens, seed), batch_size=None, num_workers=workers, pin_memory=pinned, **more
        )

    @property
    def stage(self) -> int:
        return int(self._stage.value)

    @stage.setter
    def stage(self, value: int) -> None:
        self._stage.value = value

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids int32, worth uint8), each [b, n]."""
        return iter(self._loader)
