"""A run in a notebook: the full and the compressed answer side by side, and the run's figures."""

from __future__ import annotations

from contextlib import suppress

import ipywidgets

from workbench.errors import NotRead
from workbench.runtime.run import Run
from workbench_widgets import present
from workbench_widgets.notebook.html_summaries import run_html, run_line
from workbench_widgets.notebook.pictured import Pictured
from workbench_widgets.views import AnswerDiff


class RunView(Pictured):
    """The full and the compressed answer side by side, and the run's figures; measures the run if need be."""

    def __init__(self, run: Run) -> None:
        self._label = run.recipe.label
        self._line = run_line(run)
        self.answers = AnswerDiff.jupyter(**run_answers(run))
        self.figures = ipywidgets.HTML(run_html(run))
        super().__init__([self.figures, self.answers])

    @property
    def heading(self) -> str:
        return self._line

    def __repr__(self) -> str:
        return f"RunView({self._label!r})"


def run_answers(run: Run) -> dict[str, object]:
    """Keywords for AnswerDiff; a run loaded from disk that was never measured shows its own answer only."""
    tokenizer = None
    with suppress(NotRead):  # a loaded run whose own reading was not saved
        tokenizer = run.plan.trace.prompt.tokenizer
    try:
        return present.answers(run, tokenizer)
    except NotRead:
        answer = present.pieces(tokenizer, run.tokens)
        return {"left": answer, "right": answer, "left_label": "As recorded", "right_label": run.recipe.label}
