"""How far a look at something is, beside what it is for, and a way to stop it."""

from __future__ import annotations

from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets.app.elements.theme import NOTE_STYLE
from workbench_widgets.app.work.eta import Remaining, in_words
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_markup


class StageRow:
    """Follows a stage of the workspace: `parameter` names it, `IDLE` while nothing goes on. `stop()` ends it."""

    def __init__(self, workspace: Workspace, parameter: str, stop: Callable[[], None]) -> None:
        self._workspace, self._parameter = workspace, parameter
        self._remaining = Remaining()
        self.line = pn.pane.HTML("", stylesheets=[NOTE_STYLE], margin=(8, 8), align="center")
        self.bar = pmu.LinearProgress(
            value=0, variant="determinate", sizing_mode="stretch_width", align="center", margin=(8, 8)
        )
        self.cancel = pmu.Button(
            label="Cancel", icon="stop", size="small", variant="outlined", margin=(4, 8), align="center"
        )
        self.cancel.on_click(lambda _: stop())
        self.body = pn.Row(self.line, self.bar, self.cancel, sizing_mode="stretch_width", margin=0, visible=False)
        workspace.param.watch(self._show, parameter)

    def _show(self, *events: Event) -> None:
        stage, share = getattr(self._workspace, self._parameter)
        left = self._remaining.seconds(stage, share)
        if stage:
            known = share is not None
            said = " · ".join(filter(None, (f"{stage} …", f"{share:.0%}" if known else "", in_words(left))))
            self.line.object = f"<div>{in_markup(said)}</div>"
            self.bar.param.update(variant="determinate" if known else "indeterminate", value=round(100 * (share or 0)))
        self.body.visible = bool(stage)
