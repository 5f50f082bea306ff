"""Chunks at two levels: a coarse stand-in of each on the device, the whole of it in host memory."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.tiered import TieredStore
from workbench_kernels import Scoring, attend


class LevelStore(TieredStore):
    """Chunks of `chunk` tokens: the newest whole on the device; of the others the first `marks` tokens, the means of
    every `pool` of the rest, and the rest itself in host memory.

    While the text is read, one chunk a pass, a token sees the marks of all chunks, its own, and of the `before` chunks
    before it what is on the device. Afterwards a query sees the newest chunks and the first whole, of the others those
    `whole` to whose means the question (a pass of several tokens) attends most, fetched from host memory, and the means
    of the rest.

    room: entries a head, without the means, that may be on the device while reading. All heads hold the same positions.
    """

    def __init__(
        self,
        near: DenseStore,
        far: HostRows,
        keys: Rows,
        values: Rows,
        *,
        room: int,
        chunk: int,
        marks: int,
        pool: int,
        before: int,
        whole: int,
    ) -> None:
        """keys [k, s, d] and values [k, s, dv]: the means."""
        self.near, self.far, self.keys, self.values = near, far, keys, values
        self.room, self.chunk, self.marks, self.pool = room, chunk, marks, pool
        self.before, self.whole = before, whole
        self.reading = True
        self.coarse = keys.longest // self.means  # chunks in host memory
        self.chunks: tuple[int, ...] | None = None  # of these, those seen whole; None before the first question

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, **sizes: int) -> LevelStore:
        """A store without entries, for such keys [k, 0, d] and values [k, 0, dv]."""
        near = DenseStore(
            Rows.of(keys), Rows.of(values), Rows.of(keys.new_empty(keys.shape[0], 0, 1, dtype=torch.int32))
        )
        far = HostRows.where(keys, values, torch.ones(keys.shape[:2], dtype=torch.bool), keys.dtype)
        return cls(near, far, Rows.of(keys.clone()), Rows.of(values.clone()), **sizes)

    @property
    def means(self) -> int:
        """How many means stand for a chunk."""
        return -(-(self.chunk - self.marks) // self.pool)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        while self.reading and self.near.longest + keys.shape[1] > self.room:
            self._move_out()
        self.near.append(keys, values, positions)

    def _move_out(self) -> None:
        """Leave of the oldest whole chunk its marks and means."""
        near = self.near.contents(self.keys.data.dtype)
        start = self.coarse * self.chunk + self.marks
        positions = near.positions[0].long()
        order = positions.argsort()
        positions = positions[order]
        slots = order[(positions >= start) & (positions < start + self.chunk - self.marks)]  # [e]
        heads = near.keys.shape[0]
        self.far.append(near.keys[:, slots], near.values[:, slots], near.positions[0, slots].expand(heads, -1))
        for rows, of in ((self.keys, near.keys), (self.values, near.values)):
            means = torch.stack([part.float().mean(dim=1) for part in of[:, slots].split(self.pool, dim=1)], dim=1)
            rows.append(means.to(rows.data.dtype), block=self.means)
        self.near.evict(slots.expand(heads, -1))
        self.coarse += 1

    def reserve(self, tokens: int) -> None:
        self.near.reserve(max(min(tokens, self.room - self.near.longest), 0) if self.reading else tokens)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        near = self.near.contents(query.dtype)
        positions = near.positions[0].long()
        at = query_positions.to(positions.device)
        causal = positions <= at[:, None]  # [q, m]
        if self.reading:
            oldest = at[:, None] // self.chunk - self.before
            seen = (positions % self.chunk < self.marks) | (positions // self.chunk >= oldest)
            offsets = scoring.offsets(at, positions[None])
            return attend(query, near.keys, near.values, scoring, visible=(causal & seen)[None], offsets=offsets)
        heads = near.keys.shape[0]
        keys = torch.cat([near.keys, self.keys.view().to(query.dtype)], dim=1)
        values = torch.cat([near.values, self.values.view().to(query.dtype)], dim=1)
        first = torch.arange(self.coarse, device=at.device) * self.chunk + self.marks
        steps = torch.arange(self.means, device=at.device) * self.pool
        stands = (first[:, None] + steps + self.pool - 1).clamp_max(first[:, None] + self.chunk - self.marks - 1)
        causal = torch.cat([causal, stands.flatten() <= at[:, None]], dim=1)
        where = torch.cat([positions, stands.flatten()])[None]
        if self.chunks is None or query.shape[1] > 1:
            offsets = scoring.offsets(at, where)
            _, rows = attend(query, keys, values, scoring, visible=causal[None], offsets=offsets, weights=True)
            assert rows is not None  # [k, g, q, m]
            received = rows[..., near.keys.shape[1] :].sum(dim=(0, 1, 2)).view(self.coarse, self.means).sum(dim=1)
            received[:1] = torch.inf
            self.chunks = tuple(sorted(received.topk(min(self.whole + 1, self.coarse)).indices.tolist()))
        rest = self.chunk - self.marks
        chosen = torch.tensor(self.chunks, dtype=torch.long, device=at.device)
        slots = (chosen[:, None] * rest + torch.arange(rest, device=at.device)).flatten()
        far_keys, far_values, far_positions = self.far.fetch(slots.expand(heads, -1))()
        hidden = torch.zeros(keys.shape[1], dtype=torch.bool, device=at.device)
        hidden[near.keys.shape[1] :].view(self.coarse, self.means)[chosen] = True
        visible = torch.cat([causal & ~hidden, far_positions[0] <= at[:, None]], dim=1)
        return attend(
            query,
            torch.cat([keys, far_keys.to(query.dtype)], dim=1),
            torch.cat([values, far_values.to(query.dtype)], dim=1),
            scoring,
            visible=visible[None],
            offsets=scoring.offsets(at, torch.cat([where, far_positions[:1]], dim=1)),
        )

    def index(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.values.tensors()]

    def clone(self) -> Self:
        twin = copy(self)
        twin.near, twin.far = self.near.clone(), self.far.clone()
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin
