"""Question and answer: the compressed answer as it comes, beside the uncompressed one, and what that measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets import present
from workbench_widgets.app.elements.figures_row import figures_row, show
from workbench_widgets.app.elements.notice import Notice
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.work.workspace import Turn, Workspace
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views import AnswerDiff

_WRONG = (
    "The uncompressed model's own answer is wrong here: agreement with it says nothing of whether an answer is right. "
    "Choose a text or question that the model can answer, or change what is expected."
)
_AFTER = "<div>The figures compare both models after the compressed model's earlier answers.</div>"
_CHAT = """
table { width: 100%; border-collapse: collapse; table-layout: fixed; font: 13px/1.5 system-ui, sans-serif; }
th { text-align: left; font-weight: 600; padding: 4px 12px 4px 0; }
td { vertical-align: top; padding: 4px 12px 6px 0; overflow-wrap: anywhere; }
td[colspan] { font-weight: 600; opacity: .8; padding-top: 8px;
  border-top: 1px solid color-mix(in srgb, currentColor 18%, transparent); }
"""


class Answer:
    """`run(follow)` is called when somebody asks; `changed()` when a field changes."""

    def __init__(
        self,
        workspace: Workspace,
        question: str,
        tokens: int,
        run: Callable[[bool], None],
        changed: Callable[[], None],
        *,
        expected: str = "",
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
        self.expected = TextField(
            label="Expected answer",
            value=expected,
            description="What a right answer contains. It is told of every run whether its answer is right.",
            placeholder="not judged",
            size="small",
            width=150,
            margin=(8, 8, 8, 0),
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
            min_width=110,
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
        self.old = Notice(severity="info", margin=(4, 0), css_classes=["wb-old-answer"])
        self.again = pmu.Button(label="Run again", icon="replay", size="small", variant="outlined", margin=(4, 8))
        self._old_row = pn.Row(self.old, self.again, sizing_mode="stretch_width", visible=False, margin=0)
        self.wrong = Notice(severity="warning", margin=(4, 0), css_classes=["wb-wrong-reference"])
        self.chat = pn.pane.HTML("", stylesheets=[_CHAT], sizing_mode="stretch_width", visible=False, margin=(4, 10))
        self.diff = AnswerDiff.panel(visible=False, margin=(6, 0, 2, 0))
        self.figures = figures_row()
        self.figures.visible = False
        self.follow = TextField(
            label="Ask on: each model goes on from its own answers",
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
        self.again.on_click(lambda _: run(False))
        self.ask.on_click(lambda _: run(True))
        for field in (self.question, self.expected, self.tokens):
            field.param.watch(lambda _: changed(), "value")
        workspace.param.watch(self._show, ["run", "shown", "turns", "answer"])
        workspace.param.watch(self._enable, ["reading", "working", "dirty"])
        workspace.param.watch(lambda event: AnswerDiff.update(self.diff, dark=event.new), "dark")
        self.body = pmu.Paper(
            pn.Row(
                self.question, self.expected, self.tokens, self.run, self.follows, sizing_mode="stretch_width", margin=0
            ),
            self._old_row,
            self.wrong,
            self._question_line,
            self.chat,
            self.diff,
            self.figures,
            self._follow_row,
            variant="outlined",
            elevation=0,
            sizing_mode="stretch_width",
            margin=(0, 0, 12, 0),
            sx={"padding": "4px 16px 8px"},
        )

    def tell_old(self, said: str) -> None:
        """The answer in view was made with other settings, which `said` names; empty: with those on screen."""
        self._old_row.visible = bool(said)
        self.old.say(said)
        for part in (self.diff, self.figures, self._question_line, self.chat):
            part.styles = {"opacity": "0.45"} if said else {}

    def _enable(self, *events: Event) -> None:
        workspace = self._workspace
        self.run.label = "Read and run" if workspace.dirty else "Run"
        off = workspace.reading is None or workspace.working
        self.run.disabled = self.again.disabled = off
        self.ask.disabled = off or workspace.run is None or workspace.dirty

    def _show(self, *events: Event) -> None:
        workspace = self._workspace
        run, record, partial_answer = workspace.run, workspace.shown, workspace.answer
        parts = (self.diff, self.figures, self._follow_row, self._question_line)
        if partial_answer:  # the uncompressed answer is measured when this one is there
            AnswerDiff.update(
                self.diff,
                [],
                list(partial_answer),
                left_label=present.UNCOMPRESSED,
                right_label="Compressed",
                waiting="follows",
            )
            self.tell_old("")
            self.wrong.say("")
            self.diff.visible = True
            self.figures.visible = self._follow_row.visible = self._question_line.visible = False
        elif run is not None and record is not None and workspace.reading is not None:
            left, right = record.answers
            AnswerDiff.update(
                self.diff,
                list(left),
                list(right),
                waiting="",
                left_label=present.UNCOMPRESSED,
                right_label=run.recipe.label,
            )
            row = record.row
            verdict = present.verdict_figure(row["correct"], row["full_correct"], row["expected"])
            show(self.figures, [*([] if verdict is None else [verdict]), *present.run_figures(run)])
            self.wrong.say(_WRONG if row["full_correct"] is False else "")
            self._question_line.object = present.question_line(run) + (_AFTER if row["turn"] > 1 else "")
            for part in parts:
                part.visible = True
            self._enable()
        else:
            self.tell_old("")
            self.wrong.say("")
            for part in parts:
                part.visible = False
        turns = workspace.turns
        self.chat.visible = bool(turns) and run is not None and not partial_answer
        if self.chat.visible and run is not None:
            self.chat.object = chat_html(run.recipe.label, turns)


def chat_html(recipe: str, turns: Sequence[Turn]) -> str:
    """Two transcripts side by side: the questions, and what each model answered after its own earlier answers."""
    before = turns[0].before.row
    lines = [(before["question"], before["full_text"], before["text"])]
    lines += [(turn.question, turn.full.text, turn.record.row["text"]) for turn in turns]
    body = "".join(
        f'<tr><td colspan="2">{in_markup(question or "(going on from the text)")}</td></tr>'
        f"<tr><td>{in_markup(full.strip())}</td><td>{in_markup(text.strip())}</td></tr>"
        for question, full, text in lines
    )
    return f"<table><tr><th>{present.UNCOMPRESSED}</th><th>{in_markup(recipe)}</th></tr>{body}</table>"
