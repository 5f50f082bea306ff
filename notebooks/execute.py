"""Run the notebooks and write them back with what they showed: `python notebooks/execute.py [NOTEBOOK ...]`.

What is saved is as small and as steady as possible, so that a new run gives a small diff:

- outputs of cells tagged `live` are left out (a control panel does nothing without its kernel);
- live views give way to the pictures beside them, widget states that no output shows any more are dropped, and the
  rest get numbers in place of random names;
- no times are recorded.
"""

from __future__ import annotations

import re
import sys
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import plotly.graph_objects as go
from nbclient import NotebookClient

from workbench_widgets.notebook import PLOTLY
from workbench_widgets.plotly_pictures import figure_png
from workbench_widgets.saving import still

HERE = Path(__file__).parent
CELL_TIMEOUT_S = 600
_MODEL = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


def execute(path: Path) -> None:
    """Run one notebook in a fresh kernel and save it in place."""
    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": CELL_TIMEOUT_S, "record_timing": False, "resources": {"metadata": {"path": str(HERE)}}}
    NotebookClient(notebook, **options).execute()
    for cell in notebook.cells:
        if "live" in cell.metadata.get("tags", ()):
            cell.outputs = []
    still(notebook)
    draw_figures(notebook)
    text = renumbered(nbformat.writes(notebook))
    path.write_text(text + "\n", encoding="utf-8")
    print(f"{path.name}: {len(text) / 1000:.0f} KB")


def draw_figures(notebook: Any) -> None:
    """Put a still picture beside each Plotly figure, for where no script runs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if PLOTLY in data:
                shown = {name: plain(data[PLOTLY][name]) for name in ("data", "layout")}
                data["image/png"] = b64encode(figure_png(go.Figure(shown, skip_invalid=True))).decode()


def plain(value: Any) -> Any:
    """A figure's JSON with lists in place of the arrays that Plotly packs."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(b64decode(value["bdata"]), dtype=value["dtype"])
        return array.reshape([int(size) for size in str(value.get("shape", array.size)).split(",")]).tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def renumbered(text: str) -> str:
    """The same with models named 1, 2, 3 in the order in which they appear."""
    names: dict[str, str] = {}
    return _MODEL.sub(lambda found: names.setdefault(found[0], f"{len(names) + 1:032x}"), text)


if __name__ == "__main__":
    for given in sys.argv[1:] or sorted(HERE.glob("*.ipynb")):
        execute(Path(given))
