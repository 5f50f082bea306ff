"""Question and answer: the compressed answer as it comes, beside the full one, with what the difference measures."""

from __future__ import annotations

from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets import present
from workbench_widgets.app.elements.figures_row import figures_row, show
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.views import AnswerDiff


class Answer:
    """`run(follow)` is called when somebody asks; `changed()` when a field changes."""

    def __init__(
        self, workspace: Workspace, question: str, tokens: int, run: Callable[[bool], None], changed: Callable[[], None]
    ) -> None:
        self._workspace = workspace
        self.question = TextField(
            label="Question about the text",
            value=question,
            placeholder="leave empty to let the model go on from the text",
            size="small",
            sizing_mode="stretch_width",
            margin=(8, 8, 8, 8),
        )
        self.tokens = pmu.IntInput(
            label="At most (tokens)",
            value=tokens,
            start=1,
            step=8,
            size="small",
            width=140,
            margin=(8, 8, 8, 0),
        )
        self.run = pmu.Button(
            label="Run",
            icon="play_arrow",
            color="primary",
            variant="contained",
            width=110,
            margin=(8, 0),
            disabled=True,
        )
        self.follows = pmu.Switch(
            label="Follow",
            description="Answer again whenever the recipe or a budget has changed.",
            size="small",
            width=100,
            margin=(14, 0, 8, 8),
        )
        self.diff = AnswerDiff.panel(visible=False, margin=(6, 0, 2, 0))
        self.figures = figures_row()
        self.figures.visible = False
        self.follow = TextField(
            label="Ask on, from the same compressed cache",
            size="small",
            sizing_mode="stretch_width",
            margin=(8, 8, 4, 8),
        )
        self.ask = pmu.Button(label="Ask", icon="reply", variant="outlined", width=110, margin=(8, 0, 4, 0))
        self._follow_row = pn.Row(self.follow, self.ask, sizing_mode="stretch_width", visible=False, margin=0)
        self._question_line = pn.pane.HTML(
            "",
            visible=False,
            margin=(2, 10),
            stylesheets=["div { font-size: 13px; opacity: .75; }"],
            sizing_mode="stretch_width",
        )
        self.run.on_click(lambda _: run(False))
        self.ask.on_click(lambda _: run(True))
        self.question.param.watch(lambda _: changed(), "value")
        self.tokens.param.watch(lambda _: changed(), "value")
        workspace.param.watch(self._show, ["run", "answer"])
        workspace.param.watch(self._enable, ["reading", "working"])
        workspace.param.watch(lambda event: AnswerDiff.update(self.diff, dark=event.new), "dark")
        self.body = pmu.Paper(
            pn.Row(self.question, self.tokens, self.run, self.follows, sizing_mode="stretch_width", margin=0),
            self._question_line,
            self.diff,
            self.figures,
            self._follow_row,
            variant="outlined",
            elevation=0,
            sizing_mode="stretch_width",
            margin=(0, 0, 12, 0),
            sx={"padding": "4px 16px 8px"},
        )

    def _enable(self, *events: Event) -> None:
        self.run.disabled = self.ask.disabled = self._workspace.reading is None or self._workspace.working

    def _show(self, *events: Event) -> None:
        workspace = self._workspace
        run, partial_answer = workspace.run, workspace.answer
        if partial_answer:  # the full answer is measured when this one is there
            AnswerDiff.update(
                self.diff,
                [],
                list(partial_answer),
                left_label="Full cache",
                right_label="Compressed",
                waiting="follows",
            )
            self.diff.visible = True
            self.figures.visible = self._follow_row.visible = self._question_line.visible = False
        elif run is not None and workspace.reading is not None:
            AnswerDiff.update(self.diff, waiting="", **present.answers(run, workspace.reading.session.tokenizer))
            show(self.figures, present.run_figures(run))
            self._question_line.object = present.question_line(run)
            self.diff.visible = self.figures.visible = self._follow_row.visible = self._question_line.visible = True
        else:
            self.diff.visible = self.figures.visible = self._follow_row.visible = self._question_line.visible = False
