"""An operator beside exact attention, on what a reading recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench import arguments
from workbench.attention.operators.base import Operator, chunks
from workbench.core.attention_rows import RowBlock
from workbench.core.causal_attention import causal_attention
from workbench.errors import NotApplicable
from workbench.formatting import Brief, quoted
from workbench.measure.attention import PooledMap, Pooling, Span, pool_rows, pooled_map
from workbench.measure.quality import output_error
from workbench.progress import Progress
from workbench.trace import LayerTrace, Trace


@dataclass(frozen=True, eq=False, repr=False)
class Study(Brief):
    """What an operator makes of one layer: its output error for each head, and one head's implied map."""

    operator: Operator
    layer: int
    heads: tuple[int, ...]
    """the query heads that errors are of"""
    error: Tensor
    """[heads] float32: relative L2 error of each one's output against exact attention"""
    scaled_error: Tensor
    """[heads] float32, 0 to 1: what is left of it after the factor that suits the head best, as a norm after the
    operator would find one; 1: nothing in common"""
    head: int
    """the query head of the maps"""
    implied: PooledMap
    """the operator's weights, which may be negative, pooled"""
    exact: PooledMap
    """softmax attention on the same cells"""

    def to_dict(self) -> dict[str, Any]:
        """The figures without the maps, ready for JSON."""
        return {
            "operator": self.operator.to_dict(),
            "layer": self.layer,
            "heads": list(self.heads),
            "error": self.error.tolist(),
            "scaled_error": self.scaled_error.tolist(),
            "head": self.head,
        }


def study(
    operator: Operator,
    layer: LayerTrace,
    head: int = 0,
    *,
    heads: Iterable[int] | None = None,
    pixels: int = 512,
    pooling: Pooling = "max",
    rows: Span | None = None,
    cols: Span | None = None,
    progress: Progress | None = None,
) -> Study:
    """Compare an operator with exact attention on one layer's recording.

    head: the query head whose maps are wanted. heads: those whose output errors are, by default all, possibly none;
    each is computed by itself. pixels, pooling, rows, cols: as in `workbench.measure.pooled_map`; a span no longer than
    `pixels` shows each token. Exact attention has the layer's window, soft cap, sinks and slopes; the operator has
    none of them. Memory
    grows with the pixels and with the prompt's tokens times `operator.chunk`.

    Raises BadParameter for a head that is not there.
    """
    wanted = tuple(range(layer.heads) if heads is None else arguments.several("heads", heads, "query heads"))
    for each in (head, *wanted):
        arguments.index("head", each, layer.heads, "the model's query heads")
    implied = implied_map(
        operator, layer, head, pixels=pixels, pooling=pooling, rows=rows, cols=cols, progress=progress
    )
    exact = pooled_map(
        *_one_head(layer, head)[:2],
        layer.scoring.of(head),
        pixels=pixels,
        pooling=pooling,
        rows=rows,
        cols=cols,
        progress=progress,
    )
    errors = [
        _errors(operator, layer, each)
        for each in (wanted if progress is None else progress.track(wanted, "output error", len(wanted)))
    ]
    error, scaled = torch.tensor(errors, dtype=torch.float32).view(len(wanted), 2).unbind(1)
    return Study(operator, layer.called, wanted, error, scaled, head, implied, exact)


def study_operator(
    trace: Trace, operator: Operator, layer: int, head: int = 0, *, pixels: int = 512, **view: Any
) -> Study:
    """`study` on a layer of a recording. Raises NotRead for one without queries, keys and values, BadParameter for a
    layer that is not there.
    """
    if not isinstance(operator, Operator):
        raise NotApplicable(f"{quoted(operator)} is no operator: wb.methods('operator') lists them")
    trace.need_recording()
    return study(operator, trace.layers[trace.place(layer)], head, pixels=pixels, **view)


def implied_map(
    operator: Operator,
    layer: LayerTrace,
    head: int,
    *,
    pixels: int = 512,
    pooling: Pooling = "max",
    rows: Span | None = None,
    cols: Span | None = None,
    progress: Progress | None = None,
) -> PooledMap:
    """The map of weights that an operator implies for one query head, pooled; see `study`."""
    query, key, _ = _one_head(layer, head)
    of_head = operator.for_head(head, layer.heads).prepared(query[None], key[None], layer.scale)

    def blocks(first: int, stop: int) -> Iterator[RowBlock]:
        pieces = chunks(first, stop, operator.chunk)
        for low, high in pieces if progress is None else progress.track(pieces, "implied attention", len(pieces)):
            yield RowBlock(slice(low - first, high - first), slice(0, high), of_head(low, high))

    at = torch.arange(layer.tokens)
    return pool_rows(blocks, at, at, pixels=pixels, pooling=pooling, rows=rows, cols=cols)


def _one_head(layer: LayerTrace, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """One query head's queries [n, d], and the keys [n, d] and values [n, dv] that it reads, on the layer's device."""
    kv = head // layer.groups
    held = (layer.queries_held[head], layer.keys_held[kv], layer.values_held[kv])
    query, key, value = (x.to(layer.device) for x in held)
    return query, key, value


def _errors(operator: Operator, layer: LayerTrace, head: int) -> tuple[float, float]:
    """The relative error of one head's output, and the sine of the angle between both outputs."""
    query, key, value = (x[None].float() for x in _one_head(layer, head))
    want = causal_attention(query, key, value, layer.scoring.of(head))
    got = operator.for_head(head, layer.heads).apply(query, key, value, layer.scale)
    cosine = torch.nn.functional.cosine_similarity(want.flatten().double(), got.flatten().double(), dim=0)
    return float(output_error(want, got)), float((1 - cosine.square()).clamp(0, 1).sqrt())
