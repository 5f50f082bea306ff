"""One tab's work: its session, what it read, planned and ran, and the workers that do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import NamedTuple, TypeVar

import pandas as pd
import param

from workbench.errors import Cancelled, ModelNotOffered, WorkbenchError
from workbench.kv.base import KVMethod
from workbench.kv.plan import Plan
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import Method
from workbench.runtime.run import Run, Stream
from workbench.session import Session
from workbench.trace import Trace
from workbench_widgets import present
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.app.work.records import Asked, Record, failed, frame_of, record_of
from workbench_widgets.app.work.worker import Post, Worker

T = TypeVar("T")

_GLANCE_S = 0.1
_SOON_S = 0.5  # a look that is there by then says nothing of how far it is


class Stage(NamedTuple):
    """What a worker does, and the share done where that is known; without a name while nothing goes on."""

    name: str
    share: float | None = None

    @classmethod
    def of(cls, name: str, done: int, total: int) -> Stage:
        """A step of a method's own progress, as the page shows it."""
        return cls(name[:1].upper() + name[1:], done / total if total else None)


IDLE = Stage("")


class WeightBytes(NamedTuple):
    """The model's weights under the methods that were planned last, in bytes: as they lie in memory, and with what is
    not compressed at 16 bits; the same of the model's own weights.
    """

    methods: tuple[Method, ...]
    nbytes: int
    deployed_nbytes: int
    full_nbytes: int
    full_deployed_nbytes: int

    @classmethod
    def of(cls, session: Session, recipe: Recipe, progress: Progress) -> WeightBytes:
        """Under the weight methods of a recipe, which compress the weights if that was not done yet."""
        methods, variants = recipe.family("weights"), session.readings.variants
        deployed, full = session.weight_nbytes(recipe, progress=progress)
        return cls(methods, variants.nbytes(methods), deployed, variants.nbytes(()), full)


@dataclass(frozen=True)
class Turn:
    """A question on a cache that goes on, and two answers: each model continues its own transcript.

    record: the run. full: the uncompressed model's own run, with its own earlier answers before it. before: the record
    of the run that was asked on.
    """

    question: str
    record: Record
    full: Run
    before: Record


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read: by which session, its tokens as text, and the text and model's name that were given."""

    session: Session
    trace: Trace
    tokens: tuple[str, ...]
    model: str = ""
    text: str = ""


class Workspace(param.Parameterized):
    """What one tab knows. Parameters change in the page's thread only; views watch them.

    Eight workers: `main` for what takes seconds (loading, reading, running, comparing), `planning` for the budget
    slider, `looking` for maps and tables, `surveying` for looks at all heads of a long prompt, `weighing` for looks at
    all weights, `counting` for the tokens of a text that is being written, `saving` for the copy of the page on the
    server, `reporting` for reports. A budget move never waits for a run, nor a map
    for a survey.
    """

    reading: param.Parameter[ReadPrompt | None] = param.Parameter(None)
    plan: param.Parameter[Plan | None] = param.Parameter(None)
    run: param.Parameter[Run | None] = param.Parameter(None)
    shown: param.Parameter[Record | None] = param.Parameter(None)  # the record of `run`, or one that was opened
    turns: param.Parameter[tuple[Turn, ...]] = param.Parameter(())  # of the run that is asked on
    answer: param.Parameter[tuple[str, ...]] = param.Parameter(())  # tokens of the run that is being generated
    records: param.Parameter[tuple[Record, ...]] = param.Parameter(())  # all runs so far
    rows: param.Parameter[pd.DataFrame] = param.Parameter(pd.DataFrame())  # the same as a table
    selected: param.Parameter[tuple[int, int] | None] = param.Parameter(None)  # layer, query head
    focused = param.Boolean(False)  # whether tokens show the selected head alone
    dirty = param.Boolean(False)  # whether the form holds another prompt than the one that was read
    problem = param.String("")  # of the last piece of work
    refusal = param.String("")  # why the recipe or its budget cannot be had
    working = param.Boolean(False)
    stage: param.Parameter[Stage] = param.Parameter(IDLE)  # what the main worker does
    model = param.String("")  # the model that is loaded
    # A model and its session, before it has read anything.
    loaded: param.Parameter[tuple[str, Session | None]] = param.Parameter(("", None))
    looking_stage: param.Parameter[Stage] = param.Parameter(IDLE)  # of a map or a table, once it takes long
    survey_stage: param.Parameter[Stage] = param.Parameter(IDLE)
    weighing_stage: param.Parameter[Stage] = param.Parameter(IDLE)
    weights: param.Parameter[WeightBytes | None] = param.Parameter(None)
    dark = param.Boolean(False)
    recipe: param.Parameter[Recipe | None] = param.Parameter(None)  # the one that was planned last

    def __init__(self, post: Post, models: LoadedModels, offered: OfferedModels | None = None) -> None:
        super().__init__()
        self._models = models
        self._offered = offered or OfferedModels("", anything=True)
        self._session_lock = Lock()  # what changes a session beyond a plan's own memory happens one at a time
        self.main = Worker("work", post, self._busy, self._progress)
        self.planning = Worker("planning", post, None, self._planning_progress)
        self.looking = Worker("looking", post, self._looking_busy, self._looking_progress)
        self.surveying = Worker("surveying", post, self._survey_busy, self._survey_progress)
        self.weighing = Worker("weighing", post, self._weighing_busy, self._weighing_progress)
        self.counting = Worker("counting", post)
        self.saving = Worker("saving", post)
        self.reporting = Worker("reporting", post)
        self._looking_since = 0.0
        self._following = False  # whether the main worker answers because something moved

    def cancel(self) -> None:
        """Stop what is going on; what was there before stays."""
        self.main.cancel()
        self.planning.cancel()
        self.looking.cancel()
        self.surveying.cancel()
        self.weighing.cancel()

    def close(self) -> None:
        """The tab is gone: stop its work and let go of what it holds."""
        lanes = (self.main, self.planning, self.looking, self.surveying, self.weighing, self.counting)
        for worker in (*lanes, self.saving, self.reporting):
            worker.close()
        with param.parameterized.discard_events(self):  # there is no page to tell
            self.param.update(reading=None, plan=None, run=None, recipe=None, weights=None)
            self.param.update(shown=None, turns=(), records=(), rows=pd.DataFrame())
            self.loaded = ("", None)

    # -- reading

    def read(self, model: str, text: str, done: Callable[[], None] | None = None) -> None:
        """Load the model where needed and read `text`; whatever was going on is cancelled.

        A model that is not offered is refused before anything is looked for.
        """
        try:
            self._offered.check(model)
        except ModelNotOffered as error:
            self.problem = str(error)
            return
        before = self.reading.session if self.reading is not None and self.model == model else None

        def work(progress: Progress) -> ReadPrompt:
            session = before or Session(self._models.get(model, progress))
            self.main.tell(lambda: self._is_loaded(model, session), always=True)
            with self._exclusive(progress):
                trace = session.read(text, progress=progress)
            return ReadPrompt(session, trace, tuple(present.prompt_pieces(trace.prompt)), model, text)

        def finish(reading: ReadPrompt) -> None:
            self.param.update(
                reading=reading,
                plan=None,
                weights=None,
                run=None,
                shown=None,
                turns=(),
                answer=(),
                model=model,
                problem="",
                selected=None,
                focused=False,
            )
            if done is not None:
                done()

        self._following = False
        self.announce("Reading")
        self.main.submit(work, finish, self._failed, interrupt=True)

    def _is_loaded(self, model: str, session: Session) -> None:
        self.loaded = (model, session)

    def session_of(self, model: str) -> Session | None:
        """The session of this model, where it is the one loaded last."""
        name, session = self.loaded
        return session if name == model else None

    # -- planning

    def make_plan(self, recipe: Recipe, *, interrupt: bool) -> None:
        """Plan `recipe` on what was read; of several waiting only the latest is done.

        interrupt: also give up what is being planned. Not for budget moves, which would starve each other.
        """
        if self.reading is None:
            return
        session, trace = self.reading.session, self.reading.trace
        heavy = bool(recipe.family("weights") or recipe.family("attention"))  # may read the prompt once more
        reads = any(isinstance(method, KVMethod) and method.supplies("read") for method in recipe.methods)

        def plan(progress: Progress) -> tuple[Plan, WeightBytes]:
            planned = session.plan(recipe, progress=progress)
            return planned, WeightBytes.of(session, recipe, progress)

        def work(progress: Progress) -> tuple[Plan, WeightBytes]:
            if not heavy:
                return plan(progress)
            with self._exclusive(progress):
                return plan(progress)

        def finish(outcome: tuple[Plan, WeightBytes]) -> None:
            if self.reading is None or self.reading.trace is not trace:
                return  # another prompt was read meanwhile
            quiet = self.stage if self.working else IDLE
            self.param.update(plan=outcome[0], weights=outcome[1], refusal="", stage=quiet)

        def failed(error: WorkbenchError) -> None:
            self.refuse("" if isinstance(error, Cancelled) else str(error))

        # A reading for a budget that is no longer wanted would only keep the wanted one waiting.
        self.planning.submit(work, finish, failed, interrupt=interrupt or reads)

    def refuse(self, message: str) -> None:
        """Say why the recipe cannot be had; what was planned before stays in view."""
        self.param.update(refusal=message, stage=self.stage if self.working else IDLE)

    # -- running

    def follow(self, recipe: Recipe, asked: Asked) -> None:
        """Answer because something moved: gives way to everything else, and to the next of its kind."""
        if self.reading is None or (self.main.awaited and not self._following):
            return
        self.generate(recipe, asked, interrupt=True)
        self._following = True

    def stop_following(self) -> None:
        """What is being answered because something moved is not wanted any more."""
        if self._following:
            self._following = False
            self.main.drop()
            self.answer = ()

    def generate(self, recipe: Recipe, asked: Asked, *, interrupt: bool = False) -> None:
        """Run `recipe` token by token and measure it."""
        if self.reading is None:
            return
        session, model = self.reading.session, self.model

        def work(progress: Progress) -> Record:
            with self._exclusive(progress):
                stream = session.stream(
                    recipe, question=asked.question, max_new_tokens=asked.max_new_tokens, progress=progress
                )
                run = self._streamed(stream, progress)
                return record_of(session, model, asked, run)

        def finish(record: Record) -> None:
            self._keep([record], run=record.run, shown=self._numbered(record, 0), turns=(), answer=(), problem="")

        self._begin_answer("Running")
        self.main.submit(work, finish, self._failed, interrupt=interrupt)

    def ask_on(self, asked: Asked) -> None:
        """Another question on the cache of the last run; the uncompressed model goes on from its own answers."""
        if self.reading is None or self.run is None or self.shown is None:
            return
        session, model, last, before, turns = self.reading.session, self.model, self.run, self.shown, self.turns

        def work(progress: Progress) -> tuple[Record, Turn]:
            question, most = asked.question or "", asked.max_new_tokens
            with self._exclusive(progress):
                full = turns[-1].full if turns else self._uncompressed(session, last, progress)
                run = self._streamed(last.ask_stream(question, max_new_tokens=most, progress=progress), progress)
                own = full.ask(question, max_new_tokens=most, progress=progress)
                session.runs.remove(own)
                record = record_of(session, model, asked, run, before).beside(own, session.tokenizer, asked)
            return record, Turn(question, record, own, before)

        def finish(outcome: tuple[Record, Turn]) -> None:
            record, turn = outcome
            self._keep(
                [record], run=record.run, shown=self._numbered(record, 0), turns=(*turns, turn), answer=(), problem=""
            )

        self._begin_answer("Asking on")
        self.main.submit(work, finish, self._failed)

    def compare(self, recipes: Sequence[Recipe], asked: Asked) -> None:
        """Run every recipe, budget included; each row is shown when it is there, and cancelling keeps those."""
        if self.reading is None:
            return
        self.stop_following()
        session, model = self.reading.session, self.model

        def measured(recipe: Recipe, progress: Progress) -> Record:
            try:
                run = session.run(
                    recipe, question=asked.question, max_new_tokens=asked.max_new_tokens, progress=progress
                )
                run.measure(progress=progress)
                return record_of(session, model, asked.under(recipe), run)
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001  one recipe that fails must not take the others with it
                return failed(session, model, asked.under(recipe), recipe, error)

        def work(progress: Progress) -> None:
            with self._exclusive(progress):
                for number, recipe in enumerate(recipes):
                    progress.update("comparing", number, len(recipes))
                    record = measured(recipe, Progress(lambda *_: progress.check()))
                    self.main.tell(partial(self._keep, [record]), always=True)

        self.announce("Comparing")
        self.main.submit(work, lambda _: None, self._failed)

    # -- what was run

    def _streamed(self, stream: Stream, progress: Progress) -> Run:
        """A stream to its end, shown as it comes, and measured."""
        pieces: list[str] = []
        for token in stream:
            pieces.append(token.text)
            self.main.tell(lambda: self._show_answer(pieces))
        stream.run.measure(progress=progress)
        return stream.run

    def _uncompressed(self, session: Session, run: Run, progress: Progress) -> Run:
        """The uncompressed model's own run on the question of `run`."""
        question, most = run.question, run.max_new_tokens
        full = session.run("full", question=question, max_new_tokens=most, progress=progress)
        session.runs.remove(full)  # it was not asked for: no run of the page
        return full

    def _begin_answer(self, what: str) -> None:
        self.stop_following()
        self.param.update(answer=())
        self.announce(what)

    def _numbered(self, record: Record, place: int) -> Record:
        """A record that is added at this place of several, with its number."""
        return record.changed(run=max((r.number for r in self.records), default=0) + 1 + place)

    def _keep(self, records: Sequence[Record], **more: object) -> None:
        """Add records, and change what else there is at once."""
        added = [self._numbered(record, place) for place, record in enumerate(records)]
        self.set_records((*self.records, *added), **more)

    def set_records(self, records: Sequence[Record], **more: object) -> None:
        """All there is from now on: what is restored, noted, pinned or deleted."""
        self.param.update(records=tuple(records), rows=frame_of(records), **more)

    def look(
        self, work: Callable[[Progress], T], show: Callable[[T], None], given_up: Callable[[], None] = lambda: None
    ) -> None:
        """Compute something to look at; only the latest request counts. `looking_stage` tells how far a long one is.

        given_up: called where it failed or a person cancelled it.
        """
        self.looking.submit(work, show, self._given_up(given_up))

    def survey(self, work: Callable[[Progress], T], show: Callable[[T], None], given_up: Callable[[], None]) -> None:
        """As `look`, for what takes long: a newer request cancels it, and `survey_stage` tells how far it is.

        given_up: called where it failed or a person cancelled it.
        """
        self.surveying.submit(work, show, self._given_up(given_up), interrupt=True)

    def weigh(
        self,
        work: Callable[[Progress], T],
        show: Callable[[T], None],
        given_up: Callable[[], None],
        *,
        stage: str = "",
    ) -> None:
        """As `survey`, for looks at all weights, which a run does not wait for: it cancels them.

        stage: what is said until the work says it itself.
        """
        self.weighing_stage = Stage(stage)
        self.weighing.submit(work, show, self._given_up(given_up), interrupt=True)

    def stop_weighing(self) -> None:
        """What the look at weights computes is not wanted any more."""
        self.weighing.drop()
        self.weighing_stage = IDLE

    @property
    def kv_head(self) -> tuple[int, int] | None:
        """The selected layer, with the KV head that the selected query head reads."""
        if self.selected is None or self.reading is None:
            return None
        layer, head = self.selected
        trace = self.reading.trace
        return layer, head // trace.layers[trace.place(layer)].groups

    # -- inside

    @contextmanager
    def _exclusive(self, progress: Progress) -> Iterator[None]:
        while not self._session_lock.acquire(timeout=_GLANCE_S):
            progress.check()
        try:
            yield
        finally:
            self._session_lock.release()

    def announce(self, what: str) -> None:
        """Say what the main worker is about to do."""
        self.weighing.cancel()
        self.param.update(problem="", stage=Stage(what), working=True)

    def _given_up(self, given_up: Callable[[], None]) -> Callable[[WorkbenchError], None]:
        """What is done where a look at something failed or was cancelled."""

        def failed(error: WorkbenchError) -> None:
            given_up()
            if not isinstance(error, Cancelled):
                self.problem = str(error)

        return failed

    def _failed(self, error: WorkbenchError) -> None:
        self.param.update(
            problem="Cancelled; everything is as it was before." if isinstance(error, Cancelled) else str(error)
        )

    def _busy(self, busy: bool) -> None:
        self._following = self._following and busy
        self.param.update(working=busy, stage=self.stage if busy else IDLE)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.stage = Stage.of(stage, done, total)

    def _planning_progress(self, stage: str, done: int, total: int) -> None:
        if not self.working:
            self._progress(stage, done, total)

    def _looking_busy(self, busy: bool) -> None:
        self._looking_since = time.monotonic()
        self.looking_stage = IDLE

    def _looking_progress(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._looking_since > _SOON_S:
            self.looking_stage = Stage.of(stage, done, total)

    def _survey_busy(self, busy: bool) -> None:
        self.survey_stage = self.survey_stage if busy else IDLE

    def _survey_progress(self, stage: str, done: int, total: int) -> None:
        self.survey_stage = Stage.of(stage, done, total)

    def _weighing_busy(self, busy: bool) -> None:
        self.weighing_stage = self.weighing_stage if busy else IDLE

    def _weighing_progress(self, stage: str, done: int, total: int) -> None:
        self.weighing_stage = Stage.of(stage, done, total)

    def _show_answer(self, pieces: list[str]) -> None:
        self.answer = tuple(pieces)
