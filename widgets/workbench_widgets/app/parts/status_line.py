"""What is going on, in the header: stage, progress, and a way to stop it. What went wrong stands above the page."""

from __future__ import annotations

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets.app.elements.notice import Notice
from workbench_widgets.app.elements.theme import in_header
from workbench_widgets.app.work.eta import Remaining, in_words
from workbench_widgets.app.work.task import Task
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_markup


class StatusLine:
    """What the main worker does, with a button that cancels it; `problem` stands elsewhere on the page."""

    def __init__(self, workspace: Workspace | Task) -> None:
        self._workspace = workspace
        self._remaining = Remaining()
        self._text = pn.pane.HTML(
            "",
            margin=(0, 12),
            align="center",
            stylesheets=[
                "div { font-size: 13px; white-space: nowrap; font-variant-numeric: tabular-nums; color: inherit; }"
            ],
        )
        self._bar = pmu.LinearProgress(
            value=0,
            width=160,
            sx=in_header(),
            color="primary",
            variant="determinate",
            align="center",
            margin=(0, 8),
            visible=False,
        )
        self.cancel = pmu.Button(
            label="Cancel",
            sx=in_header(),
            icon="stop",
            size="small",
            variant="outlined",
            margin=(0, 8),
            align="center",
            visible=False,
        )
        self.cancel.on_click(lambda _: workspace.cancel())
        self.body = pn.Row(
            pn.Spacer(sizing_mode="stretch_width"), self._text, self._bar, self.cancel, sizing_mode="stretch_width"
        )
        self.problem = Notice(severity="error", margin=(0, 0, 12, 0), css_classes=["wb-problem"])
        workspace.param.watch(self._show, ["stage", "working"])
        workspace.param.watch(self._complain, "problem")

    def _show(self, *events: Event) -> None:
        stage, share = self._workspace.stage
        left = in_words(self._remaining.seconds(stage, share))
        said = " · ".join(filter(None, (stage, "" if share is None else f"{share:.0%}", left)))
        self._text.object = f"<div>{in_markup(said)}</div>" if stage else ""
        self._bar.visible = bool(stage)
        known = share is not None
        self._bar.param.update(variant="determinate" if known else "indeterminate", value=round((share or 0) * 100))
        self.cancel.visible = bool(stage)

    def _complain(self, event: Event) -> None:
        calm = event.new.startswith("Cancelled")
        self.problem.say(event.new, severity="info" if calm else "error")
