"""How the workbench gets between a model and its attention: through transformers' extension points, and nowhere else.

`forward(model, handler, ...)` runs one forward pass in which every attention layer calls `handler.attend`. The handler
is known to the thread of the pass alone, so no state stays on the model and two sessions never meet; a lock per model
keeps the switch of its attention implementation to one pass at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.engine.families.in_place import adapted
from workbench.engine.images import Entered, Images, noting, unchanged
from workbench.engine.latents import Latents, Noting
from workbench.engine.masks import AnnouncedMask, Span, announced, checked
from workbench.engine.standing import standing
from workbench.engine.states import States, has_indexer, keeps_states, states_of
from workbench.errors import NotApplicable, WorkbenchError
from workbench_kernels import Chosen, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

NAME = "workbench"


class Handler(Protocol):
    """What a forward pass does in place of each layer's attention."""

    def attend(
        self,
        layer: int,  # which of those that attend
        query: Tensor,  # [h, n, d]
        key: Tensor,  # [k, n, d]: of the tokens of this pass only
        value: Tensor,  # [k, n, dv]
        scoring: Scoring,
    ) -> Tensor:  # [h, n, dv]
        ...


@dataclass(frozen=True)
class _Passing:
    """The pass that a thread is in: who attends, and what its masks may be asked.

    told: the mask that the caller gave, which says nothing. plain: positions come one after another, so that a mask
    by places is a mask by positions; a token that comes alone in the midst of a text is none of these, for its mask
    tells nothing. positions: where its tokens stand, int64 [n]. states: of layers that keep some. own: masks that the
    model made by itself and that were found causal. noting: what notes of which rows layers make keys and values.
    """

    handler: Handler
    told: Tensor | None
    plain: bool
    positions: Tensor
    states: States | None = None
    own: list[Tensor] = field(default_factory=list)
    noting: Noting | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  (transformers hands it by name; none is applied)
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    slopes: Tensor | None = None,
    rounded: bool = False,
    layer_idx: int | None = None,  # of layers that do not say it themselves
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    passing = _current()
    kind = type(module).__name__
    if kwargs.get("position_bias") is not None:
        raise NotApplicable(f"{kind} adds a bias of its own to each score (position_bias), which is not supported")
    if s_aux is not None and slopes is not None:
        raise NotApplicable(f"{kind} has learned sinks beside slopes of its positions (ALiBi), which is not supported")
    index, states = getattr(module, "layer_idx", layer_idx), passing.states
    if states is not None:
        index = states.caller(index)
    if index is None:
        raise NotApplicable(f"{kind} does not say which layer it is (layer_idx)")
    place = index if states is None else states.places.get(index)
    if place is None:
        raise NotApplicable(f"layer {index}: {kind} attends, but the config names another kind of layer there")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotApplicable(
            f"layer {index}: {kind} attends with {query.shape[0]} x {query.shape[2]} queries to {key.shape[2]} keys: "
            "attention to something beside the tokens read (an encoder, a prefix, several streams) is not supported"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    span = _span(passing, attention_mask, sliding_window, query.shape[2], bool(causal), f"layer {index}: {kind}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    sinks, slopes = (None if x is None else x.detach().reshape(-1) for x in (s_aux, slopes))
    scoring = Scoring(
        scale, span.window, softcap or None, sinks, slopes, _chosen(passing, indices), rounded=rounded, chunk=span.chunk
    )
    with showing(None if passing.noting is None else passing.noting.taken(module, key)):
        out = passing.handler.attend(place, query[0], key[0], value[0], scoring)
    return out.transpose(0, 1).unsqueeze(0).contiguous(), None  # [1, n, h, dv]: models view it in one piece


def _chosen(passing: _Passing, indices: Tensor | None) -> Chosen | None:
    """What the layer's indexer chose for each token, where it has one: indices [1, n, c] of all tokens so far."""
    if indices is None:
        return None
    total = int(passing.positions[-1]) + 1
    return Chosen(passing.positions, None if indices.shape[-1] >= total else indices[0])


def _span(
    passing: _Passing, mask: Tensor | None, sliding_window: int | None, tokens: int, causal: bool, where: str
) -> Span:
    """What a layer's mask lets it see; `sliding_window` is what the layer itself says, where no mask tells."""
    if isinstance(mask, AnnouncedMask):
        span = mask.span
        if span.refusal is not None:
            raise NotApplicable(f"{where} {span.refusal}: it cannot be read exactly as a decoder")
        if span.limit is not None and tokens > span.limit:
            raise NotApplicable(
                f"{where} does not say what it sees beyond {span.limit} tokens, and {tokens} are read at once; shorten "
                "the text"
            )
        return span
    if mask is None:
        if tokens > 1 and not causal:
            raise NotApplicable(f"{where} attends to later tokens too: it cannot be read exactly as a decoder")
    elif mask is not passing.told and passing.plain and all(mask is not known for known in passing.own):
        checked(mask, tokens)
        passing.own.append(mask)
    return Span(sliding_window or None)


def _mask(
    batch_size: int = 1,  # noqa: ARG001  (transformers hands it by name; it is always 1)
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int = 0,
    mask_function: Any = None,
    local_size: int | None = None,
    device: Any = "cpu",
    **kwargs: Any,  # noqa: ARG001  (what other versions hand besides)
) -> AnnouncedMask:
    """Handlers mask by the true positions of what they hold: of a model's mask they need the rule."""
    passing = _passing.get()
    plain = passing is not None and passing.plain
    return announced(
        mask_function, q_length, kv_length, local_size or None, torch.device(device), before=q_offset, check=plain
    )


@cache
def _make_known() -> None:
    """Register our attention with transformers, when it is first needed: importing it takes seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


_passing: ContextVar[_Passing | None] = ContextVar("passing", default=None)


def _current() -> _Passing:
    """The pass of this thread; WorkbenchError where another thread's has the model engaged."""
    passing = _passing.get()
    if passing is None:
        raise WorkbenchError(
            "this model was called directly while a session is running it in another thread; wait for the run to end"
        )
    return passing


def _positions() -> Tensor:
    return _current().positions


def passing() -> Handler | None:
    """The handler of the pass that calls this, for modules that remember something of a run in the run itself."""
    current = _passing.get()
    return None if current is None else current.handler


_latents: ContextVar[Latents | None] = ContextVar("latents", default=None)


def latents() -> Latents | None:
    """The rows of which the layer that attends just now made its keys and values; None where there are none."""
    return _latents.get()


@contextmanager
def showing(rows: Latents | None) -> Iterator[None]:
    """Until the block ends, let a handler find these rows in `latents`."""
    before = _latents.set(rows)
    try:
        yield
    finally:
        _latents.reset(before)


class _Alone:
    """Stands for the handler while a model attends by itself: a place for what its modules remember."""

    def __init__(self) -> None:
        self.memory: dict[Any, Any] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        raise WorkbenchError("this model attends by itself, but its layers were switched to a session's attention")


@contextmanager
def remembering() -> Iterator[None]:
    """Until the block ends modules that remember something of a run do so in calls of the model by itself."""
    before = _passing.set(_Passing(_Alone(), None, plain=False, positions=torch.empty(0, dtype=torch.long)))
    try:
        yield
    finally:
        _passing.reset(before)


class _Locks:
    """One lock a model, for as long as the model lives."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[PreTrainedModel, AbstractContextManager[bool]] = WeakKeyDictionary()
        self._guard = RLock()

    def of(self, model: PreTrainedModel) -> AbstractContextManager[bool]:
        with self._guard:
            return self._of.setdefault(model, RLock())


# The one thing that modules hold between uses. Two sessions may be given one model object and must exclude each other:
# nothing is left on a model, and neither session knows the other, so this is the only place that they have in common.
_LOCKS = _Locks()


@contextmanager
def exclusive(model: PreTrainedModel) -> Iterator[None]:
    """Until the block ends no other thread has the model engaged."""
    with _LOCKS.of(model):
        yield


@contextmanager
def engaged(model: PreTrainedModel) -> Iterator[None]:
    """Let the model call our attention function until the block ends, whatever happens in it."""
    _make_known()
    with exclusive(model):
        before = model.config._attn_implementation or "eager"  # noqa: SLF001  (there is a public setter only)
        beside = [(config, config._attn_implementation) for config in _beside(model)]  # noqa: SLF001
        with adapted(model, _attention, _positions) as by_adapters:
            switch = partial(_switch_masks, model) if by_adapters else model.set_attn_implementation

            def switched(name: str) -> None:
                switch(name)
                for config, own in beside:
                    config._attn_implementation = own  # noqa: SLF001

            switched(NAME)
            try:
                yield
            finally:
                switched(before)


def _beside(model: PreTrainedModel) -> list[Any]:
    """The configs of what looks at images or listens beside a model's decoder, and keeps its own attention."""
    config: Any = model.config
    text = getattr(config, "text_config", None)
    if text is None or text is not config.get_text_config(decoder=True):
        return []
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return [part for part in parts if part is not None and part is not text]


def _switch_masks(model: PreTrainedModel, name: str) -> None:
    """What `set_attn_implementation` refuses a model without the interface, though its masks do go by the name."""
    model.config._attn_implementation = name  # noqa: SLF001  (as transformers itself sets it, with all configs inside)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model takes its token ids."""
    return computes_on(model.get_input_embeddings()) or torch.device("cpu")


def computes_on(module: nn.Module) -> torch.device | None:
    """Where a module computes: where its first weight lies, or, where accelerate brings weights from host memory or
    disk for each pass, where it brings them; None for a module without weights.
    """
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            return brought_to(part) if weight.is_meta else weight.device
    return None


def devices_of(model: PreTrainedModel) -> set[torch.device]:
    """Where the model's weights and buffers lie; "meta" stands for weights that are elsewhere between passes."""
    return {x.device for x in (*model.parameters(), *model.buffers())} | (
        {device_of(model)} if rests_elsewhere(model) else set()
    )


def rests_elsewhere(model: nn.Module) -> bool:
    """Whether accelerate holds some of the model's weights in host memory or on disk between passes."""
    return any(weight.is_meta for weight in model.parameters())


def brought_to(module: nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of a module that it holds elsewhere; None where nothing brings them."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", None) or ((hook,) if hook is not None else ())
    device = next((each.execution_device for each in hooks if getattr(each, "offload", False)), None)
    if device is None:
        return None
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def forward(
    model: PreTrainedModel,
    handler: Handler,
    ids: Tensor,
    positions: Tensor,
    *,
    cache: States | None = None,
    logits: int = 1,
    mask: Tensor | None = None,
    images: Images | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """One pass over ids [n] at true positions [n]; returns the last `logits` rows of logits, float32 [logits, v].

    cache: what layers that keep another state than keys and values remember of the text before, written on; without it
    such a model reads from the start of a text, and a pass that begins elsewhere raises NotApplicable. mask: any tensor
    of four dimensions. Handlers ignore it, but the model then does not look at the positions to make one, for which the
    host would wait for the device. images: those of the prompt that the tokens are of, or follow. places: which of its
    tokens they are, int64 [n], if not those of their positions.
    """
    device = device_of(model)
    plain = mask is None and bool((positions.diff() == 1).all())
    alone = mask is None and positions.numel() == 1 and bool(positions[0] > 0)
    if has_indexer(model):
        cache = states_of(model) if cache is None else cache
        if not plain or cast("States", cache).seen != int(positions[0]):
            raise NotApplicable(
                f"{type(model).__name__} chooses by an index of all tokens what each attends to, so it cannot read "
                "apart from its text, out of order or in its midst, as wanted here"
            )
    elif cache is None and keeps_states(model):
        if not plain or bool(positions[:1] != 0):
            raise NotApplicable(
                f"{type(model).__name__} has layers that keep a state of all that was read before (linear attention, a "
                "state space, a convolution), so it cannot read from the midst of a text or parts of it, as wanted here"
            )
        cache = states_of(model)
    stands = standing(model, positions, plain or mask is not None) if cache is None else cache
    # As places, not as a number: given a number, layers that share keys (Gemma 4) drop the queries that it leaves out.
    kept = torch.arange(ids.numel() - min(logits, ids.numel()), ids.numel(), device=device)
    with engaged(model), torch.inference_mode(), unchanged(model) if images is not None else nullcontext():
        noting = cast("Noting | None", stands)
        before = _passing.set(_Passing(handler, mask, plain and not alone, positions, cache, noting=noting))
        try:
            given = {"input_ids": ids.to(device)[None], "position_ids": positions.to(device)[None]}
            if images is not None:
                given = images.given(model, ids, positions, places, partial(entered, model, images))
            output = model(
                **given,
                attention_mask=mask,
                past_key_values=cast("Cache | None", stands),
                use_cache=cache is not None,
                logits_to_keep=kept,
            )
        finally:
            _passing.reset(before)
        return cast("Tensor", output.logits[0, -kept.numel() :].float())  # some (TrOCR) give all


def entered(model: PreTrainedModel, images: Images) -> Entered:
    """What enters the decoder of the whole prompt. Raises NotApplicable where it sees otherwise than a decoder does."""
    positions = torch.arange(images.tokens)
    with engaged(model), torch.inference_mode(), unchanged(model), noting(model, stop=True) as noted:
        before = _passing.set(_Passing(_Alone(), None, plain=True, positions=positions))
        try:
            model(**images.given(model, images.ids, positions, None, partial(entered, model, images)), use_cache=False)
        finally:
            _passing.reset(before)
    return noted[0]
