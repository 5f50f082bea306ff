"""Live bytes over time, by category."""

from __future__ import annotations

import io
import json

import panel as pn
import panel_material_ui as pmu

from workbench.measure.memory import Timeline
from workbench_widgets import figures, present
from workbench_widgets.app.elements.download import Download
from workbench_widgets.app.elements.table import csv_of
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
        self.parts = pmu.RadioButtonGroup(
            label="", options={"By category": "category", "Cache by layer": "layer"}, value="category", **slim
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
        small: dict[str, object] = {"size": "small", "width": 130, "margin": (4, 8), "disabled": True}
        self.csv = Download(callback=self._csv, filename="memory.csv", label="CSV", **small)
        self.perfetto = Download(callback=self._trace, filename="memory_trace.json", label="Perfetto", **small)
        for widget in (self.scope, self.parts, self.weights, self.trace):
            widget.param.watch(lambda _: self.stale(), "value")
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=380, visible=False
        )
        self._hint = hint("The timeline begins when a prompt is read.")
        self.body = pn.Column(
            pn.FlexBox(
                self.scope,
                self.parts,
                self.weights,
                self.trace,
                self.csv,
                self.perfetto,
                align_items="center",
                sizing_mode="stretch_width",
            ),
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
        timeline, run = self._timeline, workspace.run
        layers = self.parts.value == "layer" and any(sample.kv_layers for sample in timeline.samples)
        self.weights.disabled = self.trace.disabled = layers
        self.csv.disabled = self.perfetto.disabled = False
        if layers:
            frame = present.memory_by_layer(timeline)
        else:
            frame = present.memory(timeline, trace=self.trace.value, weights=self.weights.value)
        one = run is not None and self.scope.value == "run"
        predicted = {"planned": run.plan.nbytes} if one and layers and run is not None else {}
        read = "Live memory while reading" if run is None else "Live memory, reading and answering"
        self._hint.visible, self.figure.visible = False, True
        self.figure.object = figures.memory_timeline(
            frame,
            dark=workspace.dark,
            title=f"KV cache by layer{', with what was planned' if predicted else ''}" if layers else read,
            marks=present.run_marks(timeline),
            predicted=predicted,
        )

    @property
    def _timeline(self) -> Timeline:
        """That of the last run, or of all of them."""
        workspace = self.workspace
        assert workspace.reading is not None
        run = workspace.run
        return run.memory if run is not None and self.scope.value == "run" else workspace.reading.session.memory

    def _csv(self) -> io.StringIO:
        return csv_of(self._timeline.to_frame())

    def _trace(self) -> io.StringIO:
        return io.StringIO(json.dumps(self._timeline.to_trace_events()))
