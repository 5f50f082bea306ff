"""Keeping and sharing a page: a file to save and open, a notebook, a report, a link."""

from __future__ import annotations

import io
from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets.app.elements.download import Download
from workbench_widgets.app.elements.theme import NOTE_STYLE, in_header

_ABOUT = (
    "The page is kept on this server while you work: a reload brings it back, and so does its link, which names the "
    "kept page where a text or the runs do not fit into an address. A file holds the controls, the texts and the "
    "runs; opening it shows all of them, and reads nothing until you say so."
)


class ShareDialog:
    """`saved()` and `notebook()` give the text of a file, `opened(name, text)` takes one; `make_report()` begins a
    report, which `show_report` hands over.
    """

    def __init__(
        self,
        saved: Callable[[], str],
        notebook: Callable[[], str],
        opened: Callable[[str, bytes], None],
        make_report: Callable[[], None],
    ) -> None:
        wide: dict[str, object] = {"sizing_mode": "stretch_width", "margin": (6, 4), "size": "small"}
        self.button = pmu.Button(
            label="Share", icon="share", size="small", variant="outlined", sx=in_header(), margin=(0, 0, 0, 8),
            align="center",
        )  # fmt: skip
        self.link = pmu.Button(label="Copy link", icon="link", variant="outlined", **wide)
        self._copying = self.link.js_on_click(code="navigator.clipboard.writeText(window.location.href)")
        self.save = Download(
            callback=lambda: io.StringIO(saved()), filename="workbench_page.json", label="Save file", **wide
        )
        self.open = pmu.FileInput(label="Open file", accept=".json", variant="outlined", **wide)
        self.open.param.watch(self._opened, "value")
        self._take = opened
        self.notebook = Download(
            callback=lambda: io.StringIO(notebook()), filename="workbench_page.ipynb", label="Notebook", **wide
        )
        self.make = pmu.Button(label="Make report", icon="summarize", variant="outlined", **wide)
        self.make.on_click(lambda _: make_report())
        self._report = ""
        self.report = Download(
            callback=lambda: io.StringIO(self._report),
            filename="workbench_report.html",
            label="Report",
            disabled=True,
            **wide,
        )
        about = pn.pane.HTML(f"<div>{_ABOUT}</div>", stylesheets=[NOTE_STYLE], sizing_mode="stretch_width")
        self.dialog = pmu.Dialog(
            about,
            pn.Row(self.link, self.save, self.open, sizing_mode="stretch_width"),
            pn.Row(self.notebook, self.make, self.report, sizing_mode="stretch_width"),
            title="Keep and share",
            show_close_button=True,
            close_on_click=True,
            width_option="md",
        )
        self.button.on_click(self._show)

    def show_report(self, html: str) -> None:
        """A report is there to be downloaded; empty: one is being made."""
        self._report = html
        size = f" ({len(html.encode()) / 2**20:.1f} MiB)" if html else ""
        self.report.param.update(disabled=not html, label=f"Report{size}")
        self.make.param.update(disabled=not html, label="Make report" if html else "Making it …")

    def allow_report(self) -> None:
        """No report came of it; another can be asked for."""
        self.make.param.update(disabled=False, label="Make report")

    def close(self) -> None:
        """The tab is gone: Panel's register of what runs in browsers keeps it no longer."""
        self._copying.unwatch()

    def _show(self, event: Event) -> None:
        self.dialog.open = True

    def _opened(self, event: Event) -> None:
        if event.new:
            self.dialog.open = False
            self._take(self.open.filename or "the file", bytes(event.new))
