"""The backend works without what only views need: anywidget, ipywidgets, plotly and Panel come with extras."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("anywidget", "ipywidgets", "plotly", "panel", "panel_material_ui", "bokeh")

BLOCKED = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {VIEWS!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def without_views(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in an interpreter that has none of the packages for views."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments], capture_output=True, text=True, check=False
    )


def test_reading_planning_and_running_need_no_views() -> None:
    done = without_views(
        "import torch, workbench as wb; from workbench.models import tiny\n"
        "s = wb.Session((tiny('llama'), None)); s.read(torch.arange(60))\n"
        "assert s.plan('snapkv', budget=0.5, window=4).share <= 0.5\n"
        "run = s.run([wb.kv.SnapKV(budget=0.5, window=4), wb.weights.RTN(bits=4)], max_new_tokens=3)\n"
        "assert len(run.tokens) == 3 and run.quality.kl >= 0\n"
        "s.compare(['full', 'knorm'], budgets=[0.5], max_new_tokens=2); s.attention(0, 0)\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_notebook_without_widgets_shows_text() -> None:
    done = without_views(
        "import torch, workbench as wb; from workbench import display; from workbench.models import tiny\n"
        "display.in_notebook = lambda: True\n"
        "s = wb.Session((tiny('llama'), None)); s.read(torch.arange(40))\n"
        "data = s.plan('knorm')._repr_mimebundle_()\n"
        "assert set(data) == {'text/plain', display.NUMBERS}, data\n"
    )
    assert done.returncode == 0, done.stderr


TINY = "import torch, workbench as wb; from workbench.models import tiny; s = wb.Session((tiny('llama'), None)); "
FRAME = "import pandas as pd; frame = pd.DataFrame({'step': [0], 'weights': [1], 'event': ['load']}); "


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        (TINY + "s.controls()", "notebooks"),
        ("import workbench_widgets; workbench_widgets.AttentionView", "notebooks"),
        ("import workbench_widgets; workbench_widgets.TokenText.jupyter(['a'], shares=[1])", "notebooks"),
        ("import workbench_widgets; workbench_widgets.TokenText.panel(['a'], shares=[1])", "app"),
        ("import workbench_widgets; workbench_widgets.serve()", "app"),
        (FRAME + "from workbench_widgets.figures import memory_timeline; memory_timeline(frame)", "app"),
    ],
)
def test_what_needs_views_names_the_extra(code: str, extra: str) -> None:
    done = without_views(f"{code}\n")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("workbench.errors.MissingExtra: ")
    assert f"inference-workbench[{extra}]" in last


def test_the_command_line_needs_no_views_but_for_the_app(tmp_path: Path) -> None:
    main = "from workbench.cli import main; sys.exit(main(sys.argv[1:]))"
    text = tmp_path / "text.txt"
    text.write_text("The archive keeps one secret number. " * 8)
    for arguments in (
        ["--help"],
        ["methods", "--json"],
        ["run", "snapkv", "--model", "workbench-tiny", "--text-file", str(text), "--max-new-tokens", "2", "--json"],
    ):
        done = without_views(main, *arguments)
        assert done.returncode == 0, done.stderr
    done = without_views(main, "app", "--no-open")
    assert done.returncode == 2
    assert "inference-workbench[app]" in done.stderr


def test_what_views_need_is_in_the_extras_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name in ("anywidget", "ipywidgets", "plotly"):
        assert not [line for line in project["dependencies"] if line.startswith(name)]
        assert [line for line in extras["notebooks"] if line.startswith(name)]
    assert [line for line in extras["app"] if line.startswith("plotly")]
