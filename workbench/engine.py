"""How the workbench gets between a model and its attention: through transformers' extension points, and nowhere else.

`forward(model, handler, ...)` runs one forward pass in which every attention layer calls `handler.attend`. The handler
travels as a keyword of the call, so no state stays on the model and two sessions never meet; a lock per model keeps the
switch of its attention implementation to one pass at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.errors import NotApplicable, WorkbenchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

NAME = "workbench"


class Handler(Protocol):
    """What a forward pass does in place of each layer's attention."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # [h, n, d]
        key: Tensor,  # [k, n, d]: of the tokens of this pass only
        value: Tensor,  # [k, n, dv]
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [h, n, dv]
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    workbench: Handler | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if workbench is None:
        raise WorkbenchError(
            "this model was called directly while a session is running it in another thread; wait for the run to end"
        )
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise NotApplicable(
            f"{type(module).__name__} adds learned sinks or position biases to its scores, which is not supported"
        )
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise NotApplicable(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = workbench.attend(
        index, query[0], key[0], value[0], scale=scale, window=sliding_window or None, softcap=softcap or None
    )
    return out.transpose(0, 1).unsqueeze(0), None  # [1, n, h, dv]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Handlers mask by the true positions of what they hold: a mask by cache slots would be wrong."""


@cache
def _make_known() -> None:
    """Register our attention with transformers, when it is first needed: importing it takes seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


_passing: ContextVar[Handler | None] = ContextVar("passing", default=None)


def passing() -> Handler | None:
    """The handler of the pass that calls this, for modules that remember something of a run in the run itself."""
    return _passing.get()


_locks: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_locks_guard = RLock()


@contextmanager
def exclusive(model: PreTrainedModel) -> Iterator[None]:
    """Until the block ends no other thread has the model engaged."""
    with _locks_guard:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield


@contextmanager
def engaged(model: PreTrainedModel) -> Iterator[None]:
    """Let the model call our attention function until the block ends, whatever happens in it."""
    _make_known()
    with exclusive(model):
        before = model.config._attn_implementation or "eager"
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids."""
    return cast("torch.device", model.get_input_embeddings().weight.device)


def forward(
    model: PreTrainedModel,
    handler: Handler,
    ids: Tensor,
    positions: Tensor,
    *,
    cache: Cache | None = None,
    logits: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """One pass over ids [n] at true positions [n]; returns the last `logits` rows of logits, float32 [logits, v].

    mask: any tensor of four dimensions. Handlers ignore it, but the model then does not look at the positions to make
    one, for which the host would wait for the device.
    """
    device = device_of(model)
    with engaged(model), torch.inference_mode():
        before = _passing.set(handler)
        try:
            output = model(
                input_ids=ids.to(device)[None],
                attention_mask=mask,
                position_ids=positions.to(device)[None],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=logits,
                workbench=handler,
            )
        finally:
            _passing.reset(before)
        return output.logits[0].float()
