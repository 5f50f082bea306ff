"""The prompt shaded by what survives, and the raster of kept positions."""

from __future__ import annotations

import panel as pn
import panel_material_ui as pmu

from workbench_widgets import present
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.panels.panel import Panel
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.views import KeptRaster, TokenText


class TokensPanel(Panel):
    """The prompt and the raster; a click on a row shows that head alone."""

    title = "Tokens"
    needs = ("reading", "plan", "selected", "focused")

    def __init__(self, workspace: Workspace) -> None:
        self._quiet = Quiet()
        self.text = TokenText.panel(rows=12, margin=0)
        self.raster = KeptRaster.panel(margin=0)
        self.all_heads = pmu.Button(
            label="Show all heads",
            icon="arrow_back",
            size="small",
            variant="outlined",
            visible=False,
            margin=(0, 0, 6, 2),
        )
        self.all_heads.on_click(lambda _: self._choose(None))
        KeptRaster.watch(self.raster, "selected", self._choose)
        TokenText.watch(self.text, "selected", lambda position: setattr(self.raster, "marked", position))
        grow = {"flex": "1 1 600px", "min-width": "0"}
        self.body = pn.FlexBox(
            pn.Column(self.all_heads, self.text, sizing_mode="stretch_width", styles=grow, margin=0),
            pn.Column(self.raster, sizing_mode="stretch_width", styles=grow, margin=0),
            sizing_mode="stretch_width",
            gap="12px 28px",
            margin=(10, 0),
        )
        super().__init__(workspace)

    def _choose(self, cell: tuple[int, int] | None) -> None:
        """A row of the raster: that layer and KV head alone; None: all of them."""
        workspace = self.workspace
        if self._quiet or workspace.reading is None:
            return
        if cell is None:
            workspace.focused = False
            return
        layer, kv_head = cell
        trace = workspace.reading.trace
        groups = trace.layers[trace.place(layer)].groups
        if workspace.kv_head != (layer, kv_head):  # else the query head that was chosen in another tab stays
            workspace.param.update(selected=(layer, kv_head * groups), focused=True)
        else:
            workspace.focused = True

    def refresh(self) -> None:
        workspace = self.workspace
        head = workspace.kv_head if workspace.focused else None
        self.all_heads.visible = head is not None
        with self._quiet.setting():
            dark = {"dark": workspace.dark}
            if workspace.reading is None:
                TokenText.update(self.text, **dark)
                KeptRaster.update(self.raster, **dark)
                return
            tokens = workspace.reading.tokens
            if workspace.plan is None:
                TokenText.update(self.text, tokens, label="Prompt", selected=None, **dark)
                return
            TokenText.update(self.text, **present.token_text(workspace.plan, tokens, head), **dark)
            KeptRaster.update(self.raster, **present.kept_raster(workspace.plan, tokens), selected=head, **dark)
