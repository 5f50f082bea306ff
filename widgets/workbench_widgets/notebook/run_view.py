"""A run in a notebook: the full and the compressed answer side by side, and the run's figures."""

from __future__ import annotations

import ipywidgets

from workbench.runtime.run import Run
from workbench_widgets import present
from workbench_widgets.html_summaries import run_html, run_line
from workbench_widgets.notebook.pictured import Pictured
from workbench_widgets.views import AnswerDiff


class RunView(Pictured):
    """The full and the compressed answer side by side, and the run's figures; measures the run if need be."""

    def __init__(self, run: Run) -> None:
        self._label = run.recipe.label
        self._line = run_line(run)
        self.answers = AnswerDiff.jupyter(**present.run_answers(run))
        self.figures = ipywidgets.HTML(run_html(run))
        super().__init__([self.figures, self.answers])

    @property
    def heading(self) -> str:
        return self._line

    def __repr__(self) -> str:
        return f"RunView({self._label!r})"
