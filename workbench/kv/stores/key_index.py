"""An index of host memory by the keys themselves: a graph over them that a query searches, or every one compared."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from workbench.kv.stores.format import INDEX_BYTES, Shape
from workbench.kv.stores.graph import Graph
from workbench.kv.stores.group_union import united
from workbench.kv.stores.offload import Index, Retriever
from workbench.trace import LayerTrace, Trace

Guide: TypeAlias = Literal["queries", "keys", "none"]


@dataclass(frozen=True)
class KeyIndex(Index):
    """A graph over the keys of each KV head in host memory, or the keys alone if nothing guides it."""

    fetch: int
    guide: Guide
    beam: int
    guides: int
    neighbours: int
    degree: int
    trace: Trace = field(compare=False, repr=False)

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        return 0

    def host_nbytes(self, shape: Shape, others: Tensor) -> int:
        total = 0
        for longest in others.amax(dim=1).tolist():
            if self.guide == "none":
                total += shape.kv_heads * 4 * shape.key_width * longest
            else:
                total += Graph.nbytes(shape.kv_heads, longest, shape.key_width, self.degree)
            total += shape.kv_heads * INDEX_BYTES
        return total

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        # The graph of the latest selection is remembered: stores are built for every run and judging.
        key = ("key graph", self.guide, self.guides, self.neighbours, self.degree, layer.index)
        latest = self.trace.once(key, dict[bytes, tuple[Graph, Tensor]])
        which = others.cpu().numpy().tobytes()
        if which not in latest:
            built = self._graph(layer, others.to(layer.device))
            latest.clear()
            latest[which] = built
        graph, lengths = latest[which]
        return Keys(graph, lengths, self, layer.device)

    def _graph(self, layer: LayerTrace, others: Tensor) -> tuple[Graph, Tensor]:
        """The graph, and how many keys of each head are in it, int32 [k]."""
        keys, lengths = padded(layer.keys.float(), others)
        if self.guide == "none":
            none = torch.empty(0, dtype=torch.int32)
            return Graph(keys.cpu(), none, none), lengths.to("cpu", torch.int32)
        guides = self._guides(layer, keys, lengths)
        graph = Graph.guided_by(guides, keys, lengths, self.neighbours, self.degree)
        return graph, lengths.to("cpu", torch.int32)

    def _guides(self, layer: LayerTrace, keys: Tensor, lengths: Tensor) -> Tensor:
        """The vectors that guide the graph, [k, t, d]."""
        if self.guide == "keys":
            steps = torch.linspace(0, 1, min(self.guides, int(lengths.max())), device=keys.device)
            slots = (steps * (lengths[:, None] - 1).clamp_min(0)).round().long()  # [k, t]
            return keys.gather(1, slots[..., None].expand(-1, -1, keys.shape[2]))
        each = min(-(-self.guides // layer.groups), layer.tokens)
        positions = torch.linspace(0, layer.tokens - 1, each).round().long()
        queries = layer.queries_held[:, positions.to(layer.queries_held.device)].to(keys.device).float()
        return queries.reshape(layer.kv_heads, -1, queries.shape[2])


def padded(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x [k, n, d] at which chosen [k, n] is True, in front, then zeros: [k, m, d]; and how many, [k]."""
    lengths = chosen.sum(dim=1)
    slots = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    rows = x.gather(1, slots[..., None].expand(-1, -1, x.shape[2]))
    return rows * (torch.arange(rows.shape[1], device=x.device) < lengths[:, None])[..., None], lengths


class Keys(Retriever):
    """The keys in host memory, in a graph, and those that came later (`fresh` [k, f, d])."""

    def __init__(self, graph: Graph, lengths: Tensor, index: KeyIndex, device: torch.device) -> None:
        self.graph, self.lengths, self.device = graph, lengths, device
        self.fresh = graph.keys[:, :0].clone()
        self.fetch, self.beam, self.guided = index.fetch, index.beam, index.guide != "none"

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        heads, queries = len(self.lengths), query.shape[1]
        wanted = query.float().cpu().reshape(heads, -1, query.shape[2])  # [k, g * q, d]
        slots, scores = self._in_prompt(wanted)
        if self.fresh.shape[1] or slots.shape[2] > self.fetch:
            later = torch.arange(self.fresh.shape[1]) + self.lengths.long()[:, None]
            slots = torch.cat([slots, later[:, None].expand(-1, wanted.shape[1], -1)], dim=2)
            scores = torch.cat([scores, wanted @ self.fresh.transpose(1, 2)], dim=2)
            best = scores.topk(min(self.fetch, scores.shape[2]), dim=2)
            slots, scores = slots.gather(2, best.indices), best.values
        slots = slots.masked_fill(scores == -torch.inf, -1).to(self.device)
        return united(slots, slots >= 0, queries)

    def _in_prompt(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The best of the prompt's keys for query [k, b, d]: slots and inner products, [k, b, c]."""
        keys = self.graph.keys
        count = keys.shape[1]
        if self.guided and self.fetch < count:
            nearest = self.graph.search(query, self.fetch, self.beam)
            return nearest.keys.clamp_max(count - 1), nearest.scores
        scores = query @ keys.transpose(1, 2)
        beyond = torch.arange(count) >= self.lengths[:, None]
        return torch.arange(count).expand_as(scores), scores.masked_fill_(beyond[:, None], -torch.inf)

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.fresh = torch.cat([self.fresh, keys.float().cpu()], dim=1)

    def tensors(self) -> list[Tensor]:
        return []

    def host_tensors(self) -> list[Tensor]:
        return [*self.graph.tensors(), self.lengths, self.fresh]

    def clone(self) -> Keys:
        return copy(self)  # nothing here is ever written to
