"""One tab's work: its session, what it read, planned and ran, and the lanes that do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

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
from workbench_widgets.app.lane import Lane, Post
from workbench_widgets.app.offered import Offered
from workbench_widgets.app.shelf import SHELF, Shelf

_GLANCE_S = 0.1
_SOON_S = 0.5  # a look that is there by then says nothing of how far it is


class Deployed(NamedTuple):
    """The model's weights under the methods that were planned last: bytes, and those of its own, at 16 bits."""

    methods: tuple[Method, ...]
    nbytes: int
    full_nbytes: int


@dataclass(frozen=True)
class Reading:
    """A prompt that was read: by which session, and its tokens as text."""

    session: Session
    trace: Trace
    tokens: tuple[str, ...]


class Workspace(param.Parameterized):
    """What one tab knows. Parameters change in the page's thread only; views watch them.

    Six lanes: `main` for what takes seconds (loading, reading, running, comparing), `planning` for the budget slider,
    `looking` for maps and tables, `surveying` for looks at all heads of a long prompt, `weighing` for looks at all
    weights, `counting` for the tokens of a text that is being written. A budget move never waits for a run, nor a map
    for a survey.
    """

    reading: Any = param.Parameter(None)
    plan: Any = param.Parameter(None)
    run: Any = param.Parameter(None)
    answer: Any = param.Parameter(())  # tokens of the run that is being generated
    rows: Any = param.Parameter(pd.DataFrame())  # all runs so far
    selected: Any = param.Parameter(None)  # (layer, query head) under the glass
    focused: Any = param.Boolean(False)  # whether tokens show the selected head alone
    problem: Any = param.String("")  # of the last piece of work
    refusal: Any = param.String("")  # why the recipe or its budget cannot be had
    working: Any = param.Boolean(False)
    stage: Any = param.Parameter(("", None))  # what the main lane does, and the share done
    model: Any = param.String("")  # the model that is loaded
    loaded: Any = param.Parameter(("", None))  # a model's name and its session, before it has read anything
    looking_stage: Any = param.Parameter(("", None))  # the same of a map or a table, once it takes long
    survey_stage: Any = param.Parameter(("", None))  # what the survey does, and the share done
    weighing_stage: Any = param.Parameter(("", None))  # what the look at weights does, and the share done
    weights: Any = param.Parameter(None)  # Deployed
    dark: Any = param.Boolean(False)
    recipe: Any = param.Parameter(None)  # the one that was planned last

    def __init__(self, post: Post, shelf: Shelf = SHELF, offered: Offered | None = None) -> None:
        super().__init__()
        self._shelf = shelf
        self._offered = offered or Offered("", anything=True)
        self._alone = Lock()  # what changes a session beyond a plan's own memory happens one at a time
        self.main = Lane("work", post, self._busy, self._progress)
        self.planning = Lane("planning", post, None, self._planning_progress)
        self.looking = Lane("looking", post, self._looking_busy, self._looking_progress)
        self.surveying = Lane("surveying", post, self._survey_busy, self._survey_progress)
        self.weighing = Lane("weighing", post, self._weighing_busy, self._weighing_progress)
        self.counting = Lane("counting", post)
        self._looking_since = 0.0
        self._following = False  # whether the main lane answers because something moved

    def cancel(self) -> None:
        """Stop what is going on; what was there before stays."""
        self.main.cancel()
        self.planning.cancel()
        self.looking.cancel()
        self.surveying.cancel()
        self.weighing.cancel()

    def close(self) -> None:
        """The tab is gone: stop its work and let go of what it holds."""
        for lane in (self.main, self.planning, self.looking, self.surveying, self.weighing, self.counting):
            lane.close()
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

        def work(progress: Progress) -> Reading:
            session = before or Session(self._shelf.get(model, progress))
            self.main.tell(lambda: self._is_loaded(model, session), always=True)
            with self._exclusive(progress):
                trace = session.read(text, progress=progress)
            return Reading(session, trace, tuple(present.pieces(session.tokenizer, trace.ids)))

        def finish(reading: Reading) -> None:
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

        def plan(progress: Progress) -> tuple[Plan, Deployed]:
            made = session.plan(recipe, progress=progress)
            return made, Deployed(recipe.family("weights"), *session.weight_nbytes(recipe, progress=progress))

        def work(progress: Progress) -> tuple[Plan, Deployed]:
            if not heavy:
                return plan(progress)
            with self._exclusive(progress):
                return plan(progress)

        def finish(made: tuple[Plan, Deployed]) -> None:
            if self.reading is None or self.reading.trace is not trace:
                return  # another prompt was read meanwhile
            quiet = self.stage if self.working else ("", None)
            self.param.update(plan=made[0], weights=made[1], refusal="", stage=quiet)

        def failed(error: WorkbenchError) -> None:
            self.refuse("" if isinstance(error, Cancelled) else str(error))

        # A reading for a budget that is no longer wanted would only keep the wanted one waiting.
        self.planning.submit(work, finish, failed, interrupt=interrupt or reads)

    def refuse(self, message: str) -> None:
        """Say why the recipe cannot be had; what was planned before stays in view."""
        self.param.update(refusal=message, stage=self.stage if self.working else ("", None))

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
        shown: list[str] = []

        def work(progress: Progress) -> tuple[Run, dict[str, Any]]:
            with self._exclusive(progress):
                if follow and last is not None:
                    stream = last.ask_stream(question or "", max_new_tokens=max_new_tokens, progress=progress)
                else:
                    stream = session.stream(recipe, question=question, max_new_tokens=max_new_tokens, progress=progress)
                for token in stream:
                    shown.append(token.text)
                    self.main.tell(lambda: self._coming(shown))
                run = stream.run
                run.measure(progress=progress)
                row = row_of(run)
            return run, row | {"question": question}

        def finish(outcome: tuple[Run, dict[str, Any]]) -> None:
            run, row = outcome
            self.param.update(run=run, answer=(), problem="")
            self._add([row])

        self.param.update(answer=())
        self.announce("Running")
        self.main.submit(work, finish, self._failed, interrupt=interrupt)

    def compare(
        self, recipes: Sequence[Any], budgets: Sequence[Any], question: str | None, max_new_tokens: int
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
                    rows = [row | {"question": question} for row in frame.to_dict("records")]
                    self.main.tell(partial(self._add, rows), always=True)

        self.announce("Comparing")
        self.main.submit(work, lambda _: None, self._failed)

    def look(
        self, work: Callable[[Progress], Any], show: Callable[[Any], None], given_up: Callable[[], None] = lambda: None
    ) -> None:
        """Compute something to look at; only the latest request counts. `looking_stage` tells how far a long one is.

        given_up: called where it failed or a person cancelled it.
        """

        def failed(error: WorkbenchError) -> None:
            given_up()
            if not isinstance(error, Cancelled):
                self.problem = str(error)

        self.looking.submit(work, show, failed)

    def survey(
        self, work: Callable[[Progress], Any], show: Callable[[Any], None], given_up: Callable[[], None]
    ) -> None:
        """As `look`, for what takes long: a newer request cancels it, and `survey_stage` tells how far it is.

        given_up: called where it failed or a person cancelled it.
        """

        def failed(error: WorkbenchError) -> None:
            given_up()
            if not isinstance(error, Cancelled):
                self.problem = str(error)

        self.surveying.submit(work, show, failed, interrupt=True)

    def weigh(
        self,
        work: Callable[[Progress], Any],
        show: Callable[[Any], None],
        given_up: Callable[[], None],
        *,
        stage: str = "",
    ) -> None:
        """As `survey`, for looks at all weights, which a run does not wait for: it cancels them.

        stage: what is said until the work says it itself.
        """

        def failed(error: WorkbenchError) -> None:
            given_up()
            if not isinstance(error, Cancelled):
                self.problem = str(error)

        self.weighing_stage = (stage, None)
        self.weighing.submit(work, show, failed, interrupt=True)

    def stop_weighing(self) -> None:
        """What the look at weights computes is not wanted any more."""
        self.weighing.drop()
        self.weighing_stage = ("", None)

    @property
    def kv_head(self) -> tuple[int, int] | None:
        """The selected layer, with the KV head that the selected query head reads."""
        if self.selected is None or self.reading is None:
            return None
        layer, head = self.selected
        return layer, head // self.reading.trace.layers[layer].groups

    # -- inside

    @contextmanager
    def _exclusive(self, progress: Progress) -> Iterator[None]:
        while not self._alone.acquire(timeout=_GLANCE_S):
            progress.check()
        try:
            yield
        finally:
            self._alone.release()

    def announce(self, what: str) -> None:
        """Say what the main lane is about to do."""
        self.weighing.cancel()
        self.param.update(problem="", stage=(what, None), working=True)

    def _failed(self, error: WorkbenchError) -> None:
        self.param.update(
            problem="Cancelled; everything is as it was before." if isinstance(error, Cancelled) else str(error)
        )

    def _busy(self, busy: bool) -> None:
        self._following = self._following and busy
        self.param.update(working=busy, stage=self.stage if busy else ("", None))

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.stage = (stage[:1].upper() + stage[1:], done / total if total else None)

    def _planning_progress(self, stage: str, done: int, total: int) -> None:
        if not self.working:
            self._progress(stage, done, total)

    def _looking_busy(self, busy: bool) -> None:
        self._looking_since = time.monotonic()
        self.looking_stage = ("", None)

    def _looking_progress(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._looking_since > _SOON_S:
            self.looking_stage = (stage[:1].upper() + stage[1:], done / total if total else None)

    def _survey_busy(self, busy: bool) -> None:
        self.survey_stage = self.survey_stage if busy else ("", None)

    def _survey_progress(self, stage: str, done: int, total: int) -> None:
        self.survey_stage = (stage[:1].upper() + stage[1:], done / total if total else None)

    def _weighing_busy(self, busy: bool) -> None:
        self.weighing_stage = self.weighing_stage if busy else ("", None)

    def _weighing_progress(self, stage: str, done: int, total: int) -> None:
        self.weighing_stage = (stage[:1].upper() + stage[1:], done / total if total else None)

    def _coming(self, shown: list[str]) -> None:
        self.answer = tuple(shown)

    def _add(self, rows: list[dict[str, Any]]) -> None:
        frame = pd.DataFrame([*self.rows.to_dict("records"), *rows])
        frame["run"] = range(1, len(frame) + 1)
        self.rows = frame


def _cases(recipes: Sequence[Any], budgets: Sequence[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """One (recipe, [budget]) for each run; what takes no budget once."""
    for recipe in recipes:
        for budget in budgets if Recipe.of(recipe).takes_budget() else budgets[:1]:
            yield recipe, [budget]
