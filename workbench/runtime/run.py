"""A run: one generation under a recipe, and everything measured about it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from workbench import arguments
from workbench.display import Shown
from workbench.errors import NotRead
from workbench.formatting import mib
from workbench.kv.base import KVMethod
from workbench.kv.plan import Plan
from workbench.measure.memory import Timeline
from workbench.measure.quality import Quality
from workbench.measure.timing import Timing
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.runtime.compiling import telling
from workbench.runtime.decode import Decoder
from workbench.runtime.evaluate import Evaluation

Question = str | Sequence[int] | Tensor | None
_AGAIN = "run its recipe again with session.run(run.recipe, ...)"


class Token(NamedTuple):
    """One generated token and the text it adds."""

    id: int
    text: str


class Continuation(Protocol):
    """What a finished run goes on by, and is evaluated by: the conversation that it is part of."""

    def go_on(self, run: Run, question: Question, max_new_tokens: int, progress: Progress) -> Stream:
        """Another question after `run`, on a copy of its stores."""

    def evaluate(self, run: Run, progress: Progress, continuation: Question = None) -> Evaluation:
        """The run compared with the uncompressed run on its answer, or on a given continuation."""

    def decoder(self) -> Decoder:
        """The model on fresh stores that hold what was planned."""


@dataclass(eq=False)
class RunState:
    """What of a run changes after it has ended.

    make_plan: gives its plan when that is first asked for. decoder: from where another question goes on, until it is
    released. evaluation: the comparison with the uncompressed run, once it was measured.
    """

    make_plan: Callable[[], Plan]
    decoder: Decoder | None = None
    evaluation: Evaluation | None = None

    @cached_property
    def plan(self) -> Plan:
        """What the KV methods kept."""
        return self.make_plan()


@dataclass(frozen=True, repr=False)
class Run(Shown):
    """One generation under a recipe.

    text: the answer. tokens: its ids, with the one that ended it. prompt_ids: everything read before it [n + q].
    memory: live bytes over time. timing: where the seconds went. state: what changes: the plan and the evaluation, made
    when first asked for, and the cache from which `ask` goes on.
    decode_score_share: score entries computed for the question and the answer, of all that exact attention over
    everything before would compute (the record's `score_share` is the prompt's); None where they were not counted, for
    some store looks for what it needs.
    """

    recipe: Recipe
    text: str
    tokens: tuple[int, ...]
    prompt_ids: Tensor
    memory: Timeline
    timing: Timing
    state: RunState = field(repr=False, compare=False)
    question: str | None = None
    notes: tuple[str, ...] = ()
    max_new_tokens: int = 32
    conversation: Continuation | None = field(default=None, repr=False)
    decode_score_share: float | None = None

    @property
    def plan(self) -> Plan:
        """What the KV methods kept."""
        return self.state.plan

    @property
    def decoder(self) -> Decoder | None:
        """The model on the stores as the run left them, from where `ask` goes on; None once they were released."""
        return self.state.decoder

    @property
    def verdict(self) -> Evaluation:
        """The comparison with the uncompressed run, head by head; measured once."""
        return self.measure()

    def measure(
        self, continuation: str | Sequence[int] | Tensor | None = None, *, progress: Progress | None = None
    ) -> Evaluation:
        """The same as `verdict`, with progress; if it is cancelled nothing is remembered.

        continuation: a text, or ids, that both read instead of the uncompressed answer; its perplexity is then
        `figures.perplexity`. Such an evaluation is returned only, not remembered.
        """
        if continuation is not None:
            return self._evaluated(progress or Progress(), continuation)
        if self.state.evaluation is None:
            self.state.evaluation = self._evaluated(progress or Progress())
        return self.state.evaluation

    def _evaluated(self, progress: Progress, continuation: Question = None) -> Evaluation:
        if self.conversation is None:
            raise NotRead(f"this run was loaded from disk and its quality had not been measured before: {_AGAIN}")
        return self.conversation.evaluate(self, progress, continuation)

    @property
    def quality(self) -> Quality:
        """KL, top-1 agreement, likelihood and perplexity against the uncompressed run, on the same continuation."""
        return self.verdict.figures

    @property
    def reference_tokens(self) -> tuple[int, ...]:
        """What the uncompressed run answered."""
        return self.verdict.reference

    @property
    def kv_nbytes(self) -> int:
        """Live bytes of the cache as the run left it, questions and answers included; once released, as planned."""
        return self.plan.nbytes if self.decoder is None else sum(store.nbytes for store in self.decoder.stores)

    def ask(self, question: Question, *, max_new_tokens: int = 32, progress: Progress | None = None) -> Run:
        """Ask another question on the same compressed cache; this run stays as it is and may be asked again."""
        return self.ask_stream(question, max_new_tokens=max_new_tokens, progress=progress).run

    def ask_stream(self, question: Question, *, max_new_tokens: int = 32, progress: Progress | None = None) -> Stream:
        """The same as `ask`, but token by token."""
        if self.conversation is None:
            raise NotRead(
                f"this run was loaded from disk and cannot be asked more, for its cache was not saved: {_AGAIN}"
            )
        max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, 1, arguments.MOST_TOKENS)
        return self.conversation.go_on(self, question, max_new_tokens, progress or Progress())

    def release(self) -> None:
        """Free the run's cache. Everything measured stays; only `ask` needs it and will say that it is gone."""
        self.state.decoder = None

    def to_dict(self, *, quality: bool = True) -> dict[str, Any]:
        """A JSON-able record of the run; `quality=False` leaves out what has to be measured first."""
        return {
            "recipe": self.recipe.to_dict(),
            "label": self.recipe.label,
            "question": self.question,
            "text": self.text,
            "tokens": list(self.tokens),
            "prompt_tokens": int(self.prompt_ids.numel()),
            "kv_nbytes": self.plan.nbytes,
            "kv_full_nbytes": self.plan.full_nbytes,
            "kv_host_nbytes": self.plan.host_nbytes,
            "kv_share": self.plan.share,
            "score_share": self.plan.trace.score_share,
            "decode_score_share": self.decode_score_share,
            "state_nbytes": self.plan.state_nbytes,
            "exact_layers": {
                str(self.plan.trace.layers[layer].called): reason for layer, reason in self.plan.exact.items()
            },
            "notes": list(self.notes),
            "timing": self.timing.to_dict(),
            "memory": self.memory.to_dict(),
            "quality": self.quality.to_dict() if quality else None,
        }

    @property
    def measured(self) -> bool:
        """Whether the comparison with the uncompressed run is there already, so that asking for it takes no time."""
        return self.state.evaluation is not None

    def summary(self) -> str:
        """The answer, its cache and, once measured, its quality in words."""
        record = self.to_dict(quality=False)
        nbytes, full, host = (record[name] for name in ("kv_nbytes", "kv_full_nbytes", "kv_host_nbytes"))
        state = record.get("state_nbytes", 0)  # records of earlier versions have none
        asked = [f"  asked    {self.question}"] if self.question else []
        scores, later = record["score_share"], record.get("decode_score_share")
        attended = (
            []
            if scores is None or not (self.recipe.family("attention") or self._selects)
            else [f"  scores   {scores:.1%} computed" + (f", {later:.1%} while decoding" if later is not None else "")]
        )
        lines = [
            f"Run of {self.recipe.label}",
            *asked,
            f"  answer   {self.text.strip()}",
            f"  cache    {mib(nbytes)} of {mib(full)} ({nbytes / full:.1%})"
            + (f", {mib(host)} more in host memory" if host else ""),
            *([f"  state    {mib(state)} beside keys and values, the same under every recipe"] if state else []),
            *attended,
        ]
        if self.measured:
            lines.append(f"  quality  {self.quality}")
        return "\n".join([*lines, *(f"  note     {note}" for note in self.notes)])

    @property
    def _selects(self) -> bool:
        """Whether new tokens attended to a part of the cache only."""
        return any(isinstance(m, KVMethod) and m.supplies("select") for m in self.recipe.family("kv"))

    def numbers(self) -> dict[str, Any]:
        """The record without what differs from one machine to the next: no timings, no live bytes of workspace."""
        record = self.to_dict(quality=self.measured)
        return {name: value for name, value in record.items() if name not in ("timing", "memory")}

    def __repr__(self) -> str:
        return f"<Run of {self._told(reprlib.repr(self.text))}>"

    def __str__(self) -> str:
        return self._told(repr(self.text))

    def _told(self, text: str) -> str:
        return f"{self.recipe.label}: {self.plan.share:.1%} of the cache, {len(self.tokens)} tokens: {text}"


class Stream(Iterator[Token]):
    """A run while it happens: iterate to get the tokens; afterwards `run` is the finished Run.

    `cancel()` stops it at the next token or layer; the iteration then raises Cancelled.
    """

    def __init__(self, steps: Generator[Token, None, Run], progress: Progress) -> None:
        self._steps = steps
        self._progress = progress
        self._run: Run | None = None

    def __next__(self) -> Token:
        try:
            with telling(self._progress):
                return next(self._steps)
        except StopIteration as finished:
            if finished.value is not None:
                self._run = finished.value
            raise StopIteration from None

    def cancel(self) -> None:
        """Stop as soon as possible; may be called from any thread."""
        self._progress.cancel()

    @property
    def run(self) -> Run:
        """The finished run; iterates over what is left first."""
        for _ in self:
            pass
        if self._run is None:
            raise NotRead("this stream did not finish: it was cancelled or failed")
        return self._run
