"""What is written for readers is true: the README's and the tutorial's programs run, links lead somewhere, the site is
whole and fetches nothing, and the catalogue tells every method with all its parameters.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest

import workbench
from tests.widgets.browser import watched_page
from workbench.examples import needle
from workbench.registry import FAMILIES, registered

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = sorted([*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(name: str, language: str) -> list[str]:
    """The code of a language in a Markdown file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def docs() -> Iterator[dict[str, ModuleType]]:
    """The modules that make the pages, as mkdocs imports them."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import catalogue
        import model_kinds
        import site_hook

        yield {"catalogue": catalogue, "model_kinds": model_kinds, "site_hook": site_hook}
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, with no way to the network."""
    folder = tmp_path_factory.mktemp("site")
    offline = "import socket, sys; from mkdocs.__main__ import cli\nsocket.socket.connect = None\ncli(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", offline, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    (program,) = blocks("README.md", "python")
    assert len(program.strip().splitlines()) <= 12
    (tmp_path / "book.txt").write_text(needle(600, depth=0.3).text)
    with chdir(tmp_path):
        names: dict[str, Any] = {}
        exec(program.replace("smollm2-135m", "workbench-tiny"), names)
        assert names["plan"].nbytes <= 0.25 * names["plan"].full_nbytes
        assert names["wb"].Session("small").source


def test_the_program_of_the_tutorial_runs() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/tutorial.md", "python"):
        exec(block, names)
    assert names["table"]["error"].isna().all()
    assert needle(1000, depth=0.3).answer in names["full"].text


def test_the_program_about_sweeps_runs_and_its_file_is_a_sweep(tmp_path: Path) -> None:
    import yaml

    from workbench.sweep.description import described, read

    text = (ROOT / "docs/how-to/sweep.md").read_text(encoding="utf-8")
    programs = re.findall(r"^    ```python\n(.*?)^    ```", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    with chdir(tmp_path):
        for program in programs:
            exec(textwrap.dedent(program), names)
        assert len(names["results"]) == 24 and (tmp_path / "rows.csv").exists()
        (written,) = re.findall(r"^    ```yaml\n(.*?)^    ```", text, flags=re.MULTILINE | re.DOTALL)
        (tmp_path / "sweep.yaml").write_text(textwrap.dedent(written))
        arguments = described(read(tmp_path / "sweep.yaml")).arguments()
        assert len(arguments["recipes"]) == 4 and arguments["seeds"] == [0, 1]
        assert yaml.safe_load(textwrap.dedent(written))["models"] == arguments["models"]


def test_the_program_of_the_page_about_cost_runs() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/how-to/cost.md", "python"):
        exec(block, names)
    assert abs(names["small"].measured.error) < 0.09


@pytest.mark.parametrize("page", ["several-devices", "long-prompts"])
def test_programs_about_devices_and_lengths_run(page: str) -> None:
    names: dict[str, Any] = {}
    for block in blocks(f"docs/how-to/{page}.md", "python"):
        exec(block, names)
    assert names["session"].runs


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_or_pages_that_are_made(page: Path, docs: dict[str, ModuleType]) -> None:
    made = {*docs["catalogue"].pages(), "reference/cli.md", "benchmarks/index.md"}
    made |= {*docs["site_hook"].INCLUDED.values(), *(f"benchmarks/{name}.md" for name in docs["site_hook"].RESULTS)}
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        address = urlsplit(target)
        if address.scheme or not address.path:
            continue
        file = (page.parent / address.path).resolve()
        assert file.exists() or (
            file.is_relative_to(ROOT / "docs") and (file.relative_to(ROOT / "docs").as_posix() in made)
        ), f"{page.name}: {target}"


def test_the_catalogue_tells_every_method_and_each_of_its_parameters(site: Path) -> None:
    for family in FAMILIES:
        page = (site / f"methods/{family}.html").read_text(encoding="utf-8")
        for method in registered(family):
            begin = re.search(rf'<h[23] id="{method.key}">', page)
            assert begin is not None, method.key
            section = re.split(r"<h[23] id=", page[begin.end() :], maxsplit=1)[0]
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", section)).split())
            assert method.summary().replace("`", "") in text
            assert " ".join(method.claim.replace("`", "").split()) in text
            if method.paper is not None and method.paper.arxiv:
                assert f"https://arxiv.org/abs/{method.paper.arxiv}" in section
            for parameter in method.parameters():
                assert f"<code>{parameter.name}</code>" in section, f"{method.key}: {parameter.name}"
                assert " ".join(parameter.help.replace("`", "").split()) in text, f"{method.key}: {parameter.name}"
                assert html.escape(repr(parameter.default), quote=False) in section, f"{method.key}: {parameter.name}"


@pytest.mark.parametrize(
    ("module", "heading"),
    [
        ("workbench.kv.methods.evict.snapkv", "Eviction"),
        ("workbench.weights.methods.low_rank.svd", "Low rank"),
        ("workbench.attention.methods.cca", ""),
        ("workbench.kv.methods.full", ""),
        ("vnorm", ""),
    ],
)
def test_a_method_stands_under_the_kind_of_its_folder(module: str, heading: str, docs: dict[str, ModuleType]) -> None:
    assert docs["catalogue"].kind(type("Made", (), {"__module__": module})) == heading


def test_every_table_of_results_is_a_page(docs: dict[str, ModuleType], site: Path) -> None:
    results = {path.stem for path in (ROOT / "benchmarks/results").glob("*.md")}
    assert results == set(docs["site_hook"].RESULTS)
    for name in results:
        assert (site / f"benchmarks/{name}.html").exists()


def test_public_packages_are_in_the_reference(site: Path) -> None:
    page = (site / "reference/workbench.html").read_text(encoding="utf-8")
    for name in ("read", "plan", "run", "compare", "census", "export"):
        assert f'id="workbench.Session.{name}"' in page
    for package in ("kv", "weights", "attention"):
        page = (site / f"reference/{package}.html").read_text(encoding="utf-8")
        for name in getattr(workbench, package).__all__:
            assert f'id="workbench.{package}.{name}"' in page, name


def test_the_site_fetches_nothing(docs: dict[str, ModuleType], site: Path, tmp_path: Path) -> None:
    assert docs["site_hook"].foreign(site) == []
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="https://cdn.example/a.css"><script src="//b.example/c.js">'
    )
    (tmp_path / "style.css").write_text("@font-face { src: url(https://fonts.example/f.woff2) }")
    assert len(docs["site_hook"].foreign(tmp_path)) == 3


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1920, True)])
def test_pages_fit_their_window_and_ask_no_other_host(chromium: Any, site: Path, width: int, dark: bool) -> None:
    watched = watched_page(chromium, width=width, dark=dark)
    for name in ("index", "tutorial", "methods/kv", "methods/weights", "benchmarks/kv_quality", "reference/workbench"):
        watched.page.goto((site / f"{name}.html").as_uri())
        watched.page.wait_for_selector("article h1")
        assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    assert watched.outside == []


def test_there_is_one_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {workbench.__version__}\n" in citation
    assert f"\n## {workbench.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_tries_every_python_that_the_package_supports() -> None:
    workflow = (ROOT / ".github/workflows/checks.yml").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    supported = re.findall(r"Python :: (3\.\d+)\"", project)
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[1]) == supported


def test_the_page_of_kinds_has_each_kind_with_its_outcome(docs: dict[str, ModuleType]) -> None:
    page = docs["model_kinds"].page()
    parts = {part.split(":")[0]: part for part in page.split("\n## ")[1:]}
    of = {"exact": ("Exact in every layer", "Exact, with layers left as they are"), "refused": ("Refused",)}
    rows = json.loads(docs["model_kinds"].RESULTS.read_text(encoding="utf-8"))["kinds"]
    for row in rows:
        lines = [line for part in of.get(row["result"], ("Not tried",)) for line in parts[part].splitlines()]
        (line,) = [line for line in lines if line.startswith(f"| {row['kind']} |")]
        assert docs["model_kinds"].cell(row["why"]) in line
    assert page.count("\n| ") == len(rows) + 2 * len(parts)


def test_the_page_of_kinds_says_which_layers_are_left(docs: dict[str, ModuleType], tmp_path: Path) -> None:
    row = {"result": "exact", "why": "", "looks": {"spectra": "no | list"}, "left": {"a window": "0-2"}}
    rows = [{**row, "kind": "a", "config": "AConfig", "same_as": "a_text"}, {**row, "kind": "b", "left": {}}]
    where = {"transformers": "5", "torch": "2", "date": "today", "command": "python"}
    (tmp_path / "kinds.json").write_text(json.dumps({"kinds": rows, "environment": where}))
    page = docs["model_kinds"].page(tmp_path / "kinds.json")
    whole, some, *_ = page.split("\n## ")[1:]
    assert "| a | `AConfig` (the same model as a_text) | 0-2: a window; spectra: no \\| list |" in some
    assert "| b |  | spectra: no \\| list |" in whole
