"""A run that was opened: its answer beside the uncompressed one, figures, recipe, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench_widgets import present
from workbench_widgets.app.elements.figures_row import figures_row, show
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.elements.theme import NOTE_STYLE
from workbench_widgets.app.parts.pinned_runs import PinnedRuns
from workbench_widgets.app.work.records import Record
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views import AnswerDiff

_HEAD = "h3 { margin: 4px 0; font: 600 14px/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }"


class RunDetails:
    """`open(record)` shows one; below it stand the pinned ones side by side. `restore(record)` has its page again."""

    def __init__(self, workspace: Workspace, restore: Callable[[Record], None]) -> None:
        self._workspace = workspace
        self._number: int | None = None
        button: dict[str, object] = {"size": "small", "variant": "outlined", "margin": (6, 8, 6, 0)}
        self.head = pn.pane.HTML("", stylesheets=[_HEAD], sizing_mode="stretch_width", margin=(6, 4))
        self.diff = AnswerDiff.panel(margin=(4, 0))
        self.numbers = figures_row()
        self.recipe = pn.pane.HTML("", stylesheets=[NOTE_STYLE], sizing_mode="stretch_width", margin=(2, 6))
        self.pin = pmu.Button(label="Pin", icon="push_pin", **button)
        self.restore = pmu.Button(label="Restore", icon="restore", **button)
        self.delete = pmu.Button(label="Delete", icon="delete", **button)
        self.close = pmu.Button(label="Close", icon="close", **button)
        self.name = TextField(label="Name", size="small", width=220, margin=(6, 8, 6, 0))
        self.note = TextField(label="Note", size="small", sizing_mode="stretch_width", margin=(6, 8, 6, 0))
        self.pin.on_click(lambda _: self._change(pinned=not self._of_number().row["pinned"]))
        self.restore.on_click(lambda _: restore(self._of_number()))
        self.delete.on_click(self._delete)
        self.close.on_click(lambda _: self._show(None))
        self.name.param.watch(lambda event: self._change(name=event.new.strip() or None), "value")
        self.note.param.watch(lambda event: self._change(note=event.new.strip() or None), "value")
        self.pinned = PinnedRuns(workspace)
        self.opened = pmu.Paper(
            self.head,
            pn.FlexBox(self.pin, self.restore, self.delete, self.close, align_items="center"),
            self.diff,
            self.numbers,
            self.recipe,
            pn.Row(self.name, self.note, sizing_mode="stretch_width", margin=0),
            variant="outlined",
            elevation=0,
            sizing_mode="stretch_width",
            margin=(0, 0, 12, 0),
            sx={"padding": "4px 16px 8px"},
            visible=False,
            css_classes=["wb-opened-run"],
        )
        self.body = pn.Column(self.opened, self.pinned.body, sizing_mode="stretch_width", margin=0)

    def open(self, record: Record) -> None:
        """Show a run."""
        self._show(record)

    def refresh(self) -> None:
        """Bring what is shown up to date with the records."""
        if self._number is not None:
            self._show(next((r for r in self._workspace.records if r.number == self._number), None))
        self.pinned.refresh()

    def _of_number(self) -> Record:
        return next(r for r in self._workspace.records if r.number == self._number)

    def _change(self, **values: object) -> None:
        record = next((r for r in self._workspace.records if r.number == self._number), None)
        if record is None or all(record.row[name] == value for name, value in values.items()):
            return
        self._workspace.set_records([r.changed(**values) if r is record else r for r in self._workspace.records])

    def _delete(self, event: Event) -> None:
        number, self._number = self._number, None
        self.opened.visible = False
        self._workspace.set_records([r for r in self._workspace.records if r.number != number])

    def _show(self, record: Record | None) -> None:
        self._number = None if record is None else record.number
        self.opened.visible = record is not None
        if record is None:
            return
        row = record.row
        asked = f"asked: {row['question']}" if row["question"] else "going on from the text"
        self.head.object = f"<h3>Run {record.number}: {in_markup(record.label)} — {in_markup(asked)}</h3>"
        failed = row["status"] != "done"
        self.diff.visible = self.numbers.visible = not failed
        if not failed:
            left, right = record.answers
            AnswerDiff.update(
                self.diff,
                list(left),
                list(right),
                left_label=present.UNCOMPRESSED,
                right_label=row["recipe"],
                dark=self._workspace.dark,
            )
            show(self.numbers, present.row_figures(row))
        said = [row["error"]] if failed else []
        self.recipe.object = "".join(
            f"<div>{in_markup(line)}</div>"
            for line in [*said, f"{row['prompt']}, read by {row['model']}", row["recipe"]]
        )
        self.pin.label = "Unpin" if row["pinned"] else "Pin"
        self.name.value, self.note.value = row["name"] or "", row["note"] or ""
