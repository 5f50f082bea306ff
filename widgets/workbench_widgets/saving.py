"""Notebooks as they are saved: a view that lives in a kernel gives way to the still picture beside it.

Where a kernel is gone, a front-end shows an error in a view's place even where a picture of it is at hand, and each
saved run leaves the states of earlier views behind. So what is written to disk keeps pictures and data, and loses the
views that have one and every state that no output shows any more. Views without a picture stay with their states.

As an extension of Jupyter's server (`jpserver_extensions = {"workbench_widgets.saving": True}`; the wheel enables it)
this happens whenever a notebook is saved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
PICTURE = "image/png"
_MODEL = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


def still(notebook: Any) -> None:
    """Replace views by the pictures beside them, in place, and drop the states that no output needs."""
    for data in _bundles(notebook):
        if VIEW in data and PICTURE in data:
            del data[VIEW]
    widgets = notebook.get("metadata", {}).get("widgets", {})
    stored = widgets.get(STATE)
    if stored is None:
        return
    states, wanted = stored["state"], set()
    todo = [data[VIEW]["model_id"] for data in _bundles(notebook) if VIEW in data]
    while todo:
        model = todo.pop()
        if model in states and model not in wanted:
            wanted.add(model)
            todo += _MODEL.findall(json.dumps(states[model]["state"]))
    stored["state"] = {model: state for model, state in states.items() if model in wanted}
    if not wanted:
        del notebook["metadata"]["widgets"]


def _bundles(notebook: Any) -> Iterator[dict[str, Any]]:
    """The MIME bundles of all outputs."""
    for cell in notebook.get("cells", ()):
        for output in cell.get("outputs", ()):
            if "data" in output:
                yield output["data"]


def before_saving(model: dict[str, Any], **_: Any) -> None:
    """What Jupyter's contents manager calls with everything that it is about to write."""
    if model.get("type") == "notebook" and isinstance(model.get("content"), dict):
        still(model["content"])


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    server.contents_manager.register_pre_save_hook(before_saving)
