"""Rows as a sequence of deltas: of each channel only the tokens at which it moved, with a bitmap of where that was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.dense import whole_rows
from workbench.kv.stores.format import INDEX_BYTES, Format, Shape, index_nbytes
from workbench.kv.stores.packed import first_of
from workbench.kv.stores.parts import PartedStore
from workbench.kv.stores.positioned import PositionedStore, positions_where
from workbench.kv.stores.rows import Rows, joined
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, pack
from workbench_kernels.deltas import decode_deltas
from workbench_kernels.rows import DeltaRows as KernelRows
from workbench_kernels.rows import Ragged, restored

_TRIES = 4  # thresholds tried for each block
_AIM = 0.99  # of the changes that a block has room for


class DeltaRows:
    """Keys or values of one layer: blocks of `group` tokens as deltas, followed by the newest `window` tokens whole.

    A block begins with a whole row; after it a channel keeps its last number until one differs from that by more than
    the block's threshold, and then takes that number, which is stored (a zero delta costs its bit alone). So what is
    held never differs from the truth by more than the threshold, and nothing accumulates. Each block has its own
    threshold: the smallest tried at which its changes fit into `count` numbers.

    moves: what blocks hold, numbers [blocks, d + count] and bits uint8 [blocks, ceil(d * (group - 1) / 8)], channel
    after channel; or None if nothing is ever held as deltas. tail: the rows that are whole.
    """

    def __init__(self, moves: tuple[Rows, Rows] | None, tail: Rows, group: int, window: int) -> None:
        self.moves, self.tail = moves, tail
        self.group, self.window = group, window

    @classmethod
    def where(
        cls, x: Tensor, keep: Tensor, dtype: torch.dtype, *, zeros: float | None, group: int, window: int
    ) -> DeltaRows:
        """The rows of x [k, n, d] at which keep [k, n] is True, a share `zeros` of their deltas zero (None: whole)."""
        if zeros is None:
            return cls(None, Rows.where(x, keep, dtype), group, window)
        lengths = older(keep.sum(dim=1), group, window)
        old = first_of(keep, lengths)
        blocks = x[old].to(dtype).view(-1, group, x.shape[-1])
        numbers, bits, _ = deltas(blocks, count_of(x.shape[-1], group, zeros))
        heads, each = x.shape[0], lengths // group
        return cls(
            (Rows(numbers, heads, each), Rows(bits, heads, each)), Rows.where(x, keep & ~old, dtype), group, window
        )

    def append(self, x: Tensor) -> None:
        """Add x [k, q, d]; whole blocks leave the tail as soon as `window` tokens stay behind them."""
        self.tail.append(x)
        self.settle()

    def settle(self) -> None:
        """Let whole blocks leave the tail."""
        ready = int(older(torch.tensor(self.tail.shortest), self.group, self.window))
        if self.moves is None or not ready:
            return
        width = self.tail.data.shape[1]
        blocks = self.tail.cut_front(ready).view(-1, self.group, width)
        numbers, bits, _ = deltas(blocks, self.moves[0].data.shape[1] - width)
        for rows, new in zip(self.moves, (numbers, bits), strict=True):
            rows.append(new.view(self.tail.heads, ready // self.group, -1), block=4)

    @property
    def longest(self) -> int:
        """Rows of the head that has most, where all are equally long."""
        return self.tail.longest + (0 if self.moves is None else self.moves[0].longest * self.group)

    def reserve(self, tokens: int) -> None:
        self.tail.reserve(tokens if self.moves is None else min(tokens, self.group))
        for rows in self.moves or ():
            rows.reserve(tokens // self.group)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        """What grows while so many tokens come, and by how many rows of a head."""
        blocks = (self.tail.longest + steps) // self.group if steps else 0
        return [(self.tail, steps), *((rows, blocks) for rows in self.moves or ())]

    def blocks(self, steps: int, pin: Place) -> KernelRows | None:
        """The blocks as kernels take them while so many tokens come; None where there are never any."""
        if self.moves is None:
            return None
        more = (self.tail.longest + steps) // self.group if steps else 0
        numbers, bits = (pin(rows, rows.longest + more) for rows in self.moves)
        return KernelRows(numbers, bits, self.tail.data.shape[1], self.group)

    def view(self, dtype: torch.dtype) -> Tensor:
        """Everything held as [k, longest, d], each head's rows in order."""
        if self.moves is None:
            return self.tail.view().to(dtype)
        numbers, bits = self.moves
        width = self.tail.data.shape[1]
        blocks = restored(numbers.view().flatten(0, 1), bits.view().flatten(0, 1), width, self.group)
        x = blocks.reshape(numbers.heads, numbers.longest * self.group, width).to(dtype)
        valid = numbers.valid()
        keep = None if valid is None else valid.repeat_interleave(self.group, dim=1)
        return joined(Rows.of(x) if keep is None else Rows.where(x, keep, dtype), self.tail)

    def tensors(self) -> list[Tensor]:
        """What blocks hold; the tail apart."""
        return [tensor for rows in self.moves or () for tensor in rows.tensors()]

    def clone(self) -> DeltaRows:
        moves = None if self.moves is None else (self.moves[0].clone(), self.moves[1].clone())
        return DeltaRows(moves, self.tail.clone(), self.group, self.window)


class DeltaStore(PositionedStore, PartedStore):
    """Keys, and values if asked for, as sequences of deltas. Attention restores them, by a kernel or into scratch
    memory: exact scores for the local window, approximate ones before it.
    """

    def __init__(self, keys: DeltaRows, values: DeltaRows, positions: Rows | None) -> None:
        super().__init__(positions)
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)
        self._append_positions(positions)

    # -- attention part by part; in captured steps a block leaves one token later than otherwise

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.keys.tail, self.values.tail

    @property
    def period(self) -> int:
        return self.keys.group

    @property
    def steps_until_settled(self) -> int:
        return max(self.keys.window + self.keys.group - self.keys.tail.shortest, 1)

    def most_rows(self, steps: int) -> tuple[int, int]:
        until = self.steps_until_settled
        keys, values = (rows.longest for rows in self.growing)
        return keys + until, values + (steps if self.values.moves is None else until)

    def settle(self) -> None:
        self.keys.settle()
        self.values.settle()

    def advance(self, positions: Tensor) -> None:
        self._grown(self.growing, positions)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        return [*self.keys.room_for(steps), *self.values.room_for(steps), *((rows, steps) for rows in self.placed)]

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        old_keys, old_values = self.keys.blocks(steps, pin), self.values.blocks(steps, pin)
        if old_keys is None:  # then there are none of values either
            return [whole_rows(keys, values)]

        def older(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            return decode_deltas(query, old_keys, values if old_values is None else old_values, scoring)

        if old_values is not None:
            return [older, whole_rows(keys, values)]

        def newer(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            behind = values.starts + old_keys.numbers.lengths * old_keys.group
            rest = values._replace(starts=behind, lengths=keys.lengths, longest=keys.longest)
            return whole_rows(keys, rest)(query, scoring)

        return [older, newer]

    def reserve(self, tokens: int) -> None:
        self.keys.reserve(tokens)
        self.values.reserve(tokens)
        for rows in self._positions:
            rows.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.keys.tail.heads

    @property
    def device(self) -> torch.device:
        return self.keys.tail.data.device

    @property
    def _complete_length(self) -> int:
        return self.keys.longest

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.keys.view(dtype), self.values.view(dtype)

    def tensors(self) -> dict[str, list[Tensor]]:
        dtype = str(self.keys.tail.data.dtype).removeprefix("torch.")
        whole = [*self.keys.tail.tensors(), *self.values.tail.tensors(), *self._position_tensors()]
        return {f"{dtype} deltas": [*self.keys.tensors(), *self.values.tensors()], dtype: whole}

    def clone(self) -> Self:
        twin = super().clone()
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return twin


@dataclass(frozen=True)
class DeltaFormat(Format):
    """Kept entries at `dtype`; of all but the newest `window`, in blocks of `group`, a share of the deltas zero.

    keys, values: the share of zero deltas of each, None for a side that stays whole.
    """

    dtype: torch.dtype
    keys: float
    values: float | None
    group: int
    window: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        what = "key deltas" if self.values is None else "deltas"
        return (f"{str(self.dtype).removeprefix('torch.')}, {self.keys:.0%} of {what} zero",)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        partial = selected[(selected < shape.tokens).any(dim=1)]  # these need positions
        sides = ((self.keys, shape.key_width), (self.values, shape.value_width))
        return (
            sum(self._side(zeros, width, shape.itemsize, selected) for zeros, width in sides)
            + int(partial.sum()) * INDEX_BYTES
            + index_nbytes(partial)
        )

    def _side(self, zeros: float | None, width: int, itemsize: int, selected: Tensor) -> int:
        old = torch.zeros_like(selected) if zeros is None else older(selected, self.group, self.window)
        blocks, whole = old // self.group, selected - old
        each = 0
        if zeros is not None:
            numbers = width + count_of(width, self.group, zeros)
            each = numbers * itemsize + -(-width * (self.group - 1) // 8)
        return (
            int(blocks.sum()) * each
            + int(whole.sum()) * width * itemsize
            + 2 * index_nbytes(blocks)
            + index_nbytes(whole)
        )

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        keep = tiers > 0

        def side(x: Tensor, zeros: float | None) -> DeltaRows:
            return DeltaRows.where(x, keep, self.dtype, zeros=zeros, group=self.group, window=self.window)

        return DeltaStore(side(layer.keys, self.keys), side(layer.values, self.values), positions_where(keep))


def older(lengths: Tensor, group: int, window: int) -> Tensor:
    """How many of each head's rows, int [k], are held as deltas when this many are held: whole blocks that leave at
    least `window` behind them.
    """
    return (lengths - window).clamp_min(0) // group * group


def count_of(width: int, group: int, zeros: float) -> int:
    """How many of a block's deltas may differ from zero when a share `zeros` of them is zero."""
    deltas = width * (group - 1)
    return deltas - int(deltas * zeros + 1e-9)


def deltas(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks x [b, g, d] with at most `count` changes each.

    Returns the numbers [b, d + count], channel after channel the first and each that changed (zeros fill the rest);
    the bits uint8 [b, ceil(d * (g - 1) / 8)] that say which later tokens those are; the thresholds [b].
    """
    blocks, _, width = x.shape
    steps = x.float().transpose(0, 1).contiguous()  # [g, b, d]
    threshold = _thresholds(steps, count)
    moved = _moved(steps, threshold).permute(1, 2, 0)  # [b, d, g - 1]
    bits = moved.flatten(1)
    stored = torch.cat([torch.ones_like(moved[..., :1]), moved], dim=-1).flatten(1)
    place = stored.cumsum(dim=1) - 1
    numbers = x.new_zeros(blocks, width + count + 1)  # the last takes what is not held
    numbers.scatter_(1, place.masked_fill_(~stored, width + count), x.transpose(1, 2).flatten(1))
    return numbers[:, :-1].clone(), pack(bits.to(torch.uint8), 1), threshold


def _thresholds(steps: Tensor, count: int) -> Tensor:
    """Of each block the smallest threshold tried, float32 [b], at which at most `count` deltas of steps [g, b, d] are
    not zero.

    The number that move falls about exponentially with the threshold: each try is where that rule, between the two
    that enclose the answer, expects a little less than `count`.
    """
    every = (steps[1:] != steps[:-1]).sum(dim=(0, 2))  # what moves at threshold 0
    widest = (steps.amax(dim=0) - steps.amin(dim=0)).amax(dim=1)  # nothing moves
    low, high = torch.zeros_like(widest), torch.where(every <= count, 0, widest)
    many, few = every + 1.0, torch.ones_like(widest)
    aim = math.log(count * _AIM + 1)
    for step in range(_TRIES):
        share = (many.log() - aim) / (many.log() - few.log()).clamp_min(1e-6)
        middle = low + (high - low) * (share if step else share / 2).clamp(0.05, 0.95)
        moving = _moved(steps, middle).sum(dim=(0, 2)).float()
        fits = moving <= count
        high, few = torch.where(fits, middle, high), torch.where(fits, moving + 1, few)
        low, many = torch.where(fits, low, middle), torch.where(fits, many, moving + 1)
    return high


def _moved(steps: Tensor, threshold: Tensor) -> Tensor:
    """Which deltas of steps [g, b, d] pass their block's threshold [b], bool [g - 1, b, d]."""
    limit = threshold[:, None].expand(steps.shape[1:]).contiguous()
    last = steps[0].clone()
    moved = torch.empty(len(steps) - 1, *last.shape, dtype=torch.bool, device=steps.device)
    for now, flags in zip(steps[1:], moved, strict=True):
        torch.gt((now - last).abs_(), limit, out=flags)
        torch.where(flags, now, last, out=last)
    return moved
