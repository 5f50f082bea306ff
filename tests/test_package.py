"""The wheel holds all that the packages need, and the light parts stay light."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built in its own process because a build back-end works in the current folder."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_of_the_three_packages(names: set[str]) -> None:
    for folder in (ROOT / "workbench", ROOT / "kernels/workbench_kernels", ROOT / "widgets/workbench_widgets"):
        sources = {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}
        assert sources, f"{folder} holds no module"
        assert sources <= names


def test_the_wheel_ships_the_source_that_is_compiled_where_it_runs(names: set[str]) -> None:
    assert "workbench_kernels/cpu/token.c" in names


def test_the_wheel_ships_the_front_end_sources_inside_the_widgets_package(names: set[str]) -> None:
    sources = {path.name for path in (ROOT / "widgets/js").iterdir() if path.suffix in {".js", ".css"}}
    assert sources
    assert {f"workbench_widgets/js/{name}" for name in sources} <= names


def test_the_wheel_ships_the_whole_tiny_model(names: set[str]) -> None:
    files = {path.name for path in (ROOT / "workbench/models/workbench_tiny").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "README.md"} <= files
    assert {f"workbench/models/workbench_tiny/{name}" for name in files} <= names


def test_the_wheel_is_typed_licensed_and_holds_nothing_else(names: set[str]) -> None:
    assert "workbench/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    (data,) = (top for top in tops if top.endswith(".data"))
    assert [name for name in names if name.startswith(data)] == [
        f"{data}/data/etc/jupyter/jupyter_server_config.d/workbench.json"
    ]
    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == {
        "workbench",
        "workbench_kernels",
        "workbench_widgets",
    }


def test_the_wheel_declares_its_command_and_python_range(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt")]
        (metadata,) = [archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA")]
    assert "workbench = workbench.cli:main" in entry_points
    assert "[workbench.commands]\napp = workbench_widgets" in entry_points
    assert "Name: inference-workbench" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata


def test_the_packages_import_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked away from the checkout, with `-I -S`-like isolation from it: nothing may rest on the source layout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # sys.path.insert beats the editable install's path entries; the assertion would catch the checkout winning.
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import workbench, workbench_kernels, workbench_widgets\n"
        "for package in (workbench, workbench_kernels, workbench_widgets):\n"
        f"    assert package.__file__.startswith({str(tmp_path)!r}), package.__file__\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["workbench", "workbench.models"])
def test_importing_does_not_import_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "widgets"))}
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT, env=environment).returncode == 0


def test_the_source_folders_are_not_packages() -> None:
    """`kernels` is also the name of a library that transformers looks for: ours must never stand in its way."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "widgets/__init__.py").exists()
    program = "from transformers.utils import is_kernels_available; import sys; sys.exit(is_kernels_available())"
    installed = subprocess.run(
        [sys.executable, "-I", "-c", "import kernels; sys.exit(kernels.__file__ is None)"], check=False
    )
    if installed.returncode != 0:  # the real library is not here
        assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0
