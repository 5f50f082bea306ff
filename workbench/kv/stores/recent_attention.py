"""An index of host memory by the attention that positions received in the latest steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.stores.format import INDEX_BYTES, Shape, index_nbytes
from workbench.kv.stores.offload import Index, Retriever
from workbench.kv.stores.rows import Rows
from workbench.trace import LayerTrace, Trace

_STEP_BYTES, _SUM_BYTES = 2, 8  # attention is remembered as float16, whose sums float64 holds exactly
_BLOCK = 256  # positions for which room is made at once


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
        sums = (int(steps.sum()) * _STEP_BYTES + len(steps) * _SUM_BYTES) * shape.tokens
        return sums + int(others.sum()) * INDEX_BYTES + index_nbytes(others)

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        near = others.shape[1] - others.sum(dim=1)  # [k]
        steps = min(self.steps or layer.tokens, max(int(near.max()), 1))
        rows = self.trace.once(("recent attention", layer.index, steps), lambda: self._rows(layer, steps))
        where = torch.arange(others.shape[1]).expand(others.shape[0], -1)[..., None]
        positions = Rows.where(where, others.cpu(), torch.int32)
        return RecentAttention(rows.clone(), rows.double().sum(dim=0), positions, tuple(near.tolist()))

    def _rows(self, layer: LayerTrace, steps: int) -> Tensor:
        """What each of the prompt's last queries gave, summed over heads, float16 [steps, n] in host memory."""
        rows = [block.sum(dim=0).to("cpu", torch.float16) for _, block in layer.attention_rows(steps)]
        return torch.cat(rows)


class RecentAttention(Retriever):
    """What each of the latest steps gave to each position, and the positions of what is in host memory.

    rows: float16 [steps, p] with room for positions below p, a ring that goes on at row `oldest`. sums: of all rows,
    float64 [p], exact. counts: how many entries each head fetches.
    """

    follows_slopes = True  # by attention that was paid, slopes and all
    observes = True

    def __init__(self, rows: Tensor, sums: Tensor, positions: Rows, counts: tuple[int, ...], oldest: int = 0) -> None:
        self.rows, self.sums = rows, sums
        self.positions, self.counts, self.oldest = positions, counts, oldest

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        scores = self.sums.float()[self.positions.view()[..., 0].long()]  # [k, m]
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
        new = torch.zeros(weights.shape[1], self.rows.shape[1], dtype=torch.float32)
        flat = weights.transpose(0, 1).flatten(1)  # [q, k * m]
        new.scatter_add_(1, positions.flatten().expand_as(flat), flat)
        for row in new[-len(self.rows) :]:
            self.sums -= self.rows[self.oldest]
            self.rows[self.oldest] = row
            self.sums += self.rows[self.oldest]
            self.oldest = (self.oldest + 1) % len(self.rows)

    def _make_room(self, tokens: int) -> None:
        missing = tokens - self.rows.shape[1]
        if missing > 0:
            self.rows, self.sums = (pad(x, (0, max(missing, _BLOCK))) for x in (self.rows, self.sums))

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.positions.append(positions.to("cpu", torch.int32)[..., None])
        self._make_room(int(positions.max()) + 1)

    def tensors(self) -> list[Tensor]:
        return []

    def host_tensors(self) -> list[Tensor]:
        return [self.rows, self.sums, *self.positions.tensors()]

    def clone(self) -> RecentAttention:
        parts = self.rows.clone(), self.sums.clone(), self.positions.clone()
        return RecentAttention(*parts, self.counts, self.oldest)
