"""What a link asks for beyond the page that everybody gets: said first, and done when a person says so.

Any page of the web can make a browser open a link, so an address alone loads no other model and computes nothing long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import panel as pn
import panel_material_ui as pmu

from workbench.registry import registered
from workbench_widgets.app.state.page_state import TEXT_LIMIT, PageState
from workbench_widgets.plain_text import in_markup

_SLOW_FAMILIES = (
    "weights",
    "attention",
)  # families whose plans take a model's whole weights, or read the prompt once more
_LONGEST_NAME = 80  # characters of a name


def awaits_consent(state: PageState, default: str) -> list[str]:
    """What waits for a person, in words: another model than the default, methods that compute long, a long text."""
    requests = [state.model[:_LONGEST_NAME]] if state.model not in ("", default) else []
    for family in _SLOW_FAMILIES:
        requests += [cls.title or cls.key for cls in registered(family) if cls.key == getattr(state, family)]
    if len(state.text) > TEXT_LIMIT:
        requests.append(f"a text of {len(state.text):,} characters")
    return requests


class LinkConfirmation:
    """The notice, and the button by which a person agrees: `load()`."""

    def __init__(self, requests: Sequence[str], load: Callable[[], None]) -> None:
        sentence = f"This link asks for {' and '.join(requests)}. Nothing is loaded or computed until you say so."
        self.button = pmu.Button(label="Load", icon="download", variant="outlined", width=110, margin=(8, 8))
        self.button.on_click(lambda _: load())
        text = pn.pane.HTML(
            f"<div>{in_markup(sentence)}</div>",
            align="center",
            sizing_mode="stretch_width",
            margin=(8, 16),
            stylesheets=["div { font-size: 13px; overflow-wrap: anywhere; }"],
        )
        self.body = pmu.Paper(
            pn.Row(text, self.button, sizing_mode="stretch_width", margin=0),
            variant="outlined",
            elevation=0,
            sizing_mode="stretch_width",
            margin=(0, 0, 12, 0),
            visible=bool(requests),
        )

    def close(self) -> None:
        """A person has acted: there is nothing to ask any more."""
        self.body.visible = False
