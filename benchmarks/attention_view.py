"""Attention in a browser, ours beside bertviz and CircuitsVis: bytes, time to first paint, longest prompt; and how our
map of 4,096 tokens moves and zooms.

    python -m benchmarks.attention_view [--peers FOLDER] [--tokens N ...]

All show the same attention: the default model's over one text, of one layer (9 heads) or of all 30. Each page may take
60 s to make and 60 s to paint, and 2 GB; the first length at which a view fails is its last. Beyond the model's 8,192
positions queries and keys of one layer are random, of its shape. How first paint is taken: `benchmarks/first_paint.py`.

The peers are no dependencies of ours. Install them into a folder of their own, without the PyTorch that we bring:

    pip install --no-deps --target FOLDER bertviz circuitsvis "importlib-metadata<9" zipp
    npm install --prefix FOLDER requirejs@2.3.6 d3@5.7.0 jquery@2.1.0

The second line is for what bertviz loads from the network (it asks for jQuery 2.0.0, which npm lacks): it is handed out
from the folder, and its bytes count. A peer that is not there is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.attention_pages import HEAD, LAYER, PIXELS, layers_of, load, write_page
from benchmarks.first_paint import browser, first_paint
from benchmarks.map_frames import MOUNTED, SHOW, frame_rates, packed, rates_table
from benchmarks.record import environment, write
from workbench_kernels import Scoring

LENGTHS = (64, 128, 256, 512, 1024, 4096, 32_768)
READ = 4096  # tokens that the model reads; shorter prompts are its prefixes
HEADS, KV_HEADS, WIDTH, LAYERS = 9, 3, 64, 30  # the default model
LIMIT_S = 60.0
LIMIT_BYTES = 2e9
PEERS = Path(tempfile.gettempdir()) / "attention_peers"
LIBRARIES = {  # what bertviz asks the network for
    "require": "node_modules/requirejs/require.js",
    "d3": "node_modules/d3/dist/d3.min.js",
    "jquery": "node_modules/jquery/dist/jquery.min.js",
}

Found = dict[str, Any]


@dataclass(frozen=True)
class View:
    """One row of the table. maker: a key of `attention_pages.MAKERS`; package: the peer that it needs, or None."""

    title: str
    shows: str
    maker: str
    package: str | None
    layers: int
    expects: Callable[[int], tuple[str, int]]
    longest: int = LENGTHS[-1]
    """the longest prompt that is tried"""


ONE, ALL = f"one layer, {HEADS} heads", f"{LAYERS} layers, {LAYERS * HEADS} heads"
VIEWS = (
    View("bertviz head_view", ONE, "bertviz.head_view", "bertviz", 1, lambda n: ("line", HEADS * n * n)),
    View("CircuitsVis attention_heads", ONE, "circuitsvis", "circuitsvis", 1, lambda _: ("canvas", HEADS + 1)),
    View("ours: MapGrid", f"{ONE}, 32 x 32 cells", "map_grid.layer", None, 1, lambda _: ("canvas", 1)),
    View("ours: Heatmap", f"one head, {PIXELS} x {PIXELS} cells", "heatmap", None, 1, lambda _: ("canvas", 1)),
    View(
        "bertviz model_view", ALL, "bertviz.model_view", "bertviz", LAYERS, lambda n: ("line", LAYERS * HEADS * n * n)
    ),
    View("ours: MapGrid", f"{ALL}, 32 x 32 cells", "map_grid.model", None, LAYERS, lambda _: ("canvas", 1), READ),
)


# -- the attention


def record(folder: Path) -> dict[bool, Path]:
    """The recordings that pages are made of: what the model read, and (True) a longer one with random numbers."""
    import workbench as wb
    from workbench.examples import needle
    from workbench_widgets.present import pieces

    session = wb.Session("smollm2-135m")
    tokenizer: Any = session.tokenizer
    text = needle(READ + 100, count=lambda part: len(tokenizer(part)["input_ids"])).text
    ids = torch.tensor(tokenizer(text)["input_ids"][:READ])
    layers = session.read(ids).layers
    read = {
        "queries": torch.stack([layer.queries_held for layer in layers]),
        "keys": torch.stack([layer.keys_held for layer in layers]),
        "scale": layers[0].scale,
        "tokens": pieces(tokenizer, ids),
    }
    draw = torch.Generator().manual_seed(0)
    longer = {
        "queries": 2 * torch.randn(1, HEADS, LENGTHS[-1], WIDTH, generator=draw),
        "keys": 2 * torch.randn(1, KV_HEADS, LENGTHS[-1], WIDTH, generator=draw),
        "scale": WIDTH**-0.5,
        "tokens": pieces(tokenizer, torch.randint(len(tokenizer), (LENGTHS[-1],), generator=draw)),
    }
    paths = {False: folder / "read.pt", True: folder / "random.pt"}
    for random, recording in ((False, read), (True, longer)):
        torch.save(recording, paths[random])
    return paths


# -- pages


def make(view: View, tokens: int, recording: Path, page: Path, peers: Path) -> Found:
    """Make a page, a peer's in a process of its own: `compute_s`, `write_s`, `page_bytes`, or `failed`."""
    if view.package is None:
        return {**write_page(view.maker, load(recording, tokens), page), "page_bytes": page.stat().st_size}
    command = [sys.executable, "-m", "benchmarks.attention_pages", view.maker, str(tokens), str(recording), str(page)]
    command.append(str(peers))
    try:
        done = subprocess.run(command, timeout=LIMIT_S, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no page in {LIMIT_S:.0f} s"}
    if done.returncode:
        return {"failed": "making the page failed", "error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return {**json.loads(done.stdout.splitlines()[-1]), "page_bytes": page.stat().st_size}


def expected_bytes(made: Sequence[Found], tokens: int) -> float:
    """A peer's page at more tokens, from the last two made: scripts, and every number of every n x n matrix as text."""
    last = made[-1]
    size, square = last["page_bytes"], last["tokens"] ** 2
    if len(made) > 1:
        size, square = size - made[-2]["page_bytes"], square - made[-2]["tokens"] ** 2
    return float(last["page_bytes"] + size / square * (tokens**2 - last["tokens"] ** 2))


def measure(
    view: View, lengths: Sequence[int], recordings: Mapping[bool, Path], folder: Path, peers: Path, playwright: Any
) -> list[Found]:
    """A view at each length, until it fails: after that only the size of its pages is told."""
    found: list[Found] = []
    for tokens in lengths:
        here: Found = {"tokens": tokens}
        found.append(here)
        made = [one for one in found if "page_bytes" in one]
        if view.package and made:
            here["expected_bytes"] = expected_bytes(made, tokens)
        failed = next((one for one in found if "failed" in one), None)
        if failed:
            here["skipped"] = f"failed at {failed['tokens']}"
        elif tokens > view.longest:
            here["skipped"] = "not measured"
        elif here.get("expected_bytes", 0) > LIMIT_BYTES:
            here["failed"] = f"over {LIMIT_BYTES / 1e9:.0f} GB"
        else:
            page = folder / "page.html"
            here |= make(view, tokens, recordings[tokens > READ], page, peers)
            if "failed" not in here:
                scripts = {name: peers / path for name, path in LIBRARIES.items()} if view.package else {}
                here |= first_paint(playwright, page, view.expects(tokens), scripts, LIMIT_S)
            page.unlink(missing_ok=True)
        found[-1] = here
        print(view.title, here, file=sys.stderr)
    return found


def installed(peers: Path) -> dict[str, str]:
    """The versions of the peers that can be measured."""
    names = {view.package for view in VIEWS if view.package}
    found = {one.name: one.version for one in distributions(path=[str(peers)]) if one.name in names}
    if not all((peers / path).exists() for path in LIBRARIES.values()):
        found.pop("bertviz", None)
    return found


# -- moving in our map


def zooms(tab: Any, recording: Found, repeats: int = 5) -> Found:
    """From the end of dragging over a part of the map to its exact values on screen: medians of `repeats`."""
    from workbench.measure import pooled_map
    from workbench_widgets import present
    from workbench_widgets.views.heatmap import Heatmap

    at = layers_of(recording, every=False).start
    query, key = recording["queries"][at, HEAD], recording["keys"][at, HEAD // (HEADS // KV_HEADS)]
    canvas = tab.locator(".wb-map canvas").bounding_box()
    seconds: dict[str, list[float]] = {"compute": [], "send_and_paint": [], "all": []}
    windows = []
    for i in range(repeats):
        x, y = canvas["x"] + 100 + 40 * i, canvas["y"] + 480 - 10 * i
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + 100, y + 50, steps=3)
        began = perf_counter()
        tab.mouse.up()
        window = tab.evaluate("model.get('window')")
        started = perf_counter()
        rows, cols = (window[0], window[1]), (window[2], window[3])
        pooled = pooled_map(query, key, Scoring(recording["scale"]), pixels=PIXELS, rows=rows, cols=cols)
        keywords = present.attention_map(pooled, recording["tokens"], layer=LAYER, head=HEAD)
        fields = Heatmap.field_values((), keywords)  # as Heatmap.update does
        computed = perf_counter()
        tab.evaluate(SHOW, [{name: fields[name] for name in ("extent", "note")}, packed(fields)])
        shown = perf_counter()
        for name, took in (
            ("compute", computed - started),
            ("send_and_paint", shown - computed),
            ("all", shown - began),
        ):
            seconds[name].append(took)
        windows.append(window)
        tab.evaluate("model.set('window', null)")
        tab.wait_for_timeout(200)
    return {"windows": windows, **{f"{name}_s": statistics.median(times) for name, times in seconds.items()}}


def moving(recordings: Mapping[bool, Path], folder: Path, playwright: Any) -> Found:
    """Our map of READ tokens: seconds from its values to the screen, frame rates and zooms."""
    from benchmarks.attention_pages import heatmap

    recording = load(recordings[False], READ)
    computing, page = heatmap(recording)
    began = perf_counter()
    html = page()
    writing = perf_counter() - began
    assert html.count(MOUNTED) == 1, "the standalone page mounts its view in another way now"
    path = folder / "moving.html"
    path.write_text(html.replace(MOUNTED, f"globalThis.model = model; {MOUNTED}"), encoding="utf-8")
    with browser(playwright) as chromium:
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(path.as_uri())
        tab.locator(".wb-view[data-paint-ms]").wait_for()
        tab.wait_for_timeout(500)
        zoomed = zooms(tab, recording)
        rates = frame_rates(tab, READ)
    return {"compute_s": computing, "page_s": writing, "zoom": zoomed, "frames": rates}


# -- the tables


def amount(size: float) -> str:
    """Bytes for people, in the decimal units of browsers and disks."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.0f} {unit}" if size >= 10 * factor else f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def cell(found: Found) -> str:
    """One measurement in a few words."""
    size = (
        amount(found["page_bytes"] + found.get("script_bytes", 0))
        if "page_bytes" in found
        else f"about {amount(found['expected_bytes'])}"
        if "expected_bytes" in found
        else ""
    )
    said = f"{found['paint_s']:.2f} s" if "paint_s" in found else found.get("failed", found.get("skipped", ""))
    return ", ".join(filter(None, (size, said)))


def longest(found: Sequence[Found]) -> str:
    """The longest prompt that was painted, in words."""
    painted = [one["tokens"] for one in found if "paint_s" in one]
    if not painted:
        return "none"
    return f"{max(painted):,}" + ("" if any("failed" in one for one in found) else " or more")


def comparison(results: Mapping[str, list[Found]], lengths: Sequence[int], views: Sequence[View] = VIEWS) -> list[Any]:
    """The table of views and lengths; results by the views' makers, without those whose peer is not installed."""
    heads = [f"{n:,} tokens" + (" (random)" if n > READ else "") for n in lengths]
    table = [["bytes to the browser, time to first paint", "shows", *heads, "longest prompt"]]
    for view in views:
        if view.maker not in results:
            table.append([view.title, f"{view.package} is not installed", *[""] * len(lengths), ""])
            continue
        found = results[view.maker]
        table.append([view.title, view.shows, *map(cell, found), longest(found)])
    return table


def making(results: Mapping[str, list[Found]], lengths: Sequence[int], views: Sequence[View] = VIEWS) -> list[Any]:
    """The table of what comes before a page reaches the browser: computing what it shows, and writing it."""
    table = [["computed and written in", "shows", *[f"{n:,} tokens" for n in lengths]]]
    for view in views:
        times = [
            f"{one['compute_s'] + one['write_s']:.2f} s" if "write_s" in one else ""
            for one in results.get(view.maker, ())
        ]
        if times:
            table.append([view.title, view.shows, *times])
    return table


def interaction(found: Found) -> list[Any]:
    """The table of our map of 4,096 tokens."""
    zoom = found["zoom"]
    r0, r1, c0, c1 = zoom["windows"][0]
    table = [
        [f"our map of one head, {READ:,} tokens", "measured", "limit"],
        ["computing it", f"{found['compute_s']:.2f} s", ""],
        ["on screen once it is computed (page made and painted)", f"{found['page_s'] + found['paint_s']:.2f} s", "1 s"],
        [
            f"zoom to about {r1 - r0} x {c1 - c0} tokens, from letting go to exact values on screen",
            (
                f"{zoom['all_s']:.2f} s (computing {zoom['compute_s']:.2f} s, sending and painting "
                f"{zoom['send_and_paint_s']:.2f} s)"
            ),
            "",
        ],
    ]
    return [*table, *rates_table(found["frames"])]


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=PEERS, help=f"where the peers are installed (default: {PEERS})")
    parser.add_argument("--tokens", type=int, nargs="+", choices=LENGTHS, default=LENGTHS, help="lengths")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    versions = installed(asked.peers)
    before = {**environment(), "threads": 1, **versions}
    for name in sorted({view.package for view in VIEWS if view.package} - versions.keys()):
        print(f"{name} is not installed in {asked.peers}: left out (python -m benchmarks.attention_view --help)")
    views = [view for view in VIEWS if view.package is None or view.package in versions]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = Path(scratch)
        with browser(playwright) as chromium:
            before["chromium"] = chromium.version
        recordings = record(folder)
        moved = moving(recordings, folder, playwright)
        results = {
            view.maker: measure(view, asked.tokens, recordings, folder, asked.peers, playwright) for view in views
        }
    at_read = next((one for one in results["heatmap"] if one["tokens"] == READ), None)
    tables = [comparison(results, asked.tokens), making(results, asked.tokens)]
    if at_read and "paint_s" in at_read:
        tables.append(interaction({**moved, "paint_s": at_read["paint_s"]}))
    write("attention_view", {"views": results, "moving": moved}, tables[0], before, *tables[1:])


if __name__ == "__main__":
    main()
