"""What a layer's store holds while decoding, shown as a reading is: so that any scorer scores it unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workbench.core.attention_rows import attention_rows
from workbench.errors import NotApplicable
from workbench.kv.stores.store import Dequantised
from workbench.trace import LayerTrace


@dataclass(frozen=True, repr=False)
class HeldLayer(LayerTrace):
    """The entries that a store holds, in the order of their positions, and the last queries that were asked.

    keys, values: [k, m, d], of which `tokens` is m, at true positions [k, m]. queries [h, w, d]: only the last few, at
    positions asked [w]. Attention is theirs over what is held, by true positions.
    """

    where: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    asked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @property
    def queries(self) -> Tensor:
        if not self.asked.numel():
            raise NotApplicable(
                "these scores are made from queries, of which none are held while decoding: raise `queries`"
            )
        return super().queries

    @property
    def positions(self) -> Tensor:
        return self.where

    @property
    def end(self) -> int:
        return int(self.where.max()) + 1

    def attention_rows(self, last: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        first = 0 if last is None else max(0, self.asked.numel() - last)
        yield from attention_rows(
            self.queries[:, first:],
            self.keys,
            self.scoring,
            query_positions=self.asked[first:],
            key_positions=self.where,
        )

    def received(self) -> Tensor:
        """Attention that each entry received from the queries that are held, [k, m] float32."""
        return sum(
            (
                rows.view(self.kv_heads, self.groups, *rows.shape[1:]).sum(dim=(1, 2))
                for _, rows in self.attention_rows()
            ),
            start=torch.zeros(self.kv_heads, self.tokens, device=self.device),
        )

    def unrotated_queries(self) -> Tensor:
        return self.rotation.undo(self.queries.float(), self.asked)


def scores_by_slot(
    layer: LayerTrace, held: Dequantised, queries: Tensor, asked: Tensor, score: Callable[[HeldLayer], Tensor]
) -> Tensor:
    """What `score` gives to everything held, float32 [k, m] by slot; minus infinity where a slot holds nothing.

    layer: the layer without data. queries [h, w, d] at positions asked [w]. Heads of unequal length are scored one by
    one, each with the queries of its group, and the others together.
    """
    heads = held.keys.shape[0]
    where = held.positions.expand(heads, -1).long()
    if held.valid is None:
        order = where.argsort(dim=1)
        scores = score(view(layer, held.keys, held.values, where, order, queries, asked))
        return torch.empty_like(scores).scatter_(1, order, scores)
    out = torch.full(where.shape, -torch.inf, device=where.device)
    for head, (row, real) in enumerate(zip(where, held.valid, strict=True)):
        slots = real.nonzero()[:, 0]
        order = slots[row[slots].argsort()][None]
        shared = slice(head * len(queries) // heads, (head + 1) * len(queries) // heads)
        part, group = slice(head, head + 1), queries[shared]
        seen = view(
            replace(layer, scoring=layer.scoring.of(shared)),
            held.keys[part],
            held.values[part],
            where[part],
            order,
            group,
            asked,
        )
        out[part].scatter_(1, order, score(seen))
    return out


def view(
    layer: LayerTrace, keys: Tensor, values: Tensor, where: Tensor, order: Tensor, queries: Tensor, asked: Tensor
) -> HeldLayer:
    """The entries of keys [k, m, d], values [k, m, dv] in slots order [k, e], which ascends by their positions."""
    return HeldLayer(
        index=layer.index,
        keys_held=keys.gather(1, order[..., None].expand(-1, -1, keys.shape[2])),
        values_held=values.gather(1, order[..., None].expand(-1, -1, values.shape[2])),
        queries_held=queries,
        device=keys.device,
        scoring=replace(layer.scoring, window=None, chosen=None),
        rotary=layer.rotary,
        where=where.gather(1, order),
        asked=asked,
    )
