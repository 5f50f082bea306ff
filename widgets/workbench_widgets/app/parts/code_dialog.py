"""The state of the page as Python, to copy or to download."""

from __future__ import annotations

import io
from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets.app.elements.download import Download
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.elements.theme import in_header
from workbench_widgets.plain_text import in_markup

_STYLE = """
pre { margin: 0; padding: 12px 14px; border-radius: 6px; white-space: pre-wrap;
  font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  background: color-mix(in srgb, currentColor 8%, transparent); }
"""


class CodeDialog:
    """`code()` gives the Python when the dialog opens."""

    def __init__(self, code: Callable[[], str]) -> None:
        self._code = code
        self.button = pmu.Button(
            label="Python",
            icon="code",
            size="small",
            variant="outlined",
            sx=in_header(),
            margin=(0, 8),
            align="center",
            description="This page as five lines of Python",
        )
        self.shown = pn.pane.HTML("", stylesheets=[_STYLE], sizing_mode="stretch_width", min_width=480)
        copy = pmu.Button(label="Copy", icon="content_copy", variant="outlined", size="small", width=110)
        self._plain = TextField(value="", visible=False)
        code_of_copy = "navigator.clipboard.writeText(plain.data.value)"
        self._copying = copy.js_on_click(args={"plain": self._plain}, code=code_of_copy)
        save = Download(
            callback=self._file,
            filename="workbench_run.py",
            label="Download",
            size="small",
            width=130,
        )
        self.dialog = pmu.Dialog(
            self.shown,
            pn.Row(copy, save, self._plain),
            title="This page as Python",
            show_close_button=True,
            close_on_click=True,
            width_option="md",
        )
        self.button.on_click(self._open)

    def close(self) -> None:
        """The tab is gone: Panel's register of what runs in browsers keeps it no longer."""
        self._copying.unwatch()

    def _open(self, event: Event) -> None:
        code = self._code()
        self._plain.value = code
        self.shown.object = f"<pre>{in_markup(code)}</pre>"
        self.dialog.open = True

    def _file(self) -> io.StringIO:
        return io.StringIO(self._code())
