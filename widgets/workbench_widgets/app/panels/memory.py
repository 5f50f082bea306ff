"""Live bytes over time, by category."""

from __future__ import annotations

import panel as pn
import panel_material_ui as pmu

from workbench_widgets import figures, present
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.work.workspace import Workspace


class MemoryPanel(Panel):
    """The timeline of the last run, or of all of them."""

    title = "Memory"
    needs = ("reading", "run", "rows")

    def __init__(self, workspace: Workspace) -> None:
        slim = {"margin": (8, 24, 4, 4), "size": "small"}
        self.scope = pmu.RadioButtonGroup(
            label="", options={"The last run": "run", "All runs on this prompt": "all"}, value="run", **slim
        )
        self.weights = pmu.Checkbox(
            label="Weights", value=False, description="They are far larger than the cache.", **slim
        )
        self.trace = pmu.Checkbox(
            label="Recording",
            value=False,
            description="What the workbench remembers of the prompt to try budgets; no deployment holds it.",
            **slim,
        )
        for widget in (self.scope, self.weights, self.trace):
            widget.param.watch(lambda _: self.stale(), "value")
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=380, visible=False
        )
        self._hint = hint("The timeline begins when a prompt is read.")
        self.body = pn.Column(
            pn.FlexBox(self.scope, self.weights, self.trace, align_items="center", sizing_mode="stretch_width"),
            self._hint,
            self.figure,
            sizing_mode="stretch_width",
            margin=(6, 0),
        )
        super().__init__(workspace)

    def refresh(self) -> None:
        workspace = self.workspace
        if workspace.reading is None:
            return
        run = workspace.run
        session = workspace.reading.session
        timeline = run.memory if run is not None and self.scope.value == "run" else session.memory
        frame = present.memory(timeline, trace=self.trace.value, weights=self.weights.value)
        title = (
            "Live memory while reading"
            if run is None and not len(session.runs)
            else "Live memory, reading and answering"
        )
        self._hint.visible, self.figure.visible = False, True
        self.figure.object = figures.memory_timeline(frame, dark=workspace.dark, title=title)
