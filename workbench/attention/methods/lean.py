"""Lean attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext
from workbench.core.partial_softmax import PartialSoftmax
from workbench.registry import Fidelity, Paper, param, register
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised


@register
class Lean(AttentionMethod):
    """Share out decode attention so that all workers have the same work, and join their parts exactly.

    A decode step attends with one query over a long cache, with too few heads to fill a GPU. The tiles of `tile` tokens
    of all heads are laid end to end and cut into runs of equal length, one a worker (stream-K): a run may end in the
    middle of a head and begin in another. Softmax over a part of the keys, rescaled, joins associatively to the whole,
    so the result is exact (section 4). Heads here are KV heads: the queries that share one read its keys together.

    All entries are computed, so there is no budget, and the prompt is read exactly. Here the workers take turns: this
    is the reference of the schedule, which `schedule` gives; what it is for is a kernel.
    """

    key = "lean-attention"
    title = "Lean attention"
    paper = Paper(
        "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
        "Sanovar et al. 2024",
        "2405.10480",
    )
    claim = "2.6 times faster decode attention than FlashAttention-2"
    fidelity = Fidelity("as published", "the schedule, worker after worker; its speed is that of a kernel")
    decodes: ClassVar[bool] = True
    changes_prefill: ClassVar[bool] = False
    softmax_weights: ClassVar[bool] = True
    all_scores: ClassVar[str] = "only shared out"

    workers: int = param(
        8,
        ge=1,
        le=4096,
        help="how many share the work: thread blocks of a GPU",
        own="as many as a GPU runs at once; the result is the same",
    )
    tile: int = param(
        256,
        ge=1,
        le=65536,
        unit="tokens",
        help="the smallest piece of work",
        own="what suits a kernel; the result is the same",
    )

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        context.count_seen(len(query), visible)
        heads, tokens, _ = contents.keys.shape
        rows = query.float() * scoring.scale  # [h, q, d]
        groups = len(query) // heads
        offsets = scoring.offsets(context.positions, contents.positions)  # [k or 1, m]
        if offsets is not None:
            offsets = offsets.expand(heads, -1)
        done: list[PartialSoftmax | None] = [None] * heads
        for run in schedule(heads, tokens, self.tile, self.workers):
            for head, start, stop in run:
                shared = slice(head * groups, (head + 1) * groups)
                part = PartialSoftmax.over(
                    rows[shared],
                    contents.keys[head, None, start:stop],
                    contents.values[head, None, start:stop],
                    scoring.of(shared),
                    hidden=~visible[head, :, start:stop],
                    offsets=None if offsets is None else offsets[head, start:stop],
                )
                before = done[head]
                done[head] = part if before is None else before.merged(part)
        outs = [
            part.output(scoring.of(slice(head * groups, (head + 1) * groups)))
            for head, part in enumerate(done)
            if part is not None
        ]
        return torch.cat(outs).to(query.dtype)


class Piece(NamedTuple):
    """Some entries of one KV head: start .. stop - 1, in whole tiles but for the last of the head."""

    head: int
    start: int
    stop: int


def schedule(heads: int, tokens: int, tile: int, workers: int) -> list[list[Piece]]:
    """Which pieces each worker takes, when each of `heads` KV heads holds `tokens` entries.

    Every worker gets as many tiles as any other, or one less; those that would get none are left out.
    """
    each = -(-tokens // tile)
    total = heads * each
    runs = []
    for worker in range(min(workers, total)):
        low, high = total * worker // min(workers, total), total * (worker + 1) // min(workers, total)
        run = []
        while low < high:
            head, first = divmod(low, each)
            last = min(first + high - low, each)
            run.append(Piece(head, first * tile, min(last * tile, tokens)))
            low += last - first
        runs.append(run)
    return runs
