"""Where numbers are unusually large: by layer, and by layer and channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import panel as pn
import panel_material_ui as pmu

from workbench.progress import Progress
from workbench_widgets import figures, present
from workbench_widgets.app.panels.panel import UNFINISHED, Panel, hint
from workbench_widgets.app.parts.stage_row import StageRow
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.views import Heatmap

if TYPE_CHECKING:
    import plotly.graph_objects as go


class OutliersPanel(Panel):
    """The profile by layer, and the map by layer and channel, of keys, values, activations or weights."""

    title = "Outliers"
    needs = ("reading",)

    def __init__(self, workspace: Workspace) -> None:
        self.kind = pmu.RadioButtonGroup(
            label="",
            options={"Keys": "keys", "Values": "values", "Activations": "activations", "Weights": "weights"},
            value="keys",
            size="small",
            margin=(8, 4),
        )
        self.kind.param.watch(lambda _: self.stale(), "value")
        self.profile = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=340, visible=False
        )
        self.map = Heatmap.panel(brush=True, margin=(12, 0, 0, 0), visible=False)
        self._hint = hint("The statistics come when a prompt has been read.")
        self.doing = StageRow(workspace, "looking_stage", workspace.looking.cancel)
        self.body = pn.Column(
            self.kind, self.doing.body, self._hint, self.profile, self.map, sizing_mode="stretch_width", margin=(6, 0)
        )
        self._shown_kind = ""  # the kind that is shown
        super().__init__(workspace)

    def refresh(self) -> None:
        workspace, kind = self.workspace, self.kind.value
        if workspace.reading is None:
            return
        session, dark = workspace.reading.session, workspace.dark
        self._hint.object = "<p>The statistics are being computed …</p>"  # until they are there
        if kind != self._shown_kind:  # those of another kind would be mistaken for them
            self._hint.visible, self.profile.visible, self.map.visible = True, False, False

        def work(progress: Progress) -> tuple[go.Figure, dict[str, object] | None]:
            frame = session.outliers(kind, progress=progress)
            title = f"Outliers of the {kind} by layer"
            profile = figures.outlier_profile(present.outliers(frame), dark=dark, title=title)
            return profile, present.outlier_map(frame, kind=kind)

        def show(outcome: tuple[go.Figure, dict[str, object] | None]) -> None:
            profile, grid = outcome
            self._shown_kind = kind
            self._hint.visible, self.profile.visible, self.map.visible = False, True, grid is not None
            self.profile.object = profile
            if grid is not None:
                Heatmap.update(self.map, **grid, dark=dark, window=None, selected=None)

        def given_up() -> None:
            self._stale = True
            self._hint.object = f"<p>{UNFINISHED}</p>"

        workspace.look(work, self.in_view(show), given_up)
