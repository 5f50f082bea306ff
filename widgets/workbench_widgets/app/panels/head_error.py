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
        super().__init__(workspace)

    def _choose(self, cell: tuple[int, int] | None) -> None:
        if not self._quiet and cell is not None:
            self.workspace.selected = (int(cell[0]), int(cell[1]))

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

        def work(_progress: Progress) -> dict[str, object]:
            if of_run:
                assert run is not None
                return present.head_error(run.verdict.output_error, of="on the answer")
            assert plan is not None
            return present.head_error(plan.error, of="for the prompt's last 64 tokens")

        def show(keywords: dict[str, object]) -> None:
            with self._quiet.setting():
                Heatmap.update(self.map, **keywords, selected=workspace.selected, dark=workspace.dark)
            self.map.visible, self._hint.visible = True, False

        workspace.look(work, self.in_view(show))
