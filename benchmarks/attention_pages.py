"""One attention view of a prompt as one HTML file, made as its package makes it: ours, bertviz's or CircuitsVis's.

    python -m benchmarks.attention_pages VIEW TOKENS RECORDING PAGE [PEERS]

A program of its own for the peers, so that the benchmark can stop one that takes too long, and so that their packages
(in the folder PEERS) are never on the path of ours. RECORDING holds queries [l, h, n, d], keys [l, k, n, d], scale
and tokens. The last line printed tells in JSON the seconds of computing and of writing the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from workbench_kernels import Scoring

LAYER, HEAD = 8, 2  # what is shown where a view shows one layer, or one head
PIXELS, SMALL = 512, 32  # cells along each side of a map, and of each of many small maps
HEAD_START = '<!doctype html>\n<meta charset="utf-8">\n<title>attention</title>\n<body>\n'

Recording = dict[str, Any]


def layers_of(recording: Recording, every: bool) -> slice:
    """Which recorded layers a view shows: every one, or LAYER (the only one of a recording without others)."""
    only = min(LAYER, len(recording["queries"]) - 1)
    return slice(None) if every else slice(only, only + 1)


def exact_attention(recording: Recording, every: bool) -> Tensor:
    """The whole causal softmax, [l, h, n, n] float32: what the peers take."""
    at = layers_of(recording, every)
    queries, keys = recording["queries"][at], recording["keys"][at]  # [l, h, n, d], [l, k, n, d]
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries @ keys.mT * recording["scale"]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights: Tensor = scores.masked_fill_(later, -torch.inf).softmax(dim=-1)
    return weights


def heatmap(recording: Recording) -> tuple[float, Callable[[], str]]:
    """Our map of one head: seconds of computing it, and what makes the page."""
    from workbench.measure import pooled_map
    from workbench_widgets import present

    at = layers_of(recording, every=False).start
    group = recording["queries"].shape[1] // recording["keys"].shape[1]
    began = perf_counter()
    pooled = pooled_map(
        recording["queries"][at, HEAD], recording["keys"][at, HEAD // group], Scoring(recording["scale"]), pixels=PIXELS
    )
    took = perf_counter() - began
    return took, lambda: present.attention_html(pooled, recording["tokens"], layer=LAYER, head=HEAD)


def map_grid(recording: Recording, every: bool) -> tuple[float, Callable[[], str]]:
    """Our small maps of all heads of one layer or of every layer: seconds of computing, and what makes the page."""
    from workbench.measure import pooled_maps
    from workbench.measure.grid import GridOfMaps
    from workbench_widgets import present
    from workbench_widgets.views.map_grid import MapGrid

    at = layers_of(recording, every)
    began = perf_counter()
    layers = zip(recording["queries"][at], recording["keys"][at], strict=True)
    grid = GridOfMaps.of([pooled_maps(q, k, Scoring(recording["scale"]), pixels=SMALL) for q, k in layers])
    took = perf_counter() - began
    return took, lambda: MapGrid.html(**present.map_grid(grid))  # type: ignore[arg-type]  # `title` is not among its fields


def bertviz(recording: Recording, name: str, every: bool) -> tuple[float, Callable[[], str]]:
    """bertviz's head_view or model_view."""
    import bertviz as package  # type: ignore[import-not-found]

    began = perf_counter()
    attention = [layer[None] for layer in exact_attention(recording, every)]  # [1, h, n, n] each
    took = perf_counter() - began
    view = getattr(package, name)
    return took, lambda: HEAD_START + view(attention, recording["tokens"], html_action="return").data


def circuitsvis(recording: Recording) -> tuple[float, Callable[[], str]]:
    """CircuitsVis's attention_heads (which took over from attention_patterns) of one layer, its scripts inside."""
    from circuitsvis.attention import attention_heads  # type: ignore[import-not-found]

    began = perf_counter()
    (attention,) = exact_attention(recording, every=False)
    took = perf_counter() - began
    tokens = recording["tokens"]
    return took, lambda: HEAD_START + attention_heads(attention, tokens, mask_upper_tri=True).local_src


MAKERS: dict[str, Callable[[Recording], tuple[float, Callable[[], str]]]] = {
    "bertviz.head_view": lambda recording: bertviz(recording, "head_view", every=False),
    "bertviz.model_view": lambda recording: bertviz(recording, "model_view", every=True),
    "circuitsvis": circuitsvis,
    "heatmap": heatmap,
    "map_grid.layer": lambda recording: map_grid(recording, every=False),
    "map_grid.model": lambda recording: map_grid(recording, every=True),
}


def load(path: Path, tokens: int) -> Recording:
    """The first `tokens` of a recording: a causal model's prefix is the reading of the shorter prompt."""
    whole: Recording = torch.load(path, mmap=True)
    cut = {name: whole[name][:, :, :tokens] for name in ("queries", "keys")}
    return {**whole, **cut, "tokens": whole["tokens"][:tokens]}


def write_page(view: str, recording: Recording, page: Path) -> dict[str, float]:
    """Make a view's page: `compute_s`, seconds until what it shows is known, and `write_s`, until the page is there."""
    computing, make = MAKERS[view](recording)
    began = perf_counter()
    page.write_text(make(), encoding="utf-8")
    return {"compute_s": computing, "write_s": perf_counter() - began}


def main(view: str, tokens: str, recording: str, page: str, *peers: str) -> None:
    sys.path[:0] = peers
    torch.set_num_threads(1)
    write_page(view, load(Path(recording), 8), Path(page))  # what is imported and compiled at the first call
    print(json.dumps(write_page(view, load(Path(recording), int(tokens)), Path(page))))


if __name__ == "__main__":
    main(*sys.argv[1:])
