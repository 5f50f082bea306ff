"""What the pages beside the session have in common: the header with the way between pages, the status, the theme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import panel as pn
import panel_material_ui as pmu
from panel.io.document import hold
from panel.io.state import set_curdoc
from panel.util.parameters import edit_readonly
from panel_material_ui.template.base import Page as MaterialPage

from workbench_widgets.app.elements.notice import Notice
from workbench_widgets.app.elements.theme import HEADING_STYLE, theme_config
from workbench_widgets.app.parts.status_line import StatusLine
from workbench_widgets.app.work.task import Task

PAGES = {"session": "Session", "choose": "Choose", "results": "Results", "cost": "Cost"}
_STYLE = """
nav { display: flex; gap: 4px; font: 600 13px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
a { color: inherit; text-decoration: none; padding: 5px 10px; border-radius: 6px; opacity: .78; }
a:hover, a:focus-visible { opacity: 1; background: color-mix(in srgb, currentColor 10%, transparent); }
a[aria-current] { opacity: 1; background: color-mix(in srgb, currentColor 14%, transparent); }
"""


def navigation(current: str) -> pn.pane.HTML:
    """Links to all pages; `current` is where one is."""
    links = "".join(
        f'<a href="?page={name}"{" aria-current=page" if name == current else ""}>{title}</a>'
        for name, title in PAGES.items()
    )
    return pn.pane.HTML(f'<nav aria-label="Pages">{links}</nav>', stylesheets=[_STYLE], margin=(0, 8), align="center")


class Shell:
    """A page of its own: `task` does its work, `problem` says what went wrong, `redraw` follows the theme."""

    def __init__(self, name: str, redraw: Callable[[], None]) -> None:
        self._doc = pn.state.curdoc
        self._name = name
        self.task = Task(self._post)
        self.status = StatusLine(self.task)
        self.note = Notice("", severity="info", closeable=True, margin=(0, 0, 12, 0))
        self.task.param.watch(lambda _: redraw(), "dark")
        if pn.state.location is not None:
            pn.state.on_session_destroyed(lambda _: self.task.close())

    def view(self, *parts: Any, side: list[Any] | None = None) -> MaterialPage:
        """The page with these parts; side: what stands in its side bar."""
        view = MaterialPage(
            title="Inference workbench",
            header=[navigation(self._name), self.status.body],
            sidebar=[pn.Column(*side, sizing_mode="stretch_width", margin=(6, 12))] if side else [],
            main=[pn.Column(self.note, self.status.problem, *parts, sizing_mode="stretch_width", margin=(14, 16))],
            sidebar_width=350,
            busy_indicator=None,
            theme_toggle=True,
            theme_config=theme_config(),
            dark_theme=pn.config.theme == "dark",
        )
        with edit_readonly(view):
            view.busy = self.task.param.working
        self.task.dark = view.dark_theme
        view.param.watch(lambda event: setattr(self.task, "dark", event.new), "dark_theme")
        return view

    def ready(self, begin: Callable[[], None]) -> None:
        """Call `begin` once the page is drawn: what is changed while it is being made comes back as it was."""
        if self._doc is None:
            begin()
        else:
            pn.state.onload(begin)

    def _post(self, show: Callable[[], None]) -> None:
        """Run `show` in the page's own thread, as one message to the browser."""
        doc = self._doc
        if doc is None:
            show()
            return

        def apply() -> None:
            with set_curdoc(doc), hold(doc):
                show()

        doc.add_next_tick_callback(apply)


def paper(*parts: Any, **options: Any) -> pmu.Paper:
    """A framed part of a page."""
    return pmu.Paper(
        *parts,
        variant="outlined",
        elevation=0,
        sizing_mode="stretch_width",
        margin=(0, 0, 14, 0),
        sx={"padding": "10px 16px 12px"},
        **options,
    )


def heading(text: str) -> pn.pane.HTML:
    """A heading of a part."""
    return pn.pane.HTML(f"<h2>{text}</h2>", stylesheets=[HEADING_STYLE], margin=(6, 4, 4, 4))
