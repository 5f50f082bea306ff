"""Keys with fewer channels: older tokens keep some channels of their keys, the newest and all values stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.dense import whole_rows
from workbench.kv.stores.format import INDEX_BYTES, Format, Shape, index_nbytes
from workbench.kv.stores.packed import first_of
from workbench.kv.stores.parts import PartedStore
from workbench.kv.stores.positioned import PositionedStore, positions_in
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Store, seen_by, state
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.decode import decode_dense
from workbench_kernels.rows import Ragged
from workbench_kernels.softmax import attention_weights

_CHANNEL_BYTES = 2  # int16
_ROWS_BYTES = 64 << 20  # score rows are worked on in blocks of about this size


class PrunedStore(PositionedStore, PartedStore):
    """An older part whose keys have only `channels` [k, c], and a newer part, which new tokens enter, with all.

    Slots are those of the older part, then those of the newer one. Attention multiplies the queries' kept channels
    with the narrow keys: they are never widened again.
    """

    def __init__(
        self,
        channels: Tensor,
        older: tuple[Rows, Rows],
        newer: tuple[Rows, Rows],
        positions: tuple[Rows, Rows] | None,
    ) -> None:
        """channels int16 [k, c]; older and newer: keys (of c channels, of d) and values; positions of both parts, or
        None if every position from 0 on is held.
        """
        super().__init__(*positions or ())
        self.channels, self.older, self.newer = channels, older, newer

    @classmethod
    def where(
        cls, keys: Tensor, values: Tensor, keep: Tensor, channels: Tensor, recent: int, dtype: torch.dtype
    ) -> PrunedStore:
        """The entries of keys [k, n, d], values [k, n, dv] at which keep [k, n] is True, all but the last `recent` of
        each head with only the key channels [k, c].
        """
        old = first_of(keep, (keep.sum(dim=1) - recent).clamp_min(0))
        new = keep & ~old
        thin = keys.gather(2, channels.long()[:, None].expand(-1, keys.shape[1], -1))  # [k, n, c]
        return cls(
            channels.to(torch.int16),
            (Rows.where(thin, old, dtype), Rows.where(values, old, dtype)),
            (Rows.where(keys, new, dtype), Rows.where(values, new, dtype)),
            positions_in(keep, old, new),
        )

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.newer[0].append(keys)
        self.newer[1].append(values)
        self._append_positions(positions)

    def reserve(self, tokens: int) -> None:
        for rows in (*self.newer, *self._positions[1:]):
            rows.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.newer[0].heads

    @property
    def device(self) -> torch.device:
        return self.channels.device

    @property
    def _complete_length(self) -> int:
        return self.older[0].longest + self.newer[0].longest

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        thin, whole = self.older[0].view().to(dtype), self.newer[0].view().to(dtype)
        wide = thin.new_zeros(*thin.shape[:2], whole.shape[-1])
        wide.scatter_(2, self.channels.long()[:, None].expand(-1, thin.shape[1], -1), thin)
        values = torch.cat([self.older[1].view(), self.newer[1].view()], dim=1).to(dtype)
        return torch.cat([wide, whole], dim=1), values

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.newer

    @property
    def placed(self) -> tuple[Rows, ...]:
        return self._positions[-1:]

    def advance(self, positions: Tensor) -> None:
        self._grown(self.newer, positions)

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        thin, wide = (pin(rows, rows.longest) for rows in self.older)
        channels = self.channels.long()[:, None]  # [k, 1, c]

        def older(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            grouped = query.reshape(len(channels), -1, query.shape[2])
            asked = grouped.gather(2, channels.expand(-1, grouped.shape[1], -1))
            return state(decode_dense(asked.reshape(*query.shape[:2], -1), thin, wide, scoring, lse=True))

        return [whole_rows(keys, values)] if not self.older[0].longest else [older, whole_rows(keys, values)]

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        out = None if weights else self.by_kernel(query, query_positions, scoring)
        if out is not None:
            return out, None
        positions, valid = self.slots()
        visible = seen_by(query_positions, positions, valid, scoring)
        offsets = scoring.offsets(query_positions, positions[:, None, None])
        thin, whole = self.older[0].view().to(query.dtype), self.newer[0].view().to(query.dtype)
        values = torch.cat([self.older[1].view(), self.newer[1].view()], dim=1).to(query.dtype)  # [k, m, dv]
        kv_heads, slots = values.shape[:2]
        heads, count = query.shape[:2]
        grouped = query.reshape(kv_heads, heads // kv_heads, count, -1)  # [k, g, q, d]
        outs, rows = [], []
        for part in torch.arange(count).split(max(1, _ROWS_BYTES // (4 * heads * max(slots, 1)))):
            asked = grouped[:, :, part]
            kept = self.channels.long()[:, None, None].expand(*asked.shape[:3], -1)
            old = asked.gather(-1, kept).flatten(1, 2) @ thin.transpose(1, 2)  # [k, g*q, older]
            new = asked.flatten(1, 2) @ whole.transpose(1, 2)
            products = torch.cat([old, new], dim=-1).float().unflatten(1, asked.shape[1:3])  # [k, g, q, m]
            seen = visible if visible is None or visible.shape[1] == 1 else visible[:, part]
            probs = attention_weights(products, scoring, None if seen is None else seen[:, None], offsets)
            outs.append((probs.flatten(1, 2).to(values.dtype) @ values).view(heads, part.numel(), -1))
            rows.append(probs)
        return torch.cat(outs, dim=1), torch.cat(rows, dim=2) if weights else None

    def tensors(self) -> dict[str, list[Tensor]]:
        tensors = [t for rows in (*self.older, *self.newer, *self._positions) for t in rows.tensors()]
        return {str(self.newer[0].data.dtype).removeprefix("torch."): [*tensors, self.channels]}

    def clone(self) -> Self:
        twin = super().clone()
        twin.channels = self.channels.clone()
        twin.older, twin.newer = ((keys.clone(), values.clone()) for keys, values in (self.older, self.newer))
        return twin


@dataclass(frozen=True)
class PrunedFormat(Format):
    """Kept entries at `dtype`, the keys of all but the last `recent` without a share `pruned` of their channels.

    queries: how many of the prompt's last queries decide which channels stay (see `channel_scores`).
    """

    dtype: torch.dtype
    pruned: float
    recent: int
    queries: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{str(self.dtype).removeprefix('torch.')}, {self.pruned:.0%} of key channels pruned",)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        channels = kept_of(shape.key_width, self.pruned)
        older = (selected - self.recent).clamp_min(0)
        newer = selected - older
        keys = int(older.sum()) * channels + int(newer.sum()) * shape.key_width
        partial = (selected < shape.tokens).any(dim=1)  # these need positions
        indices = sum(2 * index_nbytes(rows) + index_nbytes(rows[partial]) for rows in (older, newer))
        return (
            (keys + int(selected.sum()) * shape.value_width) * shape.itemsize
            + _CHANNEL_BYTES * channels * selected.numel()
            + int(selected[partial].sum()) * INDEX_BYTES
            + indices
        )

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        count = kept_of(layer.keys_held.shape[-1], self.pruned)
        scores = channel_scores(layer, tiers > 0, self.queries)
        channels = scores.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(dim=-1).values
        return PrunedStore.where(layer.keys, layer.values, tiers > 0, channels, self.recent, self.dtype)


def channel_scores(layer: LayerTrace, keep: Tensor, queries: int) -> Tensor:
    """How much each key channel adds to the scores of the last `queries` queries, float32 [k, d].

    ||q_j|| * ||k_j||: the Frobenius norm of the outer product of channel j of those queries (all of a KV head's group
    together) with channel j of the keys at which keep [k, n] is True.
    """
    asked = layer.queries[:, -queries:].float().square().sum(dim=1)  # [h, d]
    asked = asked.unflatten(0, (-1, layer.groups)).sum(dim=1)  # [k, d]
    keys = layer.keys.float().square().mul_(keep[..., None]).sum(dim=1)
    scores: Tensor = (asked * keys).sqrt()
    return scores


def kept_of(width: int, pruned: float) -> int:
    """How many of `width` numbers stay when a share of them is pruned, at least one."""
    return max(width - int(width * pruned + 1e-9), 1)
