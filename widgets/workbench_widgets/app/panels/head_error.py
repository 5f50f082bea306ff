"""How far each head's output is from the uncompressed one; a click selects the head."""

from __future__ import annotations

import panel as pn
import panel_material_ui as pmu

from workbench.progress import Progress
from workbench_widgets import present
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.views import Heatmap


class HeadErrorPanel(Panel):
    """The error of every head, of the plan or of the last run."""

    title = "Head error"
    needs = ("plan", "run", "selected")

    def __init__(self, workspace: Workspace) -> None:
        self.source = pmu.RadioButtonGroup(
            label="",
            options={"The plan, on the prompt's last tokens": "plan", "The last run, on its answer": "run"},
            value="plan",
            size="small",
            margin=(8, 4),
        )
        self.source.param.watch(lambda _: self.stale(), "value")
        self.map = Heatmap.panel(brush=False, margin=0, visible=False)
        self._hint = hint("The errors come when a prompt has been read and a recipe planned.")
        Heatmap.watch(self.map, "selected", self._choose)
        self.body = pn.Column(self.source, self._hint, self.map, sizing_mode="stretch_width", margin=(6, 0))
        self._quiet = Quiet()
        self._numbers: tuple[int, ...] = ()  # what the layers shown are called
        super().__init__(workspace)

    def _choose(self, cell: tuple[int, int] | None) -> None:
        if not self._quiet and cell is not None:
            self.workspace.selected = (self._numbers[int(cell[0])], int(cell[1]))

    def refresh(self) -> None:
        workspace = self.workspace
        plan, run, of_run = workspace.plan, workspace.run, self.source.value == "run"
        if (run if of_run else plan) is None:
            self.map.visible, self._hint.visible = False, True
            self._hint.object = (
                "<p>No answer has been generated yet: ask something with <b>Run</b>.</p>"
                if of_run
                else "<p>The errors come when a prompt has been read and a recipe planned.</p>"
            )
            return

        self._hint.object = "<p>The errors are being computed …</p>"  # until they are there
        reading = workspace.reading
        numbers: tuple[int, ...] = ()  # an answer's errors are by the layers of the model as it is
        if of_run and reading is not None:
            numbers = reading.trace.numbers
        elif plan is not None:
            numbers = plan.trace.numbers

        def work(_progress: Progress) -> dict[str, object]:
            if of_run:
                assert run is not None
                return present.head_error(run.verdict.output_error, of="on the answer", numbers=numbers)
            assert plan is not None
            return present.head_error(plan.error, of="for the prompt's last 64 tokens", numbers=numbers)

        def show(keywords: dict[str, object]) -> None:
            self._numbers, chosen = numbers, workspace.selected
            there = chosen is not None and chosen[0] in numbers
            with self._quiet.setting():
                cell = (numbers.index(chosen[0]), chosen[1]) if chosen is not None and there else None
                Heatmap.update(self.map, **keywords, selected=cell, dark=workspace.dark)
            self.map.visible, self._hint.visible = True, False

        workspace.look(work, self.in_view(show))
