"""One stretch of tokens at one bit, or a few, with levels and scores calibrated for that; all others whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.errors import NotApplicable
from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.format import DenseFormat, Format, Shape, index_nbytes
from workbench.kv.stores.frozen import ChannelRows, FrozenStore, bitmap_nbytes
from workbench.kv.stores.packed import first_of
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store, seen_by, state
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.decode import decode_packed
from workbench_kernels.lowered import lowered_query, share_of
from workbench_kernels.rows import Ragged
from workbench_kernels.softmax import normalised

_HALF = 2  # scales and zeros are float16
_ROWS_BYTES = 64 << 20  # score rows are worked on in blocks of about this size


@dataclass(frozen=True)
class CalibratedFormat(Format):
    """Of each head's kept entries, those from number `start` on at `bits` bits, the others at `dtype`.

    The last `recent` entries are never part of the stretch; `length` limits it, None does not. Every channel of a head
    has one scale and one zero for the whole stretch: its levels reach over `key_share` or `value_share` of its range.
    drop: by how much the largest score of the stretch falls (see `lowered`).
    """

    attends_itself: ClassVar[bool] = True

    dtype: torch.dtype
    bits: int
    key_share: float
    value_share: float
    drop: float
    start: int
    length: int | None
    recent: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{self.bits}-bit and {str(self.dtype).removeprefix('torch.')}",)

    def quantised(self, kept: Tensor) -> Tensor:
        """How many entries are in the stretch where this many are kept, int64 as `kept`."""
        room = (kept - self.start - self.recent).clamp_min(0)
        return room if self.length is None else room.clamp_max(self.length)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        low = self.quantised(selected)
        whole = DenseFormat(self.dtype).nbytes(shape, selected - low)
        some = (low > 0).any(dim=1)  # elsewhere nothing is quantised
        low, partial = low[some], low[some & (selected < shape.tokens).any(dim=1)]
        widths = shape.key_width, shape.value_width
        codes = int(low.sum()) * sum(-(-width * self.bits // 8) for width in widths)
        levels = low.numel() * 2 * _HALF * sum(widths)
        return whole + codes + levels + 2 * index_nbytes(low) + bitmap_nbytes(partial, shape.tokens)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        keep = tiers > 0
        count = self.quantised(keep.sum(dim=1))
        low = first_of(keep, self.start + count) & ~first_of(keep, torch.full_like(count, self.start))
        whole = DenseFormat(self.dtype).build(layer, (keep & ~low).to(tiers.dtype), None)
        if not bool(low.any()):
            return whole
        keys = ChannelRows.of(layer.keys[low].float(), count, self.bits, self.key_share)
        values = ChannelRows.of(layer.values[low].float(), count, self.bits, self.value_share)
        if bool(keep.all()):  # one stretch for all heads
            settled = FrozenStore(keys, values, None, self.start + int(count[0]), self.start)
        else:
            settled = FrozenStore.where(keys, values, low)
        return CalibratedStore(whole, settled, self.drop)


class CalibratedStore(SplitStore):
    """A whole part, which new tokens enter, and a settled one at few bits, whose scores are lowered."""

    attends_itself = True

    def __init__(self, whole: Store, settled: FrozenStore, drop: float) -> None:
        super().__init__((whole, settled))
        self.whole, self.settled, self.drop = whole, settled, drop

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        low_keys, low_values = self.settled.sides(keys.data.dtype, 0, pin)

        def settled(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            if scoring.softcap is not None:
                raise NotApplicable("scores that are lowered have a softcap")
            asked, raised = lowered_query(query, low_keys, scoring, self.drop)
            out, lse = state(decode_packed(asked, low_keys, low_values, scoring, lse=True))
            return out, lse + raised

        return [self.whole.growing_part(keys, values, steps, pin), settled]

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        # What is drawn together are scores that have been capped.
        return None if scoring.softcap is not None else super().by_kernel(query, query_positions, scoring)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        out = None if weights else self.by_kernel(query, query_positions, scoring)
        if out is not None:
            return out, None
        held, settled = self.contents(query.dtype), self.settled.slots()[0].shape[1]
        visible = seen_by(query_positions, held.positions, held.valid, scoring)
        offsets = scoring.offsets(query_positions, held.positions[:, None, None])
        kv_heads, slots, _ = held.keys.shape
        grouped = query.unflatten(0, (kv_heads, -1))  # [k, g, q, d]
        outs, rows = [], []
        for part in torch.arange(query.shape[1]).split(max(1, _ROWS_BYTES // (4 * query.shape[0] * slots))):
            seen = visible if visible is None or visible.shape[1] == 1 else visible[:, part]
            products = (grouped[:, :, part] @ held.keys[:, None].transpose(2, 3)).float()  # [k, g, q, m]
            scores = scoring.scores(products, None if seen is None else seen[:, None], offsets)
            scores[..., -settled:] = lowered(scores[..., -settled:], self.drop)
            rows.append(normalised(scores, scoring))
            outs.append((rows[-1].to(query.dtype) @ held.values[:, None]).flatten(0, 1))
        return torch.cat(outs, dim=1), torch.cat(rows, dim=2) if weights else None

    def clone(self) -> Self:
        return type(self)(self.whole.clone(), self.settled.clone(), self.drop)


def lowered(scores: Tensor, drop: float) -> Tensor:
    """The scores [..., m] of each row drawn together, so that the largest falls by `drop` and the smallest stays.

    Hidden scores, minus infinity, take no part. Where they span less than `drop` all fall to the smallest: the order
    is never turned round.
    """
    hidden = scores.isinf()
    low = scores.masked_fill(hidden, torch.inf).amin(dim=-1, keepdim=True)
    share = share_of(low, scores.amax(dim=-1, keepdim=True), drop)
    return torch.where(hidden, scores, low + (scores - low) * share)
