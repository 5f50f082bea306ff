"""The control panel for notebooks: methods, their parameters, a live budget, and runs, around one session.

Every control is generated from a method's own description. A moved slider is planned in a thread that always takes the
latest state: moves never queue. A run has a thread of its own, with progress and cancel.
"""

from __future__ import annotations

import threading
import time

import ipywidgets as w

from workbench.errors import BadRecipe, Cancelled, NotRead, WorkbenchError
from workbench.kv.base import KVMethod
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import Method, find, registered
from workbench.session import Session
from workbench.weights.base import WeightMethod
from workbench_widgets import present
from workbench_widgets.html_summaries import run_html, runs_html
from workbench_widgets.notebook.latest_job import LatestJob
from workbench_widgets.notebook.method_controls import NONE, MethodControls
from workbench_widgets.notebook.pictured import Pictured
from workbench_widgets.notebook.plan_view import PlanView
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views.answer_diff import AnswerDiff

_STEP_S = 0.1  # between two updates of the progress bar: a browser draws no more


class Controls(Pictured):
    """Try methods on a session's prompt: the views follow every change, "Run" generates and compares.

    session: one that has read a prompt (NotRead otherwise). method, budget, question, max_new_tokens: where it starts.
    The live views plan the KV methods on the plain reading of the prompt; chosen weights take part when it runs.
    Runs land in `session.runs`. `close()` ends its threads.
    """

    _planner: LatestJob | None = None
    _progress: Progress | None = None

    def __init__(
        self,
        session: Session,
        *,
        method: str = "snapkv",
        budget: float = 0.25,
        question: str = "",
        max_new_tokens: int = 32,
    ) -> None:
        if session.trace is None:
            raise NotRead("no prompt has been read yet: call session.read(text) before session.controls()")
        self._session = session
        self._planner = LatestJob()
        self._updated = 0.0
        kv = registered("kv")
        rescoring = tuple(cls for cls in kv if issubclass(cls, KVMethod) and cls.only_rescores())
        beside = tuple(cls for cls in kv if cls not in rescoring)
        self.budget = w.FloatSlider(
            value=budget,
            min=0.02,
            max=1,
            step=0.01,
            readout_format=".0%",
            tooltip="share of the uncompressed cache",
            layout=w.Layout(width="100%"),
        )
        self.first = MethodControls("Cache", kv, method, self.replan, optional=False)
        self.second = MethodControls("and, on top", beside, NONE, self.replan, optional=True)
        self.decoding = MethodControls("and while decoding", rescoring, NONE, self.replan, optional=True)
        self.weights = MethodControls("Weights (when run)", registered("weights"), NONE, self._weigh, optional=True)
        self.weights_budget = w.FloatSlider(
            value=1,
            min=0.02,
            max=1,
            step=0.01,
            readout_format=".0%",
            tooltip="share of the 16-bit bytes of the weights that the method is for, compressed or not",
            layout=w.Layout(width="100%", display="none"),
        )
        self._sized = NONE  # the weight method that the slider was set for
        self.question = w.Text(
            value=question, placeholder="a question about the prompt", layout=w.Layout(flex="1 1 320px", width="auto")
        )
        self.length = w.BoundedIntText(
            value=max_new_tokens,
            min=1,
            max=session.facts.max_positions,
            tooltip="tokens to generate",
            layout=w.Layout(width="80px"),
        )
        self.run_button = w.Button(
            description="Run", button_style="primary", icon="play", layout=w.Layout(width="96px")
        )
        self.cancel_button = w.Button(description="Cancel", icon="stop", disabled=True, layout=w.Layout(width="96px"))
        self.bar = w.IntProgress(value=0, max=1, layout=w.Layout(flex="1 1 120px", width="auto", visibility="hidden"))
        self.trouble = w.HTML()  # why there is no plan
        self.status = w.HTML()  # how the run is going
        self.view = PlanView(session.plan("full"))
        self.answer = AnswerDiff.jupyter([], [])
        self.figures = w.HTML()
        self.table = w.HTML(runs_html(session.runs))
        self.budget.observe(lambda _: self.replan(), names="value")
        self.run_button.on_click(lambda _: self.run())
        self.cancel_button.on_click(lambda _: self.cancel())
        wrap = w.Layout(display="flex", flex_flow="row wrap", align_items="center", grid_gap="4px 8px")
        chosen = w.Layout(display="flex", flex_flow="row wrap", align_items="flex-start", grid_gap="8px 16px")
        budget_box = w.VBox(
            [w.HTML('<div style="font-weight:600;line-height:1.4">Budget</div>'), self.budget],
            layout=w.Layout(width="100%"),
        )
        weights_box = w.VBox(
            [self.weights, self.weights_budget], layout=w.Layout(flex="1 1 280px", width="auto", min_width="0")
        )
        self.weights.layout.flex = "0 0 auto"  # its box takes the width
        super().__init__(
            [
                budget_box,
                w.Box([self.first, self.second, self.decoding, weights_box], layout=chosen),
                self.trouble,
                self.view,
                w.Box([self.question, self.length, self.run_button, self.cancel_button, self.bar], layout=wrap),
                self.status,
                self.figures,
                self.answer,
                self.table,
            ]
        )
        self._plan_now()

    def __repr__(self) -> str:
        return f"Controls({self._session!r})"

    @property
    def heading(self) -> str:
        return self.view.heading

    def recipe(self) -> Recipe:
        """What the controls say. Raises BadParameter or BadRecipe where they contradict a method's rules."""
        return self._recipe(self.first, self.second, self.decoding, self.weights)

    def replan(self) -> None:
        """Show the plan for what the controls say now; returns at once."""
        if self._planner is not None:
            self._planner.submit(self._plan_now)

    def run(self) -> None:
        """Start a run of what the controls say; returns at once. While one is under way this does nothing."""
        if self._progress is not None:
            return
        try:
            recipe = self.recipe()
        except WorkbenchError as error:
            _say(self.status, str(error), wrong=True)
            return
        self._progress = Progress(self._advance)
        self.run_button.disabled, self.cancel_button.disabled = True, False
        self.bar.layout.visibility = "visible"
        question = self.question.value.strip() or None
        arguments = (recipe, question, self.length.value, self._progress)
        threading.Thread(target=self._run, args=arguments, name="workbench-run", daemon=True).start()

    def cancel(self) -> None:
        """Stop the run that is under way at its next token or layer."""
        if self._progress is not None:
            self._progress.cancel()

    def close(self) -> None:
        """Stop everything and take the panel away."""
        self.cancel()
        if self._planner is not None:  # refused before it was whole
            self._planner.close()
        super().close()

    def _recipe(self, *parts: MethodControls) -> Recipe:
        chosen = [self._with_size(method) for part in parts if (method := part.method()) is not None]
        kv = [method for method in chosen if method.family == "kv"]
        if len({method.key for method in kv}) < len(kv):
            raise BadRecipe("choose each cache method once: different ones, or none on top")
        limited = any(method.takes_budget() for method in kv)
        if limited and len(chosen) == 1:
            return Recipe.of(chosen[0].with_budget(self.budget.value))
        return Recipe.of(chosen, budget=self.budget.value if limited else None)

    def _with_size(self, method: Method) -> Method:
        sized = isinstance(method, WeightMethod) and method.takes_budget()
        return method.with_budget(self.weights_budget.value) if sized else method

    def _weigh(self) -> None:
        """The weight method or its parameters have changed: its slider, where there is a size to choose."""
        key = self.weights.choice.value
        if key != self._sized:
            self._sized = key
            cls = None if key == NONE else find(key)
            sized = cls is not None and issubclass(cls, WeightMethod) and cls.takes_budget()
            self.weights_budget.layout.display = "" if sized else "none"
            if sized and cls is not None:
                self.weights_budget.value = cls.default_budget or 1
        self.replan()

    def _plan_now(self) -> None:
        try:
            recipe = self._recipe(self.first, self.second, self.decoding)
            self.budget.disabled = not recipe.takes_budget()
            self.view.plan = self._session.plan(recipe, progress=Progress(self._planning))
            _say(self.trouble, "")
        except WorkbenchError as error:
            _say(self.trouble, str(error), wrong=True)

    def _run(self, recipe: Recipe, question: str | None, length: int, progress: Progress) -> None:
        session = self._session
        try:
            _say(self.status, f"Running {recipe.label} …")
            stream = session.stream(recipe, question=question, max_new_tokens=length, progress=progress)
            ids: list[int] = []
            for token in stream:
                ids.append(token.id)
                so_far = present.pieces(session.tokenizer, ids)
                AnswerDiff.update(
                    self.answer,
                    [],
                    so_far,
                    left_label=present.UNCOMPRESSED,
                    right_label=recipe.label,
                    waiting="follows",
                )
            progress.check()
            _say(self.status, "Comparing with the uncompressed model …")
            run = stream.run
            AnswerDiff.update(self.answer, **present.run_answers(run), waiting="")
            self.figures.value = run_html(run)
            _say(self.status, "")
        except Cancelled:
            _say(self.status, "Cancelled: nothing was kept of it.")
        except WorkbenchError as error:
            _say(self.status, str(error), wrong=True)
        finally:
            self.table.value = runs_html(session.runs)
            self.bar.layout.visibility = "hidden"
            self.run_button.disabled, self.cancel_button.disabled = False, True
            self._progress = None

    def _planning(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._updated >= _STEP_S and total:
            self._updated = now
            _say(self.trouble, f"{stage[:1].upper()}{stage[1:]}: {done / total:.0%}")

    def _advance(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._updated < _STEP_S and done < total:
            return
        self._updated = now
        self.bar.max, self.bar.value, self.bar.tooltip = max(total, 1), done, stage


def _say(line: w.HTML, text: str, *, wrong: bool = False) -> None:
    colour = "var(--jp-error-color1, #b3261e)" if wrong else "inherit"
    line.value = f'<div role="status" style="color:{colour};line-height:1.4">{in_markup(text)}</div>' if text else ""
