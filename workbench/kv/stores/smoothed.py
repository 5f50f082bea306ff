"""Symmetric integers with one small scale a group, and keys smoothed so that their rotary pairs stay pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.format import INDEX_BYTES, Format, Shape, index_nbytes
from workbench.kv.stores.low_rank import rotary_of
from workbench.kv.stores.parts import PartedStore
from workbench.kv.stores.positioned import PositionedStore, positions_where
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Store, seen_by, state
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, attend, pack, unpack
from workbench_kernels.decode import decode_packed
from workbench_kernels.rows import PackedRows as KernelRows
from workbench_kernels.rows import Ragged
from workbench_kernels.symmetric import round_newest, smoothed_query, spread, symmetric

_REACH = 8.0  # the largest magnitude after smoothing: scales of 4 bits are then near 1, where FP8 is finest
_HALF = 2  # factors are float16
_BLOCK = 32  # tokens that wait in captured steps to be written as integers


class SymmetricRows:
    """Rows quantised to 4 or 8 bits around 0, each with one scale for every `group` consecutive channels (the last
    group may be narrower): a number of the type `scales`.
    """

    def __init__(self, codes: Rows, scale: Rows, bits: int, group: int, channels: int, scales: torch.dtype) -> None:
        """codes [t, bytes], packed; scale [t, ceil(d / g)], FP8 as bytes."""
        self.codes, self.scale, self.bits, self.group, self.channels = codes, scale, bits, group, channels
        self.scales = scales

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor, bits: int, group: int, scales: torch.dtype) -> SymmetricRows:
        """Quantise x [t, d], head after head with `lengths` [k] rows each."""
        codes, scale = _quantise(x, bits, group, scales)
        heads = lengths.numel()
        return cls(Rows(codes, heads, lengths), Rows(scale, heads, lengths), bits, group, x.shape[1], scales)

    def append(self, x: Tensor) -> None:
        """Quantise and add x [k, q, d]."""
        codes, scale = _quantise(x.flatten(0, 1), self.bits, self.group, self.scales)
        self.codes.append(codes.unflatten(0, x.shape[:2]))
        self.scale.append(scale.unflatten(0, x.shape[:2]))

    def reserve(self, rows: int) -> None:
        self.codes.reserve(rows)
        self.scale.reserve(rows)

    def view(self, dtype: torch.dtype) -> Tensor:
        """What is held, [k, longest, d]."""
        scale = self.scale.data.view(self.scales).float()
        codes = unpack(self.codes.data, self.bits, self.channels).float().sub_(2 ** (self.bits - 1))
        return self.codes.laid_out((codes * spread(scale, self.group, self.channels)).to(dtype))

    def settled(self, tail: Ragged, more: int, balance: Tensor | None, pin: Place) -> KernelRows:
        """The rows, followed by those of `tail`, as kernels take them; so many more of a head may join them."""
        codes, scale = (pin(rows, rows.longest + more) for rows in (self.codes, self.scale))
        scale = scale._replace(data=scale.data.view(self.scales))
        return KernelRows(codes, scale, None, tail, self.bits, min(self.group, self.channels), "token", balance)

    def tensors(self) -> list[Tensor]:
        return [*self.codes.tensors(), *self.scale.tensors()]

    def clone(self) -> SymmetricRows:
        twins = self.codes.clone(), self.scale.clone()
        return SymmetricRows(*twins, self.bits, self.group, self.channels, self.scales)


def _quantise(x: Tensor, bits: int, group: int, scales: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes and stored scales (see SymmetricRows) of x [t, d]."""
    codes, scale = symmetric(x, bits, group, scales)
    packed = pack(codes.add_(2 ** (bits - 1)).to(torch.uint8), bits)
    return packed, scale.view(torch.uint8) if scales.itemsize == 1 else scale


class SmoothedStore(PositionedStore, PartedStore):
    """Keys smoothed channel by channel and values head by head, both as symmetric integers from the moment they enter.

    Scores are computed with keys as they are held: the queries are divided by the keys' factors instead, and rounded
    to FP8 with a scale for each query and head if `fp8_query`. Sums are formed in the query's dtype. In captured steps
    a few tokens wait in `tail` to be written as integers, but are attended to as if they were.
    """

    def __init__(
        self,
        keys: SymmetricRows,
        values: SymmetricRows,
        key_factors: Tensor,
        value_factors: Tensor,
        positions: Rows | None,
        fp8_query: bool,
        dtype: torch.dtype,
    ) -> None:
        """key_factors [k, d], value_factors [k, 1], float16: multiplied before rounding. dtype: of new tokens."""
        super().__init__(positions)
        self.keys, self.values = keys, values
        self.key_factors, self.value_factors = key_factors, value_factors
        self.fp8_query = fp8_query
        none = key_factors.new_empty(len(key_factors), 0, 1, dtype=dtype)
        widths = keys.channels, values.channels
        self.tail = (Rows.of(none.expand(-1, -1, widths[0])), Rows.of(none.expand(-1, -1, widths[1])))

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.settle()  # what captured steps left waiting
        self._add(keys, values)
        self._append_positions(positions)

    def _add(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys.float() * self.key_factors.float()[:, None])
        self.values.append(values.float() * self.value_factors.float()[:, None])

    # -- attention in place

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.tail

    @property
    def period(self) -> int:
        return _BLOCK

    @property
    def steps_until_settled(self) -> int:
        return max(_BLOCK - self.tail[0].longest, 1)

    def settle(self) -> None:
        if self.tail[0].longest:
            keys, values = (rows.cut_front(rows.longest) for rows in self.tail)
            self._add(keys, values)

    def advance(self, positions: Tensor) -> None:
        self._grown(self.tail, positions)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        joining = self.tail[0].longest + steps if steps else 0
        rows = (self.keys.codes, self.keys.scale, self.values.codes, self.values.scale)
        waiting = [(tail, min(steps, _BLOCK)) for tail in self.tail]
        return waiting + [(one, joining) for one in rows] + [(where, steps) for where in self._positions]

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        into = torch.zeros_like(keys.data), torch.zeros_like(values.data)
        more = self.tail[0].longest + steps if steps else 0
        lifted = self.value_factors.expand(-1, self.values.channels).contiguous()
        rounded = (rows._replace(data=data) for rows, data in zip((keys, values), into, strict=True))
        held_keys = self.keys.settled(next(rounded), more, None, pin)
        held_values = self.values.settled(next(rounded), more, lifted, pin)
        form = self.keys.bits, self.keys.group, self.keys.scales

        def everything(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            if steps:
                round_newest(keys, values, self.key_factors, self.value_factors, *form, *into)
            asked = smoothed_query(query, self.key_factors, self.fp8_query)
            return state(decode_packed(asked, held_keys, held_values, scoring, lse=True))

        return [everything]

    def reserve(self, tokens: int) -> None:
        self.keys.reserve(tokens)
        self.values.reserve(tokens)
        for rows in self._positions:
            rows.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return len(self.key_factors)

    @property
    def device(self) -> torch.device:
        return self.key_factors.device

    @property
    def _complete_length(self) -> int:
        return self.keys.codes.longest + self.tail[0].longest

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self.settle()
        keys = self.keys.view(torch.float32) / self.key_factors.float()[:, None]
        values = self.values.view(torch.float32) / self.value_factors.float()[:, None]
        return keys.to(dtype), values.to(dtype)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        self.settle()
        out = None if weights else self.by_kernel(query, query_positions, scoring)
        if out is not None:
            return out, None
        groups = query.shape[0] // self.key_factors.shape[0]
        asked = smoothed_query(query, self.key_factors, self.fp8_query)
        keys, values = self.keys.view(query.dtype), self.values.view(query.dtype)
        positions, valid = self.slots()
        visible = seen_by(query_positions, positions, valid, scoring)
        offsets = scoring.offsets(query_positions, positions)
        out, rows = attend(asked, keys, values, scoring, visible=visible, offsets=offsets, weights=weights)
        per_head = self.value_factors.float().repeat_interleave(groups, dim=0)[:, None]  # [h, 1, 1]
        return (out.float() / per_head).to(query.dtype), rows

    def tensors(self) -> dict[str, list[Tensor]]:
        rows = [*self.keys.tensors(), *self.values.tensors(), self.key_factors, self.value_factors]
        by_precision = {f"{self.keys.bits}-bit": [*rows, *self._position_tensors()]}
        if self.tail[0].data.numel():
            name = str(self.tail[0].data.dtype).removeprefix("torch.")
            by_precision[name] = [tensor for waiting in self.tail for tensor in waiting.tensors()]
        return by_precision

    def clone(self) -> Self:
        twin = super().clone()
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        twin.key_factors, twin.value_factors = self.key_factors.clone(), self.value_factors.clone()
        twin.tail = self.tail[0].clone(), self.tail[1].clone()
        return twin


@dataclass(frozen=True)
class SmoothedFormat(Format):
    """Kept entries as symmetric integers of 4 or 8 bits in groups of `group` channels, keys smoothed with `outliers`
    channels of a head on their own (see `smoothing`). scales: the type of each group's scale.
    """

    bits: int
    group: int
    outliers: int
    fp8_query: bool
    scales: torch.dtype = torch.bfloat16
    attends_itself: ClassVar[bool] = True  # with queries in FP8

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{self.bits}-bit",)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        partial = selected[(selected < shape.tokens).any(dim=1)]  # these need positions
        row = sum(self._row_nbytes(width) for width in (shape.key_width, shape.value_width))
        factors = _HALF * selected.numel() * (shape.key_width + 1)
        positions = int(partial.sum()) * INDEX_BYTES + index_nbytes(partial)
        return int(selected.sum()) * row + 4 * index_nbytes(selected) + factors + positions

    def _row_nbytes(self, width: int) -> int:
        return -(-width * self.bits // 8) + -(-width // self.group) * self.scales.itemsize

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        keep = tiers > 0
        keys, values = layer.keys.float(), layer.values.float()
        rotation = rotary_of(layer)  # None: no channels are paired
        if rotation is None:
            factors = smoothing(keys, 0, self.outliers)
        else:
            factors = rotation.unhalved(smoothing(rotation.halved(keys), rotation.width, self.outliers))
        lift = _to_reach(values.abs().amax(dim=(1, 2), keepdim=False)[:, None])
        lengths = keep.sum(dim=1)
        return SmoothedStore(
            SymmetricRows.of((keys * factors.float()[:, None])[keep], lengths, self.bits, self.group, self.scales),
            SymmetricRows.of((values * lift.float()[:, None])[keep], lengths, self.bits, self.group, self.scales),
            factors,
            lift,
            positions_where(keep),
            self.fp8_query,
            layer.keys.dtype,
        )


def smoothing(keys: Tensor, rotated: int, outliers: int) -> Tensor:
    """What the keys [k, n, d] of each channel are multiplied with before they are rounded, float16 [k, d].

    The two channels of a rotary pair (c and c + rotated / 2, of the first `rotated`) share a factor, 8 over the
    largest length of the pair. As rotating keeps that length, the factor is the same before and after it, and commutes
    with it. Only the `outliers` channels with the largest rotated numbers, and their partners, have factors of their
    own: 8 over their largest magnitude. A channel that is not rotated is alone.
    """
    largest = keys.float().abs().amax(dim=1)  # [k, d]
    half, width = rotated // 2, keys.shape[-1]
    lengths = torch.hypot(keys[..., :half].float(), keys[..., half:rotated].float()).amax(dim=1)  # [k, r / 2]
    shared = torch.cat([lengths, lengths, largest[:, rotated:]], dim=1)
    alone = torch.zeros_like(largest, dtype=torch.bool)
    alone.scatter_(1, largest.topk(min(outliers, width), dim=1).indices, True)
    pairs = alone[:, :half] | alone[:, half:rotated]
    alone = torch.cat([pairs, pairs, alone[:, rotated:]], dim=1)
    return _to_reach(torch.where(alone, largest, shared))


def _to_reach(largest: Tensor) -> Tensor:
    factors = torch.where(largest > 0, _REACH / largest, 1.0)
    return factors.clamp(2.0**-14, 2.0**14).to(torch.float16)
