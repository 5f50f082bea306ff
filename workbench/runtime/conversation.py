"""Questions and answers under one recipe, on stores that a plan filled."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod
from workbench.errors import BadParameter, NotRead, PromptTooLong
from workbench.kv.plan import Plan
from workbench.kv.stores import kv_categories
from workbench.measure.memory import Timeline
from workbench.measure.timing import Timing
from workbench.models import Facts
from workbench.models.rotary import switch_notes
from workbench.progress import Progress
from workbench.prompt import check_vocabulary, notes_on, text_ids
from workbench.recipe import Recipe
from workbench.runtime.decode import Decoder
from workbench.runtime.evaluate import Evaluation, evaluate, reference
from workbench.runtime.greedy import greedy
from workbench.runtime.run import Question, Run, RunState, Stream, Token
from workbench.runtime.single_tokens import SingleTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """What stays the same from a run's first question to its last.

    plan: what the recipe keeps of its reading of the prompt. plain: the plan that keeps everything of the plain model's
    reading, which the answers are compared with, None where nothing was recorded; plain_model runs it. on_run is
    called with every finished run. graphs: decode by CUDA graphs where that can be done. fusing: what
    reads single tokens faster on a CPU, kept from run to run.
    """

    recipe: Recipe
    plan: Plan
    model: PreTrainedModel
    weight_nbytes: int
    plain: Plan | None
    plain_model: PreTrainedModel
    facts: Facts
    tokenizer: PreTrainedTokenizerBase | None
    notes: tuple[str, ...]
    on_run: Callable[[Run], None]
    graphs: bool = True
    fusing: SingleTokens | None = None

    def begin(self, question: Question, max_new_tokens: int, progress: Progress, plan_s: float) -> Stream:
        """The first question after the prompt (None: go on from the prompt), answered as the stream is iterated."""
        trace = self.plan.trace
        ids = trace.prompt.question_ids(question, self.tokenizer)
        self._check(self.plan.position, ids, max_new_tokens)
        return Stream(self._first(question, ids, max_new_tokens, progress, plan_s), progress)

    def go_on(self, run: Run, question: Question, max_new_tokens: int, progress: Progress) -> Stream:
        """Another question after `run`, on a copy of its stores."""
        if run.decoder is None:
            raise NotRead("this run's cache has been released to save memory: run it again to ask more")
        ended = bool(run.tokens) and run.tokens[-1] in self.facts.eos_ids
        end = str(self.tokenizer.decode(list(run.tokens[-1:]))) if ended and self.tokenizer is not None else ""
        more = self.plan.trace.prompt.next_ids(question, self.tokenizer, ended=end)
        # The last token of the answer has been chosen but not read yet.
        ids = torch.cat([torch.tensor(run.tokens[-1:], dtype=torch.long), more])
        before = torch.cat([run.prompt_ids, torch.tensor(run.tokens[:-1], dtype=torch.long)])
        self._check(run.decoder.position, ids, max_new_tokens)
        timeline = Timeline(self.recipe.label)
        steps = self._answer(run.decoder.clone(), timeline, question, ids, before, max_new_tokens, progress, 0.0, 0.0)
        return Stream(steps, progress)

    def _first(
        self, question: Question, ids: Tensor, max_new_tokens: int, progress: Progress, plan_s: float
    ) -> Generator[Token, None, Run]:
        trace = self.plan.trace
        began = time.perf_counter()
        decoder = self.decoder()
        timeline = Timeline.concat([self.plan.timeline], run=self.recipe.label)
        self._sample(timeline, "plan", 0, decoder)
        plan_s += time.perf_counter() - began
        return (
            yield from self._answer(
                decoder, timeline, question, ids, trace.ids, max_new_tokens, progress, self.plan.read_seconds, plan_s
            )
        )

    def _answer(
        self,
        decoder: Decoder,
        timeline: Timeline,
        question: Question,
        ids: Tensor,
        before: Tensor,
        max_new_tokens: int,
        progress: Progress,
        read_s: float,
        plan_s: float,
    ) -> Generator[Token, None, Run]:
        """Read ids [q] after `before` [n], which `decoder` holds, and answer."""
        decoder.progress = progress
        decoder.reserve(ids.numel() + max_new_tokens)
        tokens: list[int] = []
        text = ""
        began = first = time.perf_counter()
        logits = self.plan.logits
        eos, graphs = self.facts.eos_ids, self.graphs
        for token in greedy(decoder, ids, logits, max_new_tokens=max_new_tokens, eos=eos, graphs=graphs):
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            self._sample(timeline, "decode" if len(tokens) > 1 else "question", len(tokens), decoder)
            longer = self._text(tokens)
            # A character may take several tokens: hold back until it is whole, or nothing more can come.
            last = token in self.facts.eos_ids or len(tokens) == max_new_tokens
            whole = longer if last or not longer.endswith("\ufffd") else text
            yield Token(token, whole[len(text) :])
            text = whole
        run = Run(
            recipe=self.recipe,
            text=self._text(tokens),
            tokens=tuple(tokens),
            prompt_ids=torch.cat([before, ids]),
            memory=timeline,
            timing=Timing(read_s, plan_s, first - began, time.perf_counter() - first, len(tokens)),
            state=RunState(lambda: self.plan, decoder),
            question=question if isinstance(question, str) else None,
            notes=(
                *self.notes,
                *notes_on(question, self.tokenizer),
                *_left_to_stores(decoder),
                *decoder.notes,
                *switch_notes(self.model, self.plan.trace.tokens, decoder.position),
            ),
            conversation=self,
            decode_score_share=decoder.score_share,
            max_new_tokens=max_new_tokens,
        )
        decoder.progress = None
        self.on_run(run)
        return run

    def decoder(self) -> Decoder:
        """The model on fresh stores that hold what was planned."""
        evicting = self.plan.stages.evict if self.plan.evicts else None
        attending = next((m for m in self.recipe.methods if isinstance(m, AttentionMethod) and m.decodes), None)
        trace = self.plan.trace
        return Decoder(
            self.model,
            self.plan.stores(),
            self.plan.position,
            evicting,
            attending,
            trace.layers if trace.recorded else (),
            memory=trace.memory,
            learnt=trace.learnt,
            fusing=self.fusing,
            states=self.plan.states,
            images=trace.prompt.images,
        )

    def evaluate(self, run: Run, progress: Progress, continuation: Question = None) -> Evaluation:
        """The run compared with the uncompressed run on its answer, or on a given continuation."""
        plain = self.plain
        if plain is None:
            raise NotRead(
                "quality is measured against the uncompressed model, but this prompt was taken in without a recording"
            )
        asked = run.prompt_ids[plain.trace.tokens :]
        given = None if continuation is None else text_ids(continuation, self.tokenizer)
        if given is not None:
            self._check(run.prompt_ids.numel(), given, 1)
        most = run.prompt_ids.numel() + (run.max_new_tokens if given is None else given.numel())
        if most > self.facts.max_positions:  # where the recipe has no end
            raise PromptTooLong(
                f"a run of {most} tokens cannot be compared with the uncompressed {self.facts.name}, which has only "
                f"{self.facts.max_positions} positions"
            )

        def plain_decoder() -> Decoder:
            return Decoder(
                self.plain_model,
                plain.stores(),
                plain.position,
                states=plain.states,
                fusing=self.fusing,
                images=plain.trace.prompt.images,
            )

        against = reference(plain.trace, plain_decoder, asked, run.max_new_tokens, self.facts.eos_ids, progress, given)
        answer = run.tokens if given is None else None
        return evaluate(against, self.decoder(), self.plan.logits, asked, self.facts.heads, progress, answer)

    def _check(self, before: int, ids: Tensor, more: int) -> None:
        check_vocabulary(ids, self.facts.vocab_size, self.facts.name)
        if isinstance(more, bool) or not isinstance(more, int) or more < 1:
            raise BadParameter(f"max_new_tokens must be a whole number of at least 1, not {more!r}")
        read = before + ids.numel()
        if read + more > self.facts.max_positions and not self.plan.endless:
            raise PromptTooLong(
                f"{read} tokens read and {more} to generate are too many for {self.facts.name}, which has "
                f"{self.facts.max_positions} positions; shorten the text or lower max_new_tokens"
            )

    def _text(self, tokens: Sequence[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _sample(
        self, timeline: Timeline, phase: Literal["plan", "question", "decode"], step: int, decoder: Decoder
    ) -> None:
        categories = {
            "weights": self.weight_nbytes,
            **kv_categories(decoder.stores),
            **({"state": nbytes} if (nbytes := decoder.state_nbytes) else {}),
            "activations": decoder.activations,
            "workspace": decoder.workspace,
            **({"attention": nbytes} if (nbytes := decoder.attention_nbytes) else {}),
            **({"core neurons": nbytes} if (nbytes := decoder.memory_nbytes) else {}),
            **({"weights in fewer bytes": nbytes} if (nbytes := decoder.fused_nbytes) else {}),
            "trace": self.plan.trace.nbytes,
        }
        nbytes_by_layer = [store.nbytes for store in decoder.stores]
        timeline.add(phase, step, categories, nbytes_by_layer, numbers=self.plan.trace.numbers)


def _left_to_stores(decoder: Decoder) -> tuple[str, ...]:
    """What a run has to say about layers at which its attention method does not decode."""
    if decoder.attention is None or not decoder.by_store:
        return ()
    named = {layer.index: layer.called for layer in decoder.recorded}
    layers = ", ".join(str(named.get(layer, layer)) for layer in decoder.by_store)
    note = (
        f"layers {layers}: {decoder.attention.key} changes only reading here; how the cache is attended to while "
        "decoding is part of the KV method"
    )
    return (note,)
