"""What attention over the prompt is made of under a recipe: the recorded queries over the keys that are held, or the
weights that an attention method made while it read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench import arguments
from workbench.attention.base import AttentionMethod
from workbench.inspection.implied import Implied
from workbench.kv.plan import Plan
from workbench.measure.attention import PooledMap, Pooling, Span, column_sums, pooled_maps
from workbench.measure.head_classes import HeadStats
from workbench.measure.heads import judge
from workbench.progress import Progress
from workbench.trace import LayerTrace
from workbench_kernels import Scoring


@dataclass(frozen=True)
class Captured:
    """What the attention of one layer, or of one query head of it, is computed from.

    queries [h, n, d], at positions 0 .. n - 1; keys [k, m, d]; positions int64 [k or 1, m], ascending: n, which no
    query sees, where a head holds fewer than others. scoring: as in LayerTrace.
    """

    queries: Tensor
    keys: Tensor
    positions: Tensor
    scoring: Scoring

    @property
    def tokens(self) -> int:
        return self.queries.shape[1]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the measures of `workbench.measure`, which take queries and keys before them."""
        return {
            "scoring": self.scoring,
            "query_positions": torch.arange(self.tokens),
            "key_positions": self.positions,
        }

    def maps(
        self,
        *,
        pixels: int = 512,
        pooling: Pooling = "max",
        rows: Span | None = None,
        cols: Span | None = None,
        progress: Progress | None = None,
    ) -> list[PooledMap]:
        """The map of each query head, pooled as `pooled_maps` does."""
        shown: dict[str, Any] = {
            "pixels": pixels,
            "pooling": pooling,
            "rows": rows,
            "cols": (0, self.tokens) if cols is None else arguments.span("cols", cols, self.tokens),
        }
        return pooled_maps(self.queries, self.keys, **self.options, **shown, progress=progress)

    def received(self, progress: Progress | None = None) -> Tensor:
        """What each position receives from all queries together: float32 [h, n], on the CPU."""
        sums = column_sums(self.queries, self.keys, **self.options, progress=progress).cpu()  # [h, m]
        at = self.positions.repeat_interleave(len(sums) // len(self.positions), dim=0)
        return torch.zeros(len(sums), self.tokens + 1).scatter_add_(1, at, sums)[:, : self.tokens]

    def judge(self, ids: Tensor, progress: Progress | None = None) -> HeadStats:
        """The statistics of the query heads; ids: the prompt's tokens [n]."""
        return judge(self.queries, self.keys, ids, **self.options, progress=progress)


def capture(layer: LayerTrace, plan: Plan | None = None, head: int | None = None) -> Captured:
    """One layer as it was recorded, or with what a plan holds of its keys; head: only that query head.

    With a plan every query looks at what the plan keeps, as if it had been decided before the prompt was read. Keys are
    those that the plan's stores hold, merged and dequantised; what they hold in host memory is all there. Recorded keys
    stand in where a store only rounds them to the type in which the uncompressed cache is held too, so that the
    difference of two maps shows the method; in layers that stay exact; and for plans of methods that read the prompt by
    themselves, whose own keys belong to other queries than those recorded.
    """
    query_heads = slice(None) if head is None else slice(head, head + 1)
    kv = slice(None) if head is None else slice(head // layer.groups, head // layer.groups + 1)
    queries = layer.queries_held[query_heads].to(layer.device)
    if plan is None or layer.index in plan.exact:
        keys, positions = layer.keys_held[kv].to(layer.device), torch.arange(layer.tokens)[None]
    elif _only_selects(plan):
        there = plan.tiers[layer.index, kv] > 0  # [k, n]
        keys, positions = _in_order(
            layer.keys_held[kv].to(layer.device), torch.arange(layer.tokens, device=there.device)[None], there
        )
    else:
        contents = plan.store(layer).contents(torch.float32)
        kv_heads, slots = contents.keys.shape[:2]
        every = torch.ones(kv_heads, slots, dtype=torch.bool, device=contents.keys.device)
        keys, positions = _in_order(
            contents.keys[kv],
            contents.positions.expand(kv_heads, -1)[kv],
            (every if contents.valid is None else contents.valid)[kv],
            end=layer.tokens,
        )
    return Captured(queries, keys, positions, layer.scoring.of(query_heads))


def changes_reading(method: AttentionMethod | None) -> bool:
    """Whether an attention method changes what the queries of a prompt see, and not only decoding."""
    return method is not None and method.changes_prefill


def has_to_run(method: AttentionMethod | None) -> bool:
    """Whether the weights that a method makes are found only by running it, which takes much longer than to look at
    exact attention; else they are a softmax over recorded queries and keys.
    """
    return method is not None and not method.softmax_weights


def as_read(
    method: AttentionMethod, layers: Sequence[LayerTrace], layer: int, head: int | None = None
) -> Captured | Implied:
    """One layer as an attention method computed it while the prompt was read; head: only that query head.

    layers: all that were recorded under the method. A layer that reuses the weights of another (UniAttn) shows those,
    its queries and keys in the narrower of both windows: dropping weights and scaling the others up is the softmax
    over what is left.
    """
    if has_to_run(method):
        below = tuple(layers[:layer]) if method.goes_by_earlier else ()
        return Implied(method, layers[layer], len(layers), head, below)
    source = layers[method.source_layer(layer, len(layers))]
    widths = [width for width in (layers[layer].window, source.window) if width is not None]
    captured = capture(source, head=head)
    return replace(captured, scoring=replace(captured.scoring, window=min(widths, default=None)))


def _only_selects(plan: Plan) -> bool:
    """Whether the plan's stores hold recorded keys in the type of the uncompressed cache, and nothing else."""
    return plan.chunked or (plan.format.exact and (plan.stages.merge is None or plan.keeps_all))


def _in_order(keys: Tensor, positions: Tensor, there: Tensor, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys [k, m, d] at positions [k or 1, m] by ascending position, without those that are not there [k, m].

    end: the position of slots that a head holds fewer than others, by default the number of slots.
    """
    end = there.shape[1] if end is None else end
    at = torch.where(there, positions.long(), end)
    at, order = at.sort(dim=1, stable=True)
    most = max(int(there.sum(dim=1).max()), 1)
    at, order = at[:, :most], order[:, :most].to(keys.device)
    keys = keys.gather(1, order[..., None].expand(-1, -1, keys.shape[-1]))
    if bool((at == at[:1]).all()):  # one set of positions for all heads is quicker to work with
        at = at[:1]
    return keys, at.cpu()
