"""The notebooks as they are committed: run, small, steady; and the comparison that nbval holds them to."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 500_000  # bytes; every widget repeats its module
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


def module(name: str) -> Any:
    """A script of the notebooks' folder."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_a_notebook_was_run_from_top_to_bottom_without_trouble(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
        assert "execution" not in cell.metadata, "times are recorded: save it with `make notebooks`"


def test_a_notebook_stays_small_and_carries_no_library(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < LIMIT
    assert "Plotly.newPlot" not in text
    assert "FigureWidget" not in text


def test_every_view_in_a_notebook_has_its_state_and_every_state_a_view(notebook):
    stored = notebook.metadata.get("widgets", {}).get(STATE, {"state": {}})
    states = stored["state"]
    referred = set(re.findall(r"[0-9a-f]{32}", json.dumps([s["state"] for s in states.values()])))
    shown = set(module("execute").shown(notebook))
    assert (shown | referred) <= set(states)
    assert set(states) <= shown | referred


def test_what_a_view_shows_stands_as_text_beside_it(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if VIEW in output.get("data", {}):
                assert len(output.data["text/plain"]) > 40


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("KL 0.808", "KL 0.801", True),
        ("KL 0.808", "KL 0.910", False),
        ("KL 0.01", "KL 0.02", True),
        ("KL 0.01", "KL 0.03", False),
        ("KL 0.0030", "KL 0.0035", True),
        ("KL 0.0030", "KL 0.0045", False),
        ("13.52 MiB", "13.60 MiB", True),
        ("13.52 MiB", "15.52 MiB", False),
        ("keeps 22%", "keeps 23%", True),
        ("keeps 22%", "keeps 25%", False),
        ("keeps 22%", "keeps 22", False),
        ("the code is 7391.", "the code is 9173.", False),
        ("1,024 tokens", "1,024 tokens", True),
        ("1,024 tokens", "1,025 tokens", False),
        ("found True", "found False", False),
        (" a   1.0", "a 1.00", True),
        ("a 1", "a 1 2", False),
        ("token -3", "token 3", False),
    ],
)
def test_outputs_agree_in_words_exactly_and_in_numbers_closely(one, other, same):
    tolerant = module("conftest").Tolerant
    assert (tolerant(one) == tolerant(other)) is same
    assert (tolerant(one) != tolerant(other)) is not same


def test_saving_again_names_models_the_same_and_drops_what_nobody_shows():
    execute = module("execute")
    a, b, c = (letter * 32 for letter in "abc")
    states = {a: {"state": {"children": [f"IPY_MODEL_{b}"]}}, b: {"state": {}}, c: {"state": {}}}
    view = nbformat.v4.new_output("display_data", {VIEW: {"model_id": a}})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[view])])
    notebook.metadata["widgets"] = {STATE: {"state": states}}
    execute.prune(notebook)
    assert set(notebook.metadata.widgets[STATE]["state"]) == {a, b}
    assert execute.renumbered(f"{b} {a} IPY_MODEL_{b}") == f"{1:032x} {2:032x} IPY_MODEL_{1:032x}"
