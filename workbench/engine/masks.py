"""What a model says about which positions each of its layers sees: asked, checked, and never materialised.

Handlers mask by the true positions of what they hold, so they need a mask's rule, not its entries. A model makes its
masks through transformers' mask interface, which hands over the rule as a predicate; `announced` tries it on chosen
rows and gives the model an `AnnouncedMask` in return, a tensor without data that carries the rule to the layers. A
model that computes with it is refused, for what it makes of it is another mask than the one announced. Only an indexer
(sparse attention) gets data: it takes the mask of one head to hide later keys from scores of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from workbench.errors import NotApplicable
from workbench_kernels import Scoring

_ROWS = 48  # of a long mask so many rows are tried, besides those at a window's edge
_aten = torch.ops.aten  # what a layer may do to a mask it only hands on: cut, copy, move
_HANDED_ON = (
    _aten.slice.Tensor,
    _aten._to_copy.default,  # noqa: SLF001  (the operator's name)
    _aten.to.dtype,  # what the same is in inference mode
    _aten.to.dtype_layout,
    _aten.alias.default,
    _aten.detach.default,
)


@dataclass(frozen=True)
class Span:
    """Which positions a query sees: all up to its own, the last `window` of them, its own included, or those of its own
    `chunk`, of so many positions each.

    limit: where more tokens than this are seen the rule is unknown; None: it never is.
    refusal: why a layer with this mask cannot be read as a decoder; None: it can.
    """

    window: int | None = None
    limit: int | None = None
    chunk: int | None = None
    refusal: str | None = None


class AnnouncedMask(Tensor):
    """A boolean mask [1, 1, q, n] of the model's device, without data: only `span` is known of it."""

    span: Span

    @staticmethod
    def __new__(cls: type[Self], shape: torch.Size, device: torch.device, span: Span) -> Self:
        made: Self = Tensor._make_wrapper_subclass(  # noqa: SLF001  (torch documents it)
            cls, shape, dtype=torch.bool, device=device
        )
        made.span = span
        return made

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # torch's own would read the data
        return f"AnnouncedMask({list(self.shape)}, {self.span})"

    def of_one_head(self) -> Tensor:
        """The same for one head, with data: bool [1, q, n], where the last query stands at the last key."""
        if self.span.refusal is not None:
            raise NotApplicable(f"an indexer {self.span.refusal}: it cannot be read exactly as a decoder")
        queries, keys = self.shape[-2:]
        columns = torch.arange(keys, device=self.device)
        return _visible(columns[keys - queries :], columns, self.span.window)[None]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a function there
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        masks = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, AnnouncedMask)]
        if func is _aten.select.int and args[1] == 1:
            return masks[0].of_one_head()
        if func not in _HANDED_ON or len(masks) != 1:
            raise NotApplicable(
                f"this model computes with its attention mask ({func.__name__}) instead of handing it to its "
                "attention, so it sees other positions than it announces: it cannot be read exactly"
            )
        options = dict(kwargs or {})
        device = torch.device(options.pop("device", None) or masks[0].device)
        stand_in = torch.empty(masks[0].shape, dtype=torch.bool, device="meta")
        options.pop("dtype", None)  # whatever it is cast to, it is only handed on
        shape = func(stand_in, *args[1:], **options).shape
        return cls(shape, device, masks[0].span)


def announced(
    rule: Callable[..., Tensor],
    queries: int,
    keys: int,
    local_size: int | None,
    device: torch.device,
    *,
    before: int = 0,
    check: bool,
) -> AnnouncedMask:
    """The mask of a pass over as many queries as keys, by the rule (batch, head, query, key) -> visible.

    local_size: what the model calls the width of its layer's window or chunk. before: how many keys stand before the
    first query, of earlier passes. check: try the rule; without it the width is believed to be a window's (for passes
    whose positions are not one after another, and of single tokens in the midst of a text).
    """
    span = Span(local_size)
    if before + queries != keys:
        span = Span(refusal="attends to something beside the tokens read (an encoder, a prefix)")
    elif check:
        span = _span(rule, keys, local_size, device)
    return AnnouncedMask(torch.Size((1, 1, queries, keys)), device, span)


def checked(mask: Tensor, tokens: int) -> None:
    """Raise NotApplicable unless a mask that a model made by itself, [1, 1 or h, q, n], is plainly causal.

    Booleans say what is seen; numbers are added to the scores.
    """
    if mask.ndim != 4 or mask.shape[0] != 1 or mask.shape[-2:] != (tokens, tokens):
        raise NotApplicable(f"this model makes a mask of shape {list(mask.shape)} for {tokens} tokens; not supported")
    seen = mask[0] if mask.dtype == torch.bool else mask[0] > torch.finfo(mask.dtype).min / 4
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    if not bool((seen == causal).all()) or (mask.dtype != torch.bool and bool(mask[0].masked_fill(~causal, 0).any())):
        raise NotApplicable(
            "this model makes an attention mask of its own that is not plainly causal (a bias, a window, a prefix): it "
            "cannot be read exactly"
        )


def _span(rule: Callable[..., Tensor], keys: int, local_size: int | None, device: torch.device) -> Span:
    """The span that the rule describes on a pass over so many tokens."""
    rows = torch.linspace(0, keys - 1, min(_ROWS, keys), device=device).round().long().unique()
    if local_size is not None:
        edge = torch.tensor([local_size - 1, local_size, local_size + 1, keys - 1], device=device)
        rows = torch.cat([rows, edge[(edge >= 0) & (edge < keys)]]).unique()
    columns = torch.arange(keys, device=device)
    seen = _tried(rule, rows, columns)
    width = local_size
    if width is not None and bool((seen == _visible(rows, columns, chunk=width)).all()) and width < keys:
        return Span(chunk=width)
    if not bool((seen == _visible(rows, columns, width)).all()):
        width = int(seen[-1].sum()) if not bool(seen[-1].all()) else None  # the last row sees as far as any
        if not bool((seen == _visible(rows, columns, width)).all()):
            ahead = bool((seen & ~_visible(rows, columns, None)).any())
            return Span(refusal="attends to later tokens too" if ahead else "attends in blocks")
    if width is None or width >= keys:
        return _far(rule, local_size, device) if local_size is not None else Span(width)
    return Span(width)


def _far(rule: Callable[..., Tensor], width: int, device: torch.device) -> Span:
    """The span of a rule that looks causal so far: at the edges of its window or chunk, where no token is yet."""
    rows = torch.tensor([width - 1, width, width + 1, 2 * width, 2 * width + 1], device=device)
    columns = torch.arange(2 * width + 2, device=device)
    try:
        seen = _tried(rule, rows, columns)
    except IndexError:  # a rule that looks things up by position, and has them for the tokens of this pass only
        return Span(width, limit=width)
    for span in (Span(width), Span(chunk=width)):
        if bool((seen == _visible(rows, columns, span.window, span.chunk)).all()):
            return span
    return Span(None, limit=width)


def _tried(rule: Callable[..., Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    """What the rule says of rows [r] and columns [n]: bool [r, n]."""
    zero = torch.zeros((), dtype=torch.long, device=rows.device)
    seen = rule(zero, zero, rows[:, None], columns[None, :])
    return torch.as_tensor(seen, device=rows.device).expand(rows.numel(), columns.numel())


def _visible(rows: Tensor, columns: Tensor, width: int | None = None, chunk: int | None = None) -> Tensor:
    """A causal window, or causal chunks, over rows [r] and columns [n]: bool [r, n]."""
    return Scoring(1.0, width, chunk=chunk).visible(rows, columns)
