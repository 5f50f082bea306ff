"""ALISA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from workbench.kv.base import Study
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.eight_bit import EightBitOffloadFormat
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, index_nbytes
from workbench.kv.stores.offload import Index, OffloadFormat, Retriever
from workbench.kv.stores.recomputed import Recomputer, Recomputing
from workbench.kv.stores.rows import Rows
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace, Trace

_SUM_BYTES = 2  # attention is remembered as float16
_BLOCK = 256  # positions for which room is made at once


@register
class ALISA(SinksAndRecent):
    """Keep the newest tokens on the device; of the others fetch those that drew most attention in the last steps.

    Sparse window attention (section IV-B, algorithm 1): a step attends to k locally static tokens, the newest, and
    to as many globally dynamic ones, those with the largest sum of attention weights over the latest steps and all
    heads of the layer. Weights of tokens that a step did not attend to count as 0, so one that is left out for all
    the steps of the sum comes back only where fewer than k were not. The k newest are on the device, all others in
    host memory, from where the k dynamic ones are copied at each step (phase II of section V-A). So the budget is
    about half of the paper's caching ratio, at the bits the cache is stored at.

    Everything is stored at 8 bits (section V-B), unless all of it fits as it is. The paper rounds channel by channel;
    here each key and value has a scale and zero of its own, so that tokens can move one by one.

    Sums are over the last k steps, which takes k numbers of each token, or over `steps`; they live in host memory, and
    before the first step they are those of the prompt's last queries. Up to 16 tokens that are read together choose
    together.

    Phase III: of the entries in host memory the oldest, a share `recompute`, are deleted, and where a step chooses one
    the model reads the prompt's first tokens again for their keys and values. They come out as they were, so that this
    saves host memory, costs time and changes no result. The paper finds the share, and the step from which on it
    deletes, from times that it measured of its machine; here the share is given and holds from the first step.
    """

    key = "alisa"
    title = "ALISA"
    paper = Paper(
        "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
        "Zhao et al. 2024",
        "2403.17312",
    )
    claim = "up to 3 times FlexGen's throughput, with 80 % of the entries left out of each step"
    default_budget = 0.25
    fidelity = Fidelity(
        "deviates", "scales of a token in place of a channel; when to recompute is given, not solved for"
    )
    presets = (Preset("paper", "algorithm 1 and section V-B", sinks=0, steps=0, bits=8),)

    sinks: int = param(0, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    steps: int = param(0, ge=0, le=1024, help="latest steps whose attention is summed up, at most k; 0: k")
    bits: Literal[8, 16] = param(8, help="bits of each stored number; 16: the cache's own precision")
    recompute: float = param(
        0.0,
        ge=0,
        le=0.9,
        help="part of what would lie in host memory, the oldest, that is computed again instead",
        own="the paper solves for it with its machine's times; at 0 it is its phase II, which gives the same answers",
    )

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is not None and sum(shape.full_nbytes for shape in shapes) <= limit:
            return DenseFormat(dtype)
        index = RecentAttentionIndex(self.steps, study.trace)
        kind = EightBitOffloadFormat if self.bits == 8 else OffloadFormat
        again = None
        if self.recompute:
            again = Recomputing(self.recompute, Recomputer(study.reader(self.key), study.trace.ids))
        return kind(dtype, index, self.sinks, recomputing=again)


@dataclass(frozen=True)
class RecentAttentionIndex(Index):
    """Entries by the attention that their positions received in the latest steps; all of it lies in host memory.

    steps: how many, at most as many as entries of a head are near; 0: as many as these.
    """

    steps: int
    trace: Trace = field(compare=False, repr=False)

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        return 0

    def host_nbytes(self, shape: Shape, others: Tensor) -> int:
        steps = (shape.tokens - others).amax(dim=1).clamp(1, self.steps or shape.tokens)  # [l]
        sums = int(steps.sum()) * shape.tokens * _SUM_BYTES
        return sums + int(others.sum()) * INDEX_BYTES + index_nbytes(others)

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        near = others.shape[1] - others.sum(dim=1)  # [k]
        steps = min(self.steps or layer.tokens, max(int(near.max()), 1))
        rows = self.trace.once(("recent attention", layer.index, steps), lambda: self._rows(layer, steps))
        where = torch.arange(others.shape[1]).expand(others.shape[0], -1)[..., None]
        positions = Rows.where(where, others.cpu(), torch.int32)
        return RecentAttention(rows.clone(), positions, tuple(near.tolist()))

    def _rows(self, layer: LayerTrace, steps: int) -> Tensor:
        """What each of the prompt's last queries gave, summed over heads, float16 [steps, n] in host memory."""
        rows = layer.attention(min(steps, layer.tokens)).sum(dim=(0, 1))
        return rows.to("cpu", torch.float16)


class RecentAttention(Retriever):
    """What each of the latest steps gave to each position, and the positions of what is in host memory.

    rows: float16 [steps, p] with room for positions below p, a ring that goes on at row `oldest`. counts: how many
    entries each head fetches.
    """

    observes = True

    def __init__(self, rows: Tensor, positions: Rows, counts: tuple[int, ...], oldest: int = 0) -> None:
        self.rows, self.positions, self.counts, self.oldest = rows, positions, counts, oldest

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        sums = self.rows.float().sum(dim=0)  # [p]
        scores = sums[self.positions.view()[..., 0].long()]  # [k, m]
        valid = self.positions.valid()
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        best = scores.topk(min(max(self.counts), scores.shape[1]), dim=1)
        places = torch.arange(best.indices.shape[1])
        chosen = best.values.isfinite() & (places < torch.tensor(self.counts)[:, None])
        size = (-1, query.shape[1], -1)
        slots, chosen = (x.to(query.device)[:, None].expand(size) for x in (best.indices, chosen))
        return slots, chosen

    def observe(self, weights: Tensor, positions: Tensor) -> None:
        weights, positions = weights.sum(dim=1).cpu(), positions.cpu()  # [k, q, m], [k, m]
        self._make_room(int(positions.max()) + 1)
        new = torch.zeros(weights.shape[1], self.rows.shape[1])
        flat = weights.transpose(0, 1).flatten(1)  # [q, k * m]
        new.scatter_add_(1, positions.flatten().expand_as(flat), flat)
        for row in new[-len(self.rows) :]:
            self.rows[self.oldest] = row
            self.oldest = (self.oldest + 1) % len(self.rows)

    def _make_room(self, tokens: int) -> None:
        missing = tokens - self.rows.shape[1]
        if missing > 0:
            self.rows = torch.nn.functional.pad(self.rows, (0, max(missing, _BLOCK)))

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.positions.append(positions.to("cpu", torch.int32)[..., None])
        self._make_room(int(positions.max()) + 1)

    def tensors(self) -> list[Tensor]:
        return []

    def host_tensors(self) -> list[Tensor]:
        return [self.rows, *self.positions.tensors()]

    def clone(self) -> RecentAttention:
        return RecentAttention(self.rows.clone(), self.positions.clone(), self.counts, self.oldest)
