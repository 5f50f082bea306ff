"""Rows of one width for several heads in one buffer, each head with a length of its own."""

from __future__ import annotations

from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from workbench.core.precision import appended
from workbench_kernels.building import gather, kept
from workbench_kernels.cpu.token import Stretch
from workbench_kernels.kept import Kept
from workbench_kernels.rows import Ragged


class Rows:
    """For each head some rows [length, d], kept one head after another in one contiguous buffer that grows by blocks.

    While all heads are equally long, lengths are plain numbers and `view` costs nothing; otherwise starts and lengths
    are int32 tensors [k], as a kernel wants them, and `view` gathers. longest, shortest: rows of the heads that have
    most and fewest; heads grow and shrink together, so these are always known without asking the device.
    """

    def __init__(self, data: Tensor, heads: int, lengths: Tensor | None = None) -> None:
        """data [t, d], head after head; lengths int [k] with sum t, or None if all heads have t // heads rows.

        Lengths in host memory spare a wait for the device of the data.
        """
        self.data = data
        self.heads = heads
        self.longest = data.shape[0] // heads if lengths is None else int(lengths.max())
        self.shortest = self.longest if lengths is None else int(lengths.min())
        self.total = data.shape[0]
        self._room = self.longest  # rows that fit into each head's part while equally long
        self._spare = 0  # further rows that fit into each head's part while not
        self.starts: Tensor | None = None
        self.lengths: Tensor | None = None
        if lengths is not None and self.shortest != self.longest:
            self.lengths = lengths.to(data.device, torch.int32, copy=True)
            self.starts = (lengths.cumsum(0) - lengths).to(data.device, torch.int32)

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """Rows from [k, m, d]."""
        return cls(x.reshape(-1, x.shape[-1]).contiguous(), x.shape[0])

    @classmethod
    def where(cls, x: Tensor, keep: Tensor | Kept, dtype: torch.dtype) -> Rows:
        """The rows of x [k, n, d] at which keep [k, n] is True, or which it lists."""
        chosen = keep if isinstance(keep, Kept) else kept(keep)
        if chosen.complete:
            return cls.of(x.to(dtype, copy=True))
        return cls(gather((x,), chosen, dtype)[0], x.shape[0], chosen.counts)

    @classmethod
    def both(cls, keys: Tensor, values: Tensor, chosen: Kept, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """The chosen rows of keys [k, n, d] and values [k, n, dv], gathered together."""
        if chosen.complete:
            return cls.where(keys, chosen, dtype), cls.where(values, chosen, dtype)
        gathered = gather((keys, values), chosen, dtype)
        return cls(gathered[0], keys.shape[0], chosen.counts), cls(gathered[1], values.shape[0], chosen.counts)

    @classmethod
    def positions(cls, chosen: Kept) -> Rows:
        """The position of every chosen row, int32 [t, 1]."""
        where = torch.arange(chosen.tokens, dtype=torch.int32, device=chosen.places.device)
        return cls.where(where.expand(len(chosen.counts), -1)[..., None], chosen, torch.int32)

    @property
    def uniform(self) -> bool:
        """Whether all heads are equally long."""
        return self.lengths is None

    @property
    def counts(self) -> Tensor:
        """Rows of each head, int64 [k]."""
        if self.lengths is None:
            return torch.full((self.heads,), self.longest, device=self.data.device)
        return self.lengths.long()

    @property
    def spare(self) -> int:
        """How many rows can be appended to each head without moving anything."""
        return self._room - self.longest if self.lengths is None else self._spare

    def to(self, device: torch.device) -> Rows:
        """A copy on another device; in host memory it is pinned where these are, or lie on a GPU."""
        twin = copy(self)
        pinned = device.type == "cpu" and self.data.numel() > 0 and (self.data.is_cuda or self.data.is_pinned())
        twin.data = torch.empty(self.data.shape, dtype=self.data.dtype, device=device, pin_memory=pinned)
        twin.data.copy_(self.data)
        if self.starts is not None and self.lengths is not None:
            twin.starts, twin.lengths = self.starts.to(device, copy=True), self.lengths.to(device, copy=True)
        return twin

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.data, self.starts, self.lengths) if t is not None]

    def clone(self) -> Rows:
        twin = copy(self)
        twin.data = self.data.clone()
        if self.starts is not None and self.lengths is not None:
            twin.starts, twin.lengths = self.starts.clone(), self.lengths.clone()
        return twin

    def view(self) -> Tensor:
        """All rows as [k, longest, d]; heads that are shorter repeat some row at the end (see `valid`)."""
        return self.laid_out(self.data)

    def ragged(self) -> Ragged:
        """The rows as kernels take them, lengths on the device."""
        if self.lengths is None or self.starts is None:
            even = _even if not _capturing(self.data) else _even.__wrapped__  # what a graph makes is its own
            starts, lengths = even(self.heads, self._room, self.longest, str(self.data.device))
            return Ragged(self.data, starts, lengths, self.longest)
        return Ragged(self.data, self.starts, self.lengths, self.longest)

    def laid_out(self, data: Tensor) -> Tensor:
        """Another buffer [t, w] with one row for each of this one's, as `view` would show it."""
        if self.lengths is None:
            return data.view(self.heads, self._room, data.shape[1])[:, : self.longest]
        return data[self.slots()]

    def at(self, rows: Tensor) -> Tensor:
        """Each head's rows number `rows` [k, e], copied: [k, e, d]."""
        return self.data[self.begins[:, None] + rows]

    def put(self, rows: Tensor, x: Tensor) -> None:
        """Write x [k, e, d] over each head's rows number `rows` [k, e]."""
        self.data[self.begins[:, None] + rows] = x.to(self.data.dtype)

    def slots(self) -> Tensor:
        """Where in the buffer each row lies, int64 [k, longest]; beyond a head's length, the place of some row."""
        steps = torch.arange(self.longest, device=self.data.device)
        if self.lengths is None or self.starts is None:
            return torch.arange(self.heads, device=self.data.device)[:, None] * self._room + steps
        inside = steps < self.lengths[:, None]
        # An empty head begins where the next one does, or behind the last row.
        return (self.starts.long()[:, None] + torch.where(inside, steps, 0)).clamp_max_(max(self.data.shape[0] - 1, 0))

    @property
    def begins(self) -> Tensor:
        """Where each head's rows begin in the buffer, int64 [k]."""
        if self.starts is not None:
            return self.starts.long()
        return torch.arange(self.heads, device=self.data.device) * self._room

    def owners(self) -> Tensor:
        """Which head each row of the buffer belongs to, int64 [t]."""
        steps = torch.arange(self.data.shape[0], device=self.data.device)
        if self.starts is None:
            return steps // max(self._room, 1)
        return torch.searchsorted(self.starts.long(), steps, right=True).sub_(1).clamp_min_(0)

    def valid(self) -> Tensor | None:
        """Which rows of `view` are real, bool [k, longest]; None if all are."""
        if self.lengths is None:
            return None
        return torch.arange(self.longest, device=self.data.device) < self.lengths[:, None]

    def write(self, x: Tensor) -> None:
        """Replace all rows by x, laid out as `view` shows them."""
        valid = self.valid()
        if valid is None:
            self.view().copy_(x)
        else:
            self.data[self.slots()[valid]] = x[valid].to(self.data.dtype)

    def refill(self, other: Rows) -> None:
        """Replace all rows by those of `other`, of which each head has equally many more, in the room reserved."""
        more = other.longest - self.longest
        if self.lengths is None or self.starts is None:
            self.data.view(self.heads, self._room, -1)[:, : other.longest] = other.view()
        else:
            owners = torch.repeat_interleave(torch.arange(self.heads, device=self.data.device), other.counts)
            steps = torch.arange(other.total, device=self.data.device) - other.begins[owners]
            self.data[self.begins[owners] + steps] = other.data[: other.total]
        self.grow(more)

    def reserve(self, rows: int) -> None:
        """Make room so that `rows` further rows a head can be appended without moving anything."""
        if self.lengths is None or self.starts is None:
            if self.longest + rows <= self._room:
                return
            room = self.longest + rows
            grown = self.data.new_empty(self.heads, room, self.data.shape[-1])
            grown[:, : self.longest] = self.view()
            self.data, self._room = grown.view(self.heads * room, self.data.shape[1]), room
            return
        if rows <= self._spare:
            return
        counts = self.lengths.long()
        rooms = counts + rows
        starts = rooms.cumsum(0) - rooms
        # Zeros: an empty head shows a row that nothing was written to, and what is masked must be a number too.
        grown = self.data.new_zeros(self.total + self.heads * rows, self.data.shape[-1])
        head = torch.repeat_interleave(torch.arange(self.heads, device=self.data.device), counts)
        step = torch.arange(self.total, device=self.data.device) - (counts.cumsum(0) - counts)[head]
        grown[starts[head] + step] = self.data[self.starts.long()[head] + step]
        self.data, self._spare, self.starts = grown, rows, starts.to(torch.int32)

    def reserve_block(self, block: int) -> None:
        """Make room for `block` further rows a head where there is none for one."""
        if self.lengths is None and self.longest == self._room:
            self.reserve(block)

    @property
    def stretch(self) -> Stretch:
        """The rows of heads that are all equally long."""
        return Stretch(self.data, self._room, self.longest)

    def reserved_nbytes(self, rows: int) -> int:
        """The bytes of all tensors after `reserve(rows)`."""
        if self.lengths is None or self.starts is None:
            rows_reserved = self.heads * max(self.longest + rows, self._room)
        else:
            rows_reserved = self.data.shape[0] if rows <= self._spare else self.total + self.heads * rows
        return rows_reserved * self.data.shape[1] * self.data.itemsize + sum(x.nbytes for x in self.tensors()[1:])

    def grow(self, count: int) -> None:
        """Take up `count` rows that were written behind those of every head, where room was reserved, by others."""
        self.longest += count
        self.shortest += count
        self.total += self.heads * count
        if self.lengths is not None:
            self.lengths += count
            self._spare -= count

    def append(self, x: Tensor, block: int = 64) -> None:
        """Add x [k, q, d] to the end of each head's rows; grows by `block` rows where nothing was reserved."""
        count, x = x.shape[1], appended(x, self.data.dtype, "new keys or values")
        if self.lengths is None or self.starts is None:
            if self.longest + count > self._room:
                self.reserve(max(count, block))
            self.data.view(self.heads, self._room, self.data.shape[1])[:, self.longest : self.longest + count] = x
        else:
            if count > self._spare:
                self.reserve(max(count, block))
            at = (self.starts + self.lengths).long()[:, None] + torch.arange(count, device=x.device)
            self.data[at] = x
        self.grow(count)

    def only(self, keep: Tensor) -> Rows:
        """The rows at which keep [k, longest] is True, in a buffer with no room to spare."""
        return Rows(self.data[self.slots()[keep]], self.heads, keep.sum(dim=1))

    def tight(self) -> Rows:
        """The same rows in a buffer with no room to spare."""
        if self.data.shape[0] == self.total:
            return self
        valid = self.valid()
        every = torch.ones(self.heads, self.longest, dtype=torch.bool, device=self.data.device)
        return self.only(every if valid is None else valid)

    def move(self, source: Tensor, target: Tensor, drop: int) -> None:
        """Copy each head's rows source [k, s] over its rows target [k, s], then cut the last `drop` rows of every
        head.
        """
        begin = self.begins[:, None]
        self.data[begin + target] = self.data[begin + source]
        self.cut(drop)

    def cut(self, rows: int) -> None:
        """Forget the last `rows` rows of every head."""
        self.longest -= rows
        self.shortest -= rows
        self.total -= self.heads * rows
        if self.lengths is not None:
            self.lengths -= rows
            self._spare += rows

    def cut_front(self, rows: int) -> Tensor:
        """Take the first `rows` rows away from every head and return them as [k, rows, d]."""
        x = self.view()
        taken = x[:, :rows].clone()
        if self.lengths is None or self.starts is None:
            kept = x[:, rows:].clone()
            self.data.view(self.heads, self._room, self.data.shape[1])[:, : self.longest - rows] = kept
            self.cut(rows)
        else:
            self.starts += rows
            self.lengths -= rows
            self.longest -= rows
            self.shortest -= rows
            self.total -= self.heads * rows
        return taken


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)  # a step asks once a layer
def _even(heads: int, room: int, longest: int, device: str) -> tuple[Tensor, Tensor]:
    """Where the rows of equally long heads begin, and how many they are, int32 [k] each; nobody writes into them."""
    starts = torch.arange(heads, dtype=torch.int32, device=device) * room
    return starts, torch.full_like(starts, longest)


def joined(first: Rows, second: Rows, first_data: Tensor | None = None) -> Tensor:
    """Two stretches of every head's rows, one behind the other, as [k, longest, d].

    first_data [t, d]: what the buffer of `first` stands for, row by row, if it is not the buffer itself (dequantised).
    """
    front_data = first.data if first_data is None else first_data
    if first.uniform and second.uniform:
        front = first.laid_out(front_data)
        if second.longest == 0:
            return front
        return torch.cat([front, second.view().to(front.dtype)], dim=1)
    counts, more = first.counts, second.counts
    steps = torch.arange(int((counts + more).max()), device=front_data.device)
    in_front = steps < counts[:, None]
    after = torch.where(in_front, 0, steps - counts[:, None]).clamp_max((more - 1).clamp_min(0)[:, None])
    place = torch.where(in_front, first.begins[:, None] + steps, len(front_data) + second.begins[:, None] + after)
    both = torch.cat([front_data, second.data.to(front_data.dtype)])
    return both[place.clamp_max_(max(len(both) - 1, 0))]
