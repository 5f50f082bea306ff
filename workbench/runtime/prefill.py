"""Reading a prompt: one forward pass in which every attention layer hands over what it saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries, within_a_chunk
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import device_of, entered, forward, latents
from workbench.engine.images import Images, noting
from workbench.engine.latents import Latents
from workbench.engine.states import States, attending
from workbench.errors import BadPrompt, NotApplicable, PromptTooLong
from workbench.measure.memory import CudaBytes, LiveBytes, Timeline, live_bytes
from workbench.measure.timing import Stopwatch
from workbench.models import Facts, Rotations
from workbench.models.depth import numbers_in
from workbench.progress import Progress
from workbench.prompt import Prompt, check_vocabulary
from workbench.runtime.calibration import learnt
from workbench.runtime.continuing import fresh_states
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.core.rope import Rotation


@dataclass
class _Recorder:
    """Computes exact (or the method's) attention over the prompt and keeps each layer's queries, keys and values."""

    rotations: Rotations
    facts: Facts
    method: AttentionMethod | None
    progress: Progress
    keep_on: torch.device | None
    timeline: Timeline
    weights: int
    live: LiveBytes | CudaBytes
    context: PassContext
    plain_widths: Mapping[int, tuple[int, int]] | None
    origins: Sequence[int]
    states: States | None

    def __post_init__(self) -> None:
        self.layers: dict[int, LayerTrace] = {}
        self.recorded_nbytes = 0
        self.count = len(self.origins)
        self.memory: dict[Any, Any] = {}
        self.places: dict[tuple[int, torch.Size], int] = {}  # of keys in memory: the layer that showed them first

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.update("reading", len(self.layers), self.count)
        if layer in self.layers:
            raise NotApplicable(
                f"layer {self.origins[layer]} of {self.facts.name} attends more than once in a pass; a cache by layers "
                "cannot tell them apart"
            )
        tokens, model_window = query.shape[1], scoring.window
        window = _combined_window(model_window, self.method, layer, self.count, tokens)
        scoring = replace(scoring, window=window)
        self.context.layer = layer
        if self.method is None:
            most = _narrower(window, None if scoring.chosen is None else scoring.chosen.most)
            alone = scoring.chunk or tokens
            spans = [min(alone, tokens - start) for start in range(0, tokens, alone)]
            self.context.count(query.shape[0] * sum(visible_entries(span, most) for span in spans))
            out = causal_attention(query, key, value, scoring)
        elif scoring.chosen is not None:
            raise NotApplicable(
                f"layer {layer}: an indexer of {self.facts.name} chooses what each token attends to, so "
                f"{self.method.key} cannot; use a KV or weight method"
            )
        elif scoring.slopes is not None and not self.method.follows_slopes:
            raise NotApplicable(
                f"{self.method.key} attends by products alone, and {self.facts.name} by positions (ALiBi)"
            )
        else:
            within = within_a_chunk(self.method.key, scoring, tokens)
            out = self.method.attend(query, key, value, within, self.context)
        kept = {} if self.states is None else {"state": self.states.nbytes}
        # Of what is live here: the recording so far, and states.
        home = self.keep_on or query.device
        before = (self.recorded_nbytes if home == query.device else 0) + sum(kept.values())
        shared = self._shared(layer, key)
        recorded = tuple(x.to(home) for x in (key, value, query))
        if shared is not None:
            recorded = (self.layers[shared].keys_held, self.layers[shared].values_held, recorded[2])
        rows = None if shared is not None else _held(key, value, scoring)
        self.layers[layer] = LayerTrace(
            index=layer,
            keys_held=recorded[0],
            values_held=recorded[1],
            queries_held=recorded[2],
            device=query.device,
            scoring=scoring if scoring.chosen is None else replace(scoring, chosen=scoring.chosen.to(home)),
            rotary=partial(self.rotations.of, self.origins[layer], width=key.shape[-1]),
            narrowed_from=min(model_window or tokens, tokens) if window != model_window else None,
            plain_widths=None if self.plain_widths is None else self.plain_widths[self.origins[layer]],
            shared=shared,
            number=self.origins[layer],
            latents=None if rows is None else rows.to(home),
        )
        self.recorded_nbytes += sum(x.nbytes for x in recorded[0 if shared is None else 2 :])
        if scoring.chosen is not None:
            self.recorded_nbytes += scoring.chosen.nbytes
        self.recorded_nbytes += 0 if rows is None else rows.nbytes
        self.timeline.add(
            "read",
            layer,
            {
                "weights": self.weights,
                "trace": self.recorded_nbytes,
                **kept,
                "activations": max(self.live.peak - before, 0),
            },
        )
        self.live.reset_peak()
        return out

    def _shared(self, layer: int, key: Tensor) -> int | None:
        """The earlier layer whose keys [k, n, d] these are: what lies at the same place and is the same."""
        place = (key.data_ptr(), key.shape)
        there = self.places.get(place)
        if there is not None:
            known = self.layers[there].keys_held
            if torch.equal(known, key.to(known.device)):
                return there
        self.places[place] = layer
        return None


def _held(key: Tensor, value: Tensor, scoring: Scoring) -> Latents | None:
    """The rows that the layer's cache holds, of which it made key [h, n, d] and value [h, n, dv]; None where it holds
    these, or a chunk of the text alone.
    """
    rows = latents()
    if rows is None or scoring.chunk is not None or not rows.makes(key, value):
        return None
    return rows.looked_at()


def with_images(layer: LayerTrace, images: Images | None) -> LayerTrace:
    """A layer that knows which tokens stand for images, and where these are not turned by their places."""
    if images is None:
        return layer
    rotary = layer.rotary if images.coordinates is None else _by_coordinates
    return replace(layer, rotary=rotary, images=images.which)


def _by_coordinates(_read: int) -> Rotation:
    raise NotApplicable(
        "tokens of images are rotated by height and width (M-RoPE) here and not by their places in the text; methods "
        "that rotate keys cannot be applied to this prompt"
    )


def _combined_window(
    model_window: int | None, method: AttentionMethod | None, layer: int, layers: int, tokens: int
) -> int | None:
    """The narrower of the model's own window and the method's."""
    return _narrower(model_window, None if method is None else method.span(layer, layers, tokens))


def _narrower(*widths: int | None) -> int | None:
    """The least of those that are a limit."""
    return min((width for width in widths if width is not None), default=None)


def read(
    model: PreTrainedModel,
    facts: Facts,
    prompt: Prompt,
    *,
    method: AttentionMethod | None = None,
    keep_on: torch.device | None = None,
    weight_nbytes: int = 0,
    plain: PreTrainedModel | None = None,
    plain_widths: Mapping[int, tuple[int, int]] | None = None,
    rotations: Rotations | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Read a prompt and record it.

    method: how attention is computed while reading (default exact). keep_on: where the recording rests, for instance
    host memory for a model on the GPU (default: each layer's device). plain, plain_widths: the model that this one was
    compressed from, and the sizes (d, dv) of its heads by the layer's number; `facts` are those of the plain model.
    rotations: those of the plain model, where they are remembered for several readings. Raises PromptTooLong,
    BadPrompt, NotApplicable; BudgetTooSmall where the method cannot meet its budget on this prompt; Cancelled between
    layers.
    """
    tokens = prompt.ids.numel()
    if tokens > facts.max_positions:
        raise PromptTooLong(
            f"the prompt has {tokens} tokens, but {facts.name} has only {facts.max_positions} positions; shorten the "
            "text"
        )
    if not tokens:
        raise BadPrompt("the text has no tokens: there is nothing to read")
    check_vocabulary(prompt.ids, facts.vocab_size, facts.name)
    numbers = numbers_in(plain or model, model)
    count = len(numbers)
    if not count:
        raise NotApplicable(f"{facts.name} has no layer with attention: there are no keys and values to compress")
    if method is not None:
        method.check(tokens, count)
    device = device_of(model)
    progress = progress or Progress()
    watch, timeline = Stopwatch(device), Timeline("read")
    knowledge: dict[Any, Any] = {}
    states = fresh_states(model)
    if method is not None and method.calibration:
        knowledge = learnt(model, count, method, prompt.tokenizer, progress)
    with watch("read"), live_bytes(device) as live:
        context = PassContext(count, tokens, state=dict(knowledge))
        recorder = _Recorder(
            rotations or Rotations(plain or model),
            facts,
            method,
            progress,
            keep_on,
            timeline,
            weight_nbytes,
            live,
            context,
            plain_widths,
            numbers,
            states,
        )
        images = prompt.images
        with ExitStack() as leaving:
            noted = [] if images is None else leaving.enter_context(noting(model))
            logits = forward(model, recorder, prompt.ids, torch.arange(tokens), cache=states, images=images)[-1]
        if images is not None:
            prompt = replace(prompt, images=images.placed(noted[0].coordinates))
            recorder.layers = {index: with_images(layer, prompt.images) for index, layer in recorder.layers.items()}
    _check_layers(recorder.layers, numbers, facts.name)
    if states is not None and states.untouched:
        raise NotApplicable(
            f"layers {', '.join(map(str, states.untouched))} of {facts.name} keep their state somewhere else than in "
            "the model's cache, so a prompt cannot be gone on from"
        )
    if not logits.isfinite().all():
        raise NotApplicable(
            f"{facts.name}: the logits after the prompt are not finite numbers: its weights are damaged, or what it "
            f"computes is too large for {str(model.dtype).removeprefix('torch.')}"
        )
    progress.update("reading", count, count)
    layers = tuple(recorder.layers[index] for index in range(count))
    exact = exact_layers(layers, method)
    if len({layer.latents is None for layer in layers if layer.index not in exact}) > 1:  # plans are of one kind
        layers = tuple(layer if layer.index in exact else replace(layer, latents=None) for layer in layers)
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None) and not any(x.latents for x in layers):
        note = f"{facts.name} has latent attention (MLA), but does not show here what it is held as"
        prompt = replace(prompt, notes=(*prompt.notes, f"{note}: keys and values are held and counted"))
    gone = _gone(layers, facts, sorted(set(attending(plain or model)) - set(numbers)), plain_widths)
    trace = Trace(
        prompt,
        layers,
        logits.cpu(),
        watch.seconds["read"],
        exact,
        timeline,
        tuple(context.computed),
        gone,
        recorder.memory,
        knowledge,
        states=states,
    )
    _check_compressible(trace, facts.name)
    return trace


def seen(facts: Facts, trace: Trace) -> Facts:
    """A model's facts with the heads that a reading recorded, in the first layer that attends to everything.

    A config may say otherwise: of DeepSeek's heads it names the rotated part, of Gemma 4's those of one kind of layer.
    """
    layer = next((layer for layer in trace.layers if layer.bound is None), trace.layers[0])
    return replace(facts, heads=layer.heads, kv_heads=layer.kv_heads, head_dim=layer.keys_held.shape[-1])


def _check_layers(recorded: Mapping[int, LayerTrace], numbers: Sequence[int], name: str) -> None:
    """Raise NotApplicable unless each of a model's layers with attention, `numbers`, attended through the engine, with
    as many heads as others.
    """
    count = len(numbers)
    missing, more = sorted(set(range(count)) - set(recorded)), sorted(set(recorded) - set(range(count)))
    if more:
        raise NotApplicable(f"{name} has attention in layers {more}, beyond the {count} that its config names")
    if missing:
        which = ", ".join(str(numbers[layer]) for layer in missing)
        which = "none of the layers" if len(missing) == count else f"layers {which}"
        does = "uses" if len(missing) == count else "do not use"
        raise NotApplicable(
            f"{which} of {name} {does} transformers' attention interface (attention of their own kind, linear "
            "attention or a state space), so they cannot be read"
        )
    heads = sorted({layer.heads for layer in recorded.values()})
    if len(heads) > 1:
        counts = ", ".join(map(str, heads))
        raise NotApplicable(f"the layers of {name} differ in their number of heads ({counts}), which is not supported")


def _check_compressible(trace: Trace, name: str) -> None:
    """Raise NotApplicable unless the layers that KV methods may change have equally many KV heads."""
    heads = sorted({layer.kv_heads for layer in trace.compressible})
    if len(heads) > 1:
        counts = ", ".join(map(str, heads))
        raise NotApplicable(
            f"the layers of {name} that attend to everything differ in their number of KV heads ({counts}), which is "
            "not supported"
        )


def read_unrecorded(
    model: PreTrainedModel,
    facts: Facts,
    prompt: Prompt,
    *,
    keep_on: torch.device | None = None,
    weight_nbytes: int = 0,
    rotations: Rotations | None = None,
    progress: Progress | None = None,
) -> Trace:
    """A trace of the prompt's shapes without data: only its first token is read, to learn them.

    For prompts that a method will read in bounded memory. Raises BadPrompt, NotApplicable.
    """
    tokens = prompt.ids.numel()
    ids = prompt.ids[:1]
    if prompt.images is not None:
        ids = prompt.ids[~prompt.images.mask][:1]  # any will do that needs no image
        prompt = replace(prompt, images=prompt.images.placed(entered(model, prompt.images).coordinates))
    first = read(
        model,
        facts,
        replace(prompt, ids=ids, images=None),
        keep_on=keep_on,
        weight_nbytes=weight_nbytes,
        rotations=rotations,
        progress=progress,
    )
    check_vocabulary(prompt.ids, facts.vocab_size, facts.name)
    layers = tuple(with_images(layer.blank(tokens), prompt.images) for layer in first.layers)
    gone = tuple(layer.blank(tokens) for layer in first.gone)
    logits = torch.full_like(first.logits, torch.nan)
    return Trace(prompt, layers, logits, 0.0, exact_layers(layers, None), Timeline("read"), gone=gone)


def _gone(
    layers: Sequence[LayerTrace], facts: Facts, missing: Sequence[int], widths: Mapping[int, tuple[int, int]] | None
) -> tuple[LayerTrace, ...]:
    """Shapes of the layers that a shortened model has not, which the uncompressed cache still counts: those of a layer
    of the same kind, with a window or without.
    """
    gone = []
    for index in missing:
        window, chunk = facts.windows[index], facts.chunks[index] if facts.chunks else None
        like = next((layer for layer in layers if (layer.window is None) == (window is None)), layers[0]).blank()
        scoring, width = replace(like.scoring, window=window, chunk=chunk), widths[index] if widths else None
        gone.append(replace(like, index=index, number=index, scoring=scoring, plain_widths=width))
    return tuple(gone)


def exact_layers(layers: Sequence[LayerTrace], method: AttentionMethod | None) -> dict[int, str]:
    """The layers that KV methods must leave alone, and why: those with a window, those that divided the prompt into
    chunks, and those that hold nothing of their own.
    """
    exact = {layer.index: _window_reason(layer, method) for layer in layers if layer.window}
    for layer in layers:
        if layer.chunk is not None and layer.tokens > layer.chunk:
            exact[layer.index] = f"attention in chunks of {layer.chunk} tokens: it holds the newest one only"
        if layer.shared is not None:
            exact[layer.index] = f"reads the keys and values of layer {layers[layer.shared].called}"
    return exact


def _window_reason(layer: LayerTrace, method: AttentionMethod | None) -> str:
    whose = f" of {method.key}" if method is not None and layer.narrowed_from is not None else ""
    return f"sliding window{whose} of {layer.window} tokens: it never holds more"
