"""What mkdocs asks of this project while it builds the site: pages that are made, not kept, and a check of the result.

Made are the method catalogue (`catalogue.py`), the page of all kinds of models (`model_kinds.py`), the reference of the
command line, and pages out of files that lie elsewhere in the repository: they are included as they are, with links to
other files turned into links between pages.
"""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import catalogue
import model_kinds
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent

# Files of the repository that are pages as they are: their place in it, and in the site.
INCLUDED = {
    "ARCHITECTURE.md": "explanation/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "workbench/models/workbench_tiny/README.md": "reference/workbench-tiny.md",
}

# Tables of benchmarks/results, in the order of the menu: heading, and what the table says.
RESULTS = {
    "kv_quality": (
        "What cache methods cost",
        "How often the answer is right at equal bytes, nats lost, and each paper's claim beside what was measured.",
    ),
    "weight_quality": (
        "What weight methods cost",
        "Perplexity, divergence and the error of layers' outputs beside the bytes held, for every weight method.",
    ),
    "search": (
        "What a search finds",
        "The recipe of a search beside the best single method at its best published setting, at the same bytes.",
    ),
    "weight_cost": (
        "What compressing weights takes",
        "Seconds and memory for calibrating and compressing on a CPU.",
    ),
    "weight_cost_cuda": ("What compressing weights takes on a GPU", "The same for a model of 8 billion parameters."),
    "model_kinds": (
        "Which models are exact",
        "Every kind of causal model of transformers: exact, or refused with the reason.",
    ),
    "session_speed": (
        "Speed of a session",
        "What reading and running cost beside plain transformers, and how long a plan takes.",
    ),
    "cpu_decode": (
        "Decoding on a CPU",
        "Tokens a second after 512 tokens of prompt, beside plain transformers, measured in turns.",
    ),
    "results_page": (
        "Speed of the Results page",
        "From changing a filter to a table and a front drawn again, over 10,000 rows.",
    ),
    "app_latency": ("Speed of the app", "From moving the slider to views that are drawn again, and memory."),
    "attention_long": (
        "Attention of long prompts",
        "Seconds and memory for maps, sums and head figures without the n x n matrix, on a CPU.",
    ),
    "attention_long_cuda": ("Attention of long prompts on a GPU", "The same for 131,072 tokens."),
    "attention_view": (
        "Attention maps in the browser",
        "Bytes sent and time to the first paint, beside other viewers of attention.",
    ),
    "map_frames": ("Maps in motion", "How soon a map of 4,096 tokens is on screen, and how smoothly it moves."),
    "retrieval_recall": (
        "Recall of retrieval",
        "How many of a query's largest keys each index finds, and what share of them it visits.",
    ),
    "streaming": (
        "Endless text",
        "Nats a token over 100,000 tokens through a cache of 512 under StreamingLLM, and where entries stand.",
    ),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    places = {name: place for name, place in INCLUDED.items() if (ROOT / name).exists()}
    places |= {f"benchmarks/results/{name}.md": f"benchmarks/{name}.md" for name in RESULTS}
    places |= {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()}
    made = catalogue.pages() | {"reference/cli.md": command_line(), "benchmarks/index.md": results()}
    for name, place in places.items():
        if not name.startswith("docs/"):
            made[place] = included(name, place, places)
    made["benchmarks/model_kinds.md"] = model_kinds.page()  # every row, of which the table has the sums
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def included(name: str, place: str, places: dict[str, str]) -> str:
    """A file's text as a page: its links lead to pages, and where a file is none, its path is named."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.split("---\n", 2)[2].lstrip()
    result = Path(name).stem
    if name.startswith("benchmarks/results/"):
        heading, says = RESULTS[result]
        body = text.split("\n", 1)[1].lstrip()
        body = body.replace(" ± ", "\u00a0±\u00a0")  # a figure and its error stay on one line
        text = f"---\nhide: [toc]\n---\n\n# {heading}\n\n{says} From `benchmarks/results/{result}.md`.\n\n{body}"

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        if urlsplit(target).scheme or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        if file in places:
            page = posixpath.relpath(places[file], posixpath.dirname(place) or ".")
            return f"[{words}]({page}{'#' + anchor if anchor else ''})"
        return words if words.strip("`") in (path, file) else f"{words} (`{file}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The columns of results below their page; and a table of contents shows one heading of the first level: what else
    has that level goes to the second.
    """
    if page.file.src_uri == "reference/results.md":
        return markdown + columns()
    if page.file.src_uri != "kernels.md":
        return markdown
    first, rest = markdown.split("\n", 1)
    return first + "\n" + re.sub(r"^# ", "## ", rest, flags=re.MULTILINE)


def columns() -> str:
    """What each column of stored rows holds."""
    from workbench.results import COLUMNS

    rows = [f"| `{name}` | {column.kind} | {column.help} |" for name, column in COLUMNS.items()]
    return "\n".join(["| column | type | what it holds |", "| --- | --- | --- |", *rows, ""])


def results() -> str:
    """The page before the tables: what each says."""
    rows = [f"| [{heading}]({name}.md) | {says} |" for name, (heading, says) in RESULTS.items()]
    rows.append(
        "| [Kernels](../kernels.md) | What the Triton kernels reach on a GPU, beside what else does the same. |"
    )
    return "\n".join(
        [
            "# Results",
            "",
            "Every figure that this project claims is in a table that a program of `benchmarks/` wrote. Each ends with",
            "the machine, the versions, the date and the command that repeats it; the JSON beside it has every row.",
            "",
            "| table | what it says |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def command_line() -> str:
    """Every command's own help."""
    import typer
    from typer.testing import CliRunner

    from workbench.cli.commands import app

    def help_of(*words: str) -> str:
        done = CliRunner().invoke(app, [*words, "--help"], prog_name="workbench", env={"COLUMNS": "100"})
        if done.exit_code:
            raise PluginError(f"workbench {' '.join(words)} --help: {done.output}")
        return f"```text\n{done.output.strip()}\n```"

    parts = [
        "# Command line",
        "Exit codes: 0 done, 1 the work failed, 2 the input was wrong (one line on standard error), 130 cancelled.",
        help_of(),
    ]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts += [f"## workbench {name}", help_of(name)]
        for below in getattr(command, "commands", {}):
            parts += [f"### workbench {name} {below}", help_of(name, below)]
    return "\n\n".join(parts) + "\n"


class _Loads(HTMLParser):
    """The addresses that a page makes a browser fetch; links that a reader may follow are none of them."""

    LOADING = frozenset({"stylesheet", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "icon"})

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag != "a":
            self.addresses += [values[name] for name in ("src", "data", "poster", "srcset") if name in values]
        if tag == "link" and self.LOADING & set(values.get("rel", "").split()):
            self.addresses.append(values.get("href", ""))


def foreign(site: Path) -> list[str]:
    """What pages and style sheets of a built site would fetch from elsewhere: "page: address"."""
    fetched: list[str] = []
    for page in sorted(site.rglob("*.html")):
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        fetched += [f"{page.relative_to(site)}: {address}" for address in loads.addresses if urlsplit(address).netloc]
    for sheet in sorted(site.rglob("*.css")):
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", sheet.read_text(encoding="utf-8"))
        fetched += [f"{sheet.relative_to(site)}: {a or b}" for a, b in addresses if urlsplit(a or b).netloc]
    return fetched


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that needs a network to be read."""
    fetched = foreign(Path(config.site_dir))
    if fetched:
        raise PluginError("pages fetch from elsewhere:\n" + "\n".join(fetched))
