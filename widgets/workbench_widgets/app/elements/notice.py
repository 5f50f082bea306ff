"""A message on the page."""

from __future__ import annotations

from html import escape
from typing import Any

import panel_material_ui as pmu

from workbench_widgets.plain_text import in_markup

_TALL = "11em"  # of a message; what is longer scrolls
_STYLE = {
    "& .MuiAlert-message": {"maxHeight": _TALL, "overflowY": "auto", "overflowWrap": "anywhere", "paddingBottom": 0}
}


class Notice(pmu.Alert):
    """An alert whose `object` is text; its base reads Markdown and HTML in it."""

    def __init__(self, object: str = "", **given: Any) -> None:
        shown = {"visible": bool(object), "sizing_mode": "stretch_width", "sx": _STYLE}
        super().__init__(object=object, **shown | given)

    def say(self, text: str, **given: Any) -> None:
        """Show another text; none takes the notice away."""
        self.param.update(object=text, visible=bool(text), closed=False, **given)

    def _process_param_change(self, params: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = super()._process_param_change(params)
        if "object" in params:
            # Escaped once more because the base's browser side unescapes what it puts into the page.
            changed["object"] = escape(in_markup(self.object or ""))
        return changed
