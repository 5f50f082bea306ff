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
from workbench.runtime.run import Run
from workbench.session import Session, row_of
from workbench.trace import Trace
from workbench_widgets import present
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels
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
    """The model's weights under the methods that were planned last: bytes, and those of its own, at 16 bits."""

    methods: tuple[Method, ...]
    nbytes: int
    full_nbytes: int


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read: by which session, and its tokens as text."""

    session: Session
    trace: Trace
    tokens: tuple[str, ...]


class Workspace(param.Parameterized):
    """What one tab knows. Parameters change in the page's thread only; views watch them.

    Six workers: `main` for what takes seconds (loading, reading, running, comparing), `planning` for the budget slider,
    `looking` for maps and tables, `surveying` for looks at all heads of a long prompt, `weighing` for looks at all
    weights, `counting` for the tokens of a text that is being written. A budget move never waits for a run, nor a map
    for a survey.
    """

    reading: param.Parameter[ReadPrompt | None] = param.Parameter(None)
    plan: param.Parameter[Plan | None] = param.Parameter(None)
    run: param.Parameter[Run | None] = param.Parameter(None)
    answer: param.Parameter[tuple[str, ...]] = param.Parameter(())  # tokens of the run that is being generated
    rows: param.Parameter[pd.DataFrame] = param.Parameter(pd.DataFrame())  # all runs so far
    selected: param.Parameter[tuple[int, int] | None] = param.Parameter(None)  # layer, query head
    focused = param.Boolean(False)  # whether tokens show the selected head alone
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
        for worker in (self.main, self.planning, self.looking, self.surveying, self.weighing, self.counting):
            worker.close()
        with param.parameterized.discard_events(self):  # there is no page to tell
            self.param.update(reading=None, plan=None, run=None, rows=pd.DataFrame(), recipe=None, weights=None)
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
            return ReadPrompt(session, trace, tuple(present.prompt_pieces(trace.prompt)))

        def finish(reading: ReadPrompt) -> None:
            self.param.update(
                reading=reading,
                plan=None,
                weights=None,
                run=None,
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
            return planned, WeightBytes(recipe.family("weights"), *session.weight_nbytes(recipe, progress=progress))

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

    def follow(self, recipe: Recipe, question: str | None, max_new_tokens: int) -> None:
        """Answer because something moved: gives way to everything else, and to the next of its kind."""
        if self.reading is None or (self.main.awaited and not self._following):
            return
        self.generate(recipe, question, max_new_tokens, interrupt=True)
        self._following = True

    def stop_following(self) -> None:
        """What is being answered because something moved is not wanted any more."""
        if self._following:
            self._following = False
            self.main.drop()
            self.answer = ()

    def generate(
        self,
        recipe: Recipe,
        question: str | None,
        max_new_tokens: int,
        *,
        follow: bool = False,
        interrupt: bool = False,
    ) -> None:
        """Run `recipe` token by token and measure it; with `follow` ask on from the last run instead."""
        if self.reading is None:
            return
        self.stop_following()
        session, last = self.reading.session, self.run
        pieces: list[str] = []

        def work(progress: Progress) -> tuple[Run, dict[str, object]]:
            with self._exclusive(progress):
                if follow and last is not None:
                    stream = last.ask_stream(question or "", max_new_tokens=max_new_tokens, progress=progress)
                else:
                    stream = session.stream(recipe, question=question, max_new_tokens=max_new_tokens, progress=progress)
                for token in stream:
                    pieces.append(token.text)
                    self.main.tell(lambda: self._show_answer(pieces))
                run = stream.run
                run.measure(progress=progress)
                row = row_of(run)
            return run, row | {"question": question}

        def finish(outcome: tuple[Run, dict[str, object]]) -> None:
            run, row = outcome
            self.param.update(run=run, answer=(), problem="")
            self._add([row])

        self.param.update(answer=())
        self.announce("Running")
        self.main.submit(work, finish, self._failed, interrupt=interrupt)

    def compare(
        self, recipes: Sequence[Recipe], budgets: Sequence[str], question: str | None, max_new_tokens: int
    ) -> None:
        """Run every recipe at every budget; each row is shown when it is there, and cancelling keeps those."""
        if self.reading is None:
            return
        self.stop_following()
        session = self.reading.session
        cases = list(_cases(recipes, budgets))

        def work(progress: Progress) -> None:
            with self._exclusive(progress):
                for number, (recipe, several) in enumerate(cases):
                    progress.update("comparing", number, len(cases))
                    quiet = Progress(lambda *_: progress.check())
                    frame = session.compare(
                        [recipe], budgets=several, question=question, max_new_tokens=max_new_tokens, progress=quiet
                    )
                    rows = [{**row, "question": question} for row in _records(frame)]
                    self.main.tell(partial(self._add, rows), always=True)

        self.announce("Comparing")
        self.main.submit(work, lambda _: None, self._failed)

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

    def _add(self, rows: list[dict[str, object]]) -> None:
        frame = pd.DataFrame([*_records(self.rows), *rows])
        frame["run"] = range(1, len(frame) + 1)
        self.rows = frame


def _records(frame: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _cases(recipes: Sequence[Recipe], budgets: Sequence[str]) -> Iterator[tuple[Recipe, list[str]]]:
    """One (recipe, [budget]) for each run; what takes no budget once."""
    for recipe in recipes:
        for budget in budgets if recipe.takes_budget() else budgets[:1]:
            yield recipe, [budget]
