"""Entries that are deleted from host memory and computed again by the model when a query needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.engine.images import Images
from workbench.kv.stores.format import INDEX_BYTES, Shape, index_nbytes, left_over
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.rows import Rows
from workbench.trace import LayerTrace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recomputer:
    """Lets the model read the first tokens of a prompt again, for their keys and values.

    One reading gives those of all layers. They are held until each layer has attended, and no longer: between passes
    there is nothing here.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, images: Images | None = None) -> None:
        """ids [n]: the prompt. images: those that are in it."""
        self.model, self.ids, self.images, self.tokens = model, ids, images, 0
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def cover(self, tokens: int) -> None:
        """The first so many tokens may be asked for."""
        self.tokens = max(self.tokens, tokens)

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [k, t, d] and values [k, t, dv] of the tokens covered."""
        if layer not in self._rows:
            with torch.inference_mode():
                forward(self.model, self, self.ids[: self.tokens], torch.arange(self.tokens), images=self.images)
        return self._rows[layer]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self._rows[layer] = key, value
        return causal_attention(query, key, value, scoring)

    def release(self, layer: int) -> None:
        """Let go of the rows of a layer."""
        self._rows.pop(layer, None)


@dataclass(frozen=True)
class Recomputing:
    """Which of a head's entries in host memory are deleted: its oldest, rounded down to a `share` of them."""

    share: float
    recomputer: Recomputer = field(compare=False, repr=False)

    def deleted(self, others: Tensor) -> Tensor:
        """How many entries are deleted where heads have `others` in host memory, int64 of that shape."""
        return (others.double() * self.share + 1e-9).long()

    def rows(
        self, layer: LayerTrace, others: Tensor, form: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> RecomputedRows:
        """The entries of a layer at which others [k, n] is True. form: makes rows of `dtype` of keys or values."""
        deleted = self.deleted(others.sum(dim=1))
        held = others & (others.cumsum(dim=1) > deleted[:, None])
        gone = (others & ~held).any(dim=0).nonzero()
        if len(gone):
            self.recomputer.cover(int(gone[-1]) + 1)
        far = HostRows.where(form(layer.keys), form(layer.values), held, dtype)
        where = torch.arange(layer.tokens).expand(layer.kv_heads, -1)[..., None]
        positions = Rows.where(where, others.cpu(), torch.int32)
        return RecomputedRows(far, positions, deleted.cpu(), layer.index, form, self.recomputer)


class RecomputedRows(HostRows):
    """Host memory that holds the positions of all its entries, but of each head's first `deleted` [k] nothing else."""

    def __init__(
        self,
        held: HostRows,
        positions: Rows,
        deleted: Tensor,
        layer: int,
        form: Callable[[Tensor], Tensor],
        recomputer: Recomputer,
    ) -> None:
        super().__init__(held.keys, held.values, positions, held.device)
        self.deleted, self.layer, self.form, self.recomputer = deleted, layer, form, recomputer

    @property
    def capturable(self) -> bool:
        return False  # the model reads in between

    def fetch(self, slots: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        deleted = self.deleted.to(slots.device)[:, None]  # [k, 1]
        held = self._copied(slots - deleted, (self.keys, self.values))
        places = self._copied(slots, (self.positions,))
        again = (slots >= 0) & (slots < deleted)  # [k, u]
        if not bool(again.any()):
            return lambda: (*held(), *places())

        def wait() -> tuple[Tensor, ...]:
            (positions,) = places()
            missing = again.to(positions.device)[..., None]
            at = positions.masked_fill(~missing[..., 0], 0)[..., None]
            both = zip(self.recomputer.rows(self.layer), held(), strict=True)
            keys, values = (
                torch.where(missing, self.form(x.gather(1, at.expand(-1, -1, x.shape[2]))).to(rows.dtype), rows)
                for x, rows in both
            )
            return keys, values, positions

        return wait

    def whole(self) -> tuple[Tensor, Tensor]:
        steps = torch.arange(self.longest).expand(len(self.deleted), -1)
        keys, values, _ = self.fetch(steps)()
        self.release()
        return keys, values

    def release(self) -> None:
        self.recomputer.release(self.layer)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self.deleted]

    def clone(self) -> RecomputedRows:
        rest = self.deleted, self.layer, self.form, self.recomputer
        return RecomputedRows(super().clone(), self.positions.clone(), *rest)


def far_nbytes(shape: Shape, selected: Tensor, entry_nbytes: int, recomputing: Recomputing | None) -> int:
    """Bytes in host memory of what is not selected, entries of `entry_nbytes` and their positions."""
    others = left_over(shape, selected)
    if not len(others):
        return 0
    deleted = torch.zeros_like(others) if recomputing is None else recomputing.deleted(others)
    held, extra = others - deleted, 0 if recomputing is None else 8 * others.numel()
    entries = int(held.sum()) * entry_nbytes + int(others.sum()) * INDEX_BYTES
    return entries + 2 * index_nbytes(held) + index_nbytes(others) + extra
