"""The notebooks as they are committed: run, small, steady; and the comparison that nbval holds them to."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter

from workbench.display import NUMBERS
from workbench_widgets import saving
from workbench_widgets.saving import STATE, VIEW

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 500_000  # bytes
PLOTLY = "application/vnd.plotly.v1+json"


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


def bundles(notebook):
    return [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]


def test_what_a_notebook_shows_is_seen_by_those_who_never_run_it(notebook):
    """GitHub, an export and an untrusted Lab draw neither widgets nor Plotly figures."""
    assert "widgets" not in notebook.metadata
    for data in bundles(notebook):
        assert VIEW not in data
        if PLOTLY in data or NUMBERS in data:
            assert "image/png" in data
        if NUMBERS in data:
            assert len(data["text/plain"]) > 40


def test_an_export_to_html_shows_every_picture_without_a_network(path, notebook, tmp_path):
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook)
    shown = page.count('src="data:image/png;base64')
    assert shown >= sum("image/png" in data and "text/html" not in data for data in bundles(notebook))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("KL 0.808", "KL 0.801", True),
        ("KL 0.808", "KL 0.858", False),
        ("KL 0.01", "KL 0.02", True),
        ("KL 0.01", "KL 0.03", False),
        ("KL 0.0030", "KL 0.0035", True),
        ("KL 0.0030", "KL 0.0045", False),
        ("KL 0.808", "KL 0.770", True),
        ("KL 0.808", "KL 0.760", False),
        ("13.52 MiB", "13.53 MiB", False),
        ("13.52 MiB", "13.52 KiB", False),
        ("keeps 22%", "keeps 23%", False),
        ("keeps 22.4%", "keeps 22.9%", True),
        ("keeps 22.4%", "keeps 24.9%", False),
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


def altered(text):
    """The text with each number of it, one at a time, moved by the smallest step that means something."""
    for number in re.finditer(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|\d+", text):
        written = number[0].rstrip(",")
        value = float(written.replace(",", ""))
        mantissa, _, exponent = written.partition("e")
        digits = len(mantissa.partition(".")[2])
        step = 10.0 ** (int(exponent or 0) - digits)
        size = re.match(r" ?(?:bytes|[KMGT]i?B)\b", text[number.start() + len(written) :])
        if size or (not digits and not exponent):
            moved = f"{value + step:,.{digits}f}" if "," in written else f"{value + step:.{digits}f}"
        else:
            moved = f"{value + max(2.1 * step, 0.06 * value, 1.2e-3):.{digits + 4}{'e' if exponent else 'f'}}"
        yield text[: number.start()] + moved + text[number.start() + len(written) :]


def leaves(value, at=()):
    """The places and values of everything in JSON, packed arrays as lists."""
    if isinstance(value, dict) and "bdata" in value:
        value = module("conftest")._unpacked(value).ravel().tolist()
        yield from ((at, number) for number in value)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*at, key))
    else:
        yield at, value


def test_every_number_that_a_notebook_shows_is_held_by_the_comparison(notebook):
    """Each is moved by the smallest step that means something, and none gets through."""
    conftest, tried = module("conftest"), 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            texts = [output.text] if "text" in output else []
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    texts.append(value)
            for text in texts:
                expected = conftest.held(text)
                assert expected == text or expected == ""
                if expected == "":
                    assert NUMBERS in output.data, "what is not compared has its numbers beside it"
                    continue
                for other in altered(text):
                    tried += 1
                    assert expected != conftest.held(other), other
            for kind, value in output.get("data", {}).items():
                if kind not in (NUMBERS, PLOTLY):
                    continue
                assert conftest.held(value) == conftest.held(copy.deepcopy(value))
                for at, number in leaves(value):
                    tried += 1
                    assert not conftest.same(number, moved(number)), (kind, at, number)
                for path in ((), ("data", 0), ("layout", "title", "text")):
                    changed = with_a_change(value, path)
                    assert changed is None or conftest.held(value) != conftest.held(changed), (kind, path)
    assert tried > 20


def moved(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.0 if math.isnan(value) else value + max(0.06 * abs(value), 1.2e-3)
    return "something" if value is None else f"{value}x"


def with_a_change(value, path):
    """A copy that differs in the last of its numbers below a path, or None where there is no such place."""
    other = copy.deepcopy(value)
    place = other
    for step in path[:-1]:
        place = place.get(step, {}) if isinstance(place, dict) else place[step] if len(place) > step else {}
    if path and isinstance(place, dict):
        if path[-1] not in place:
            return None
        place[path[-1]] = moved(place[path[-1]])
        return other
    if path:
        packed = next(
            (array for array in place[path[-1]].values() if isinstance(array, dict) and "bdata" in array), None
        )
        if packed is None:
            return None
        array = np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"]).copy()
        array[-1] = array[-1] * 1.06 + 2
        packed["bdata"] = base64.b64encode(array.tobytes()).decode()
        return other
    other["one more"] = 1
    return other


def test_saving_keeps_pictures_in_place_of_views_and_drops_what_nobody_shows():
    a, b, c, d = (letter * 32 for letter in "abcd")
    states = {a: {"state": {"children": [f"IPY_MODEL_{b}"]}}, b: {"state": {}}, c: {"state": {}}, d: {"state": {}}}
    slider = nbformat.v4.new_output("display_data", {VIEW: {"model_id": a}})
    plan = nbformat.v4.new_output("display_data", {VIEW: {"model_id": d}, "image/png": "aGk=", "text/plain": "kept"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[slider, plan])])
    notebook.metadata["widgets"] = {STATE: {"state": states, "version_major": 2, "version_minor": 0}}
    saving.before_saving({"type": "notebook", "content": notebook})
    assert set(notebook.metadata.widgets[STATE]["state"]) == {a, b}
    assert [set(data) for data in bundles(notebook)] == [{VIEW}, {"image/png", "text/plain"}]
    nbformat.validate(notebook)
    assert module("execute").renumbered(f"{b} {a} IPY_MODEL_{b}") == f"{1:032x} {2:032x} IPY_MODEL_{1:032x}"
    before = json.dumps(notebook)
    saving.still(notebook)
    assert json.dumps(notebook) == before
    saving.still(empty := {"cells": [], "metadata": {}})
    assert empty == {"cells": [], "metadata": {}}
