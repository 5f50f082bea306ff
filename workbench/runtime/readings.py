"""The readings of a prompt: by the model as it is, and under the weights and the attention that recipes ask for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from workbench import arguments
from workbench.attention.base import AttentionMethod
from workbench.engine.images import image_token
from workbench.errors import BadPrompt, BadRecipe, NotRead
from workbench.kv.base import KVMethod
from workbench.kv.methods.full import Full
from workbench.kv.plan import Plan
from workbench.models import Facts, LoadedModel, Rotations
from workbench.progress import Progress
from workbench.prompt import Prompt, Text, has_images, has_messages
from workbench.recipe import Recipe
from workbench.runtime.exactness import verify, verify_images
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read, read_unrecorded, seen
from workbench.runtime.single_tokens import SingleTokens
from workbench.weights.variants import Variants

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from workbench.measure.memory import Timeline
    from workbench.models.image_text import Picture
    from workbench.registry import Method
    from workbench.trace import Trace
    from workbench.weights.calibration.study import WeightStudy

_TRACES = 4  # readings under other weights or attention that are remembered beside the plain one


class Readings:
    """A model, the prompt it read, and every other reading of that prompt that a recipe needed.

    facts: of the model; once a prompt has been read, with the heads that were recorded. kv_dtype: the precision in
    which caches are stored and the uncompressed one is counted. keep_on: where recordings rest (None: on the model's
    device). trusted: whether the model is read without being compared with itself first (`exactness`). plain: the
    reading by the model as it is; None before the first. timelines: of every reading and run so far. variants: the
    model under weight methods. rotations: how its layers turn queries and keys. fusing: how single tokens
    are read. count: how many readings were made.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv_dtype: torch.dtype,
        *,
        keep_on: torch.device | None = None,
        trusted: bool = False,
    ) -> None:
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.processor = loaded.processor
        self.facts: Facts = loaded.facts
        self.kv_dtype = kv_dtype
        self.keep_on = keep_on
        self.trusted = trusted
        self.plain: Trace | None = None
        self.timelines: list[Timeline] = []
        self.count = 0
        self.variants = Variants(self.model, self.tokenizer)
        self.rotations = Rotations(self.model)
        self.fusing = SingleTokens()
        self._others: OrderedDict[tuple[tuple[Method, ...], AttentionMethod | None], Trace] = OrderedDict()

    def read(
        self,
        text: Text,
        *,
        images: Sequence[Picture] = (),
        chat: bool | None = None,
        record: bool = True,
        progress: Progress | None = None,
        begun: Callable[[int], None] | None = None,
    ) -> Trace:
        """Read a prompt in place of the one before, which stays if this fails; see `Session.read`.

        begun: told how many tokens will be read, before they are.
        """
        if chat is not None:
            arguments.flag("chat", chat)
        arguments.flag("record", record)
        prompt = replace(self._prompt(text, images, chat), tokenizer=self.tokenizer)
        if not self.trusted:
            verify(self.model, self.facts, progress)
        if begun is not None:
            begun(prompt.ids.numel())
        trace = (read if record else read_unrecorded)(
            self.model,
            self.facts,
            prompt,
            keep_on=self.keep_on,
            weight_nbytes=self.variants.nbytes(()),
            rotations=self.rotations,
            progress=progress,
        )
        if not self.trusted and prompt.images is not None and record:
            verify_images(self.model, self.facts, trace)
        self.trusted = self.trusted or prompt.images is None
        self.count += 1
        self.facts = seen(self.facts, trace)
        self._others.clear()
        self.plain = trace
        self.timelines.append(trace.timeline)
        return trace

    def _prompt(self, text: Text, images: Sequence[Picture], chat: bool | None) -> Prompt:
        """What is read, by the model's processor where images are among it. Raises BadPrompt."""
        if not len(images) and not has_images(text):
            return Prompt.of(text, self.tokenizer, chat)
        if self.processor is None or self.tokenizer is None:
            raise BadPrompt(
                f"images are prepared by a model's own processor, and this session has none for {self.facts.name}: "
                "open a folder of a model that sees images, or give (model, processor), with Pillow installed, and "
                "torchvision for some processors"
            )
        if not isinstance(text, str) and not has_messages(text):
            raise BadPrompt("images go with a text or chat messages, not with token ids")
        return Prompt.with_images(text, images, self.processor, self.tokenizer, image_token(self.model), chat)

    def restore(self, trace: Trace, timelines: Sequence[Timeline]) -> None:
        """Take over a reading made earlier; timelines: of the runs on it."""
        self.facts = seen(self.facts, trace)
        self._others.clear()
        self.plain = trace
        self.timelines = [trace.timeline, *timelines]

    def of_prompt(self) -> Trace:
        """The reading by the model as it is. Raises NotRead before the first."""
        if self.plain is None:
            raise NotRead("no prompt has been read yet: call read(text) first")
        return self.plain

    def trace(self, recipe: Recipe, progress: Progress | None = None) -> Trace:
        """The reading of the prompt under the recipe's weights and attention, made when first asked for."""
        plain = self.of_prompt()
        attention, weights = attention_method(recipe), recipe.family("weights")
        if attention is None and not weights:
            return plain
        key = (weights, attention)
        if key not in self._others:
            widths = {x.called: (x.keys_held.shape[-1], x.values_held.shape[-1]) for x in plain.layers}
            reading = read_unrecorded
            if plain.recorded:
                reading = partial(
                    read, method=attention, plain=self.model, plain_widths=widths, rotations=self.rotations
                )
            self._others[key] = reading(
                self.variants.get(weights, progress),
                self.facts,
                plain.prompt,
                keep_on=self.keep_on,
                weight_nbytes=self.variants.nbytes(weights),
                progress=progress,
            )
            self.count += 1
            self.timelines.append(self._others[key].timeline)
            while len(self._others) > _TRACES:
                self._others.popitem(last=False)
        self._others.move_to_end(key)
        return self._others[key]

    def recorded(self, recipe: Recipe, progress: Progress | None = None) -> Trace:
        """The same, with queries, keys and values. Raises NotRead where the prompt was read without a recording."""
        return self.trace(recipe, progress).need_recording()

    def plan(
        self, recipe: Recipe, trace: Trace, progress: Progress | None = None, question: Tensor | None = None
    ) -> Plan:
        """What the recipe's KV methods keep of a reading under its weights and attention.

        question: the token ids [q] that are asked next, for methods that look at them.
        """
        methods = kv_methods(recipe)
        check_together(attention_method(recipe), methods)
        weights = recipe.family("weights")
        model, measured = self.variants.get(weights), self.variants.measured(weights)
        return make_plan(trace, methods, self.kv_dtype, recipe.budget, model, progress, question, measured)

    def calibrate(
        self, source: str | Path | None = None, *, samples: int = 32, tokens: int = 512, seed: int = 0
    ) -> WeightStudy:
        """Choose the texts that weight methods look at; readings under weights that saw others are forgotten."""
        study = self.variants.calibrate_on(source, samples=samples, tokens=tokens, seed=seed)
        if source is not None:
            for key in [key for key in self._others if key[0]]:
                del self._others[key]
        return study


def kv_methods(recipe: Recipe) -> list[KVMethod]:
    """A recipe's KV methods; the full cache where it has none."""
    return [method for method in recipe.family("kv") if isinstance(method, KVMethod)] or [Full()]


def attention_method(recipe: Recipe) -> AttentionMethod | None:
    """A recipe's attention method. Raises BadRecipe for several."""
    methods = [method for method in recipe.family("attention") if isinstance(method, AttentionMethod)]
    if len(methods) > 1:
        raise BadRecipe(f"{' and '.join(m.key for m in methods)}: a recipe has one attention method")
    return methods[0] if methods else None


def check_together(attention: AttentionMethod | None, methods: Sequence[KVMethod]) -> None:
    """Raise BadRecipe where an attention method and KV methods both want to do the same thing."""
    if attention is None:
        return
    for method in methods:
        if method.supplies("read"):
            raise BadRecipe(f"{method.key} reads the prompt in its own way, and so does {attention.key}: use one")
        if attention.decodes and any(method.supplies(stage) for stage in ("evict", "retrieve", "select")):
            raise BadRecipe(
                f"{attention.key} attends in its own way while decoding, where {method.key} watches, fetches or "
                "selects: use one of the two"
            )
