"""Pinned runs side by side: their figures, where their answers part, and how far they keep the same positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import panel as pn

from workbench.formatting import readable_bytes
from workbench_widgets.app.work.records import Record
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views import Heatmap

_STYLE = """
table { border-collapse: collapse; width: 100%; table-layout: fixed; font: 13px/1.45 system-ui, sans-serif; }
td, th { padding: 4px 10px 4px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); }
th:first-child { width: 130px; font-weight: 400; opacity: .75; }
mark { background: color-mix(in srgb, #d97706 32%, transparent); color: inherit; }
h3 { font: 600 14px/1.4 system-ui, sans-serif; margin: 6px 0; }
"""


def _bytes(value: Any) -> str:
    return "–" if value is None else readable_bytes(value)


def _number(form: str) -> Callable[[Any], str]:
    return lambda value: "–" if value is None else format(value, form)


_LINES: Mapping[str, tuple[str, Callable[[Any], str]]] = MappingProxyType(
    {  # column -> title, how it is written
        "prompt": ("Prompt", str),
        "question": ("Question", str),
        "kv_nbytes": ("KV cache", _bytes),
        "weight_nbytes": ("Weights", _bytes),
        "total_nbytes": ("Total", _bytes),
        "peak_nbytes": ("Peak", _bytes),
        "kl": ("KL divergence", _number(".4f")),
        "top1": ("Top-1 agreement", _number(".0%")),
        "perplexity": ("Perplexity", _number(".3f")),
        "tokens_per_s": ("Tokens a second", _number(".1f")),
        "correct": ("Right", lambda value: {True: "right", False: "wrong"}.get(value, "–")),
        "note": ("Note", lambda value: value or "–"),
    }
)


class PinnedRuns:
    """Shown where two runs or more are pinned."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.table = pn.pane.HTML("", stylesheets=[_STYLE], sizing_mode="stretch_width", margin=(4, 4))
        self.overlap = Heatmap.panel(brush=False, margin=(8, 0), visible=False)
        self.body = pn.Column(
            self.table, self.overlap, sizing_mode="stretch_width", visible=False, margin=(0, 0, 12, 0)
        )

    def refresh(self) -> None:
        """Bring what is shown up to date with the records."""
        pinned = [r for r in self._workspace.records if r.row["pinned"]]
        self.body.visible = len(pinned) > 1
        if len(pinned) < 2:
            return
        self.table.object = table_of(pinned)
        compared = [r for r in pinned if r.run is not None and self._is_here(r)]
        self.overlap.visible = len(compared) > 1
        if len(compared) > 1:
            names = [f"{r.number}: {r.label}" for r in compared]
            Heatmap.update(
                self.overlap,
                kept_in_common(compared),
                row_labels=names,
                column_labels=names,
                row_title="run",
                column_title="run",
                label="Share of the kept positions that two runs have in common",
                dark=self._workspace.dark,
            )

    def _is_here(self, record: Record) -> bool:
        """Whether the prompt of a run is the one that was read last: its plan has a recording to stand on."""
        reading = self._workspace.reading
        return reading is not None and record.run is not None and record.run.plan.trace.ids.equal(reading.trace.ids)


def table_of(records: Sequence[Record]) -> str:
    """The records as columns: figures, and answers with what parts from the first one's marked."""
    heads = "".join(f"<th>{in_markup(f'{r.number}: {r.label}')}</th>" for r in records)
    lines = []
    for name, (title, write) in _LINES.items():
        values = [r.row[name] for r in records]
        if any(value not in (None, "") for value in values):
            lines.append((title, [in_markup(write(value)) for value in values]))
    first = records[0].answers[1]
    answers = [_marked(first, r.answers[1]) for r in records]
    lines.append((f"Answer (marked: unlike run {records[0].number}'s)", answers))
    body = "".join(
        f"<tr><th>{in_markup(title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for title, cells in lines
    )
    return f"<h3>Pinned runs</h3><table><tr><th></th>{heads}</tr>{body}</table>"


def _marked(first: Sequence[str], other: Sequence[str]) -> str:
    """An answer whose tokens are marked from where it parts from the first."""
    pairs = zip(first, other, strict=False)
    same = next((i for i, (one, two) in enumerate(pairs) if one != two), min(len(first), len(other)))
    rest = "".join(other[same:])
    return in_markup("".join(other[:same])) + (f"<mark>{in_markup(rest)}</mark>" if rest else "")


def kept_in_common(records: Sequence[Record]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each pair of runs: positions, over layers and KV heads, that both keep, of those that either keeps."""
    kept = [r.run.plan.tiers.cpu().numpy() > 0 for r in records if r.run is not None]
    shared = [[float((a & b).sum() / max((a | b).sum(), 1)) for b in kept] for a in kept]
    return np.asarray(shared)
