"""A view made of several: shown live where there is a kernel, and as one still picture where there is none."""

from __future__ import annotations

from typing import Any

import ipywidgets

from workbench_widgets.views.jupyter import with_picture
from workbench_widgets.views.pictures import Drawing, png


class Pictured(ipywidgets.VBox):
    """A box whose MIME bundle has a picture of the views in it beside the live ones."""

    @property
    def heading(self) -> str:
        """One line above the picture."""
        return ""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return with_picture(self, png(drawings(self), self.heading))


def drawings(widget: ipywidgets.Widget) -> list[Drawing]:
    """The parts of a picture of all views inside a widget, from top to bottom."""
    own = getattr(widget, "drawings", None)
    if own is not None:
        return list(own())
    return [part for child in getattr(widget, "children", ()) for part in drawings(child)]
