"""A message on the page."""

from __future__ import annotations

from html import escape

import panel_material_ui as pmu

from workbench_widgets.plain_text import in_markup

_TALL = "11em"  # of a message; what is longer scrolls


def _style() -> dict[str, object]:
    message = {"maxHeight": _TALL, "overflowY": "auto", "overflowWrap": "anywhere", "paddingBottom": 0}
    return {"& .MuiAlert-message": message}


class Notice(pmu.Alert):
    """An alert whose `object` is text; its base reads Markdown and HTML in it."""

    def __init__(self, text: str = "", **options: object) -> None:
        defaults = {"visible": bool(text), "sizing_mode": "stretch_width", "sx": _style()}
        super().__init__(**defaults | {"object": text} | options)

    def say(self, text: str, **options: object) -> None:
        """Show another text; none takes the notice away."""
        self.param.update(object=text, visible=bool(text), closed=False, **options)

    def _process_param_change(self, params: dict[str, object]) -> dict[str, object]:
        changed: dict[str, object] = super()._process_param_change(params)
        if "object" in params:
            # Escaped once more because the base's browser side unescapes what it puts into the page.
            changed["object"] = escape(in_markup(self.object or ""))
        return changed
