"""Attention over several processes: tree and ring are the attention of one, to 1e-5, on groups of two and of four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from workbench.core.partial_softmax import PartialSoftmax
from workbench.core.sequence_parallel import ring_attention, ring_numbers, tree_attention, tree_numbers
from workbench_kernels import Scoring

H, K, D, DV, N = 4, 2, 16, 8, 41
SCORINGS = {
    "plain": Scoring(D**-0.5),
    "window and softcap": Scoring(D**-0.5, window=13, softcap=5.0),
    "sinks": Scoring(D**-0.5, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])),
    "slopes": Scoring(D**-0.5, slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
}
CUTS = {2: [0, 18, 41], 4: [0, 7, 7, 30, 41]}  # where each process's part begins; one of four has none


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    made = (torch.randn(heads, N, width, generator=draw) for heads, width in ((H, D), (K, D), (K, DV)))
    return tuple(each.to(dtype) for each in made)


def one(queries: torch.Tensor, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> Any:
    """The attention of a single process."""
    places = torch.arange(N)
    offsets = None if scoring.slopes is None else scoring.offsets(at[-1], places)
    hidden = ~scoring.visible(at, places)
    rows = queries.float() * scoring.scale
    return PartialSoftmax.over(rows, keys, values, scoring, hidden=hidden, offsets=offsets).output(scoring)


def work(rank: int, folder: str) -> None:
    """What one of four processes does: every case in the whole group and, where it is one of them, in that of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    found: dict[str, float] = {}
    for size, group in ((4, None), (2, pair)):
        if rank >= size:
            continue
        begin, end = CUTS[size][rank : rank + 2]
        part = slice(begin, end)
        for dtype in (torch.float32, torch.bfloat16):
            queries, keys, values = inputs(dtype)
            for name, scoring in SCORINGS.items():
                mine = keys[:, part], values[:, part], torch.arange(begin, end)
                last = torch.tensor([N - 2, N - 1])
                tree = tree_attention(queries[:, -2:], last, *mine, scoring, group)
                ring = ring_attention(queries[:, -2:], last, *mine, scoring, group)
                want = one(queries[:, -2:], last, keys, values, scoring)
                found[f"{size} tree {name} {dtype}"] = float((tree - want).abs().max())
                found[f"{size} ring {name} {dtype}"] = float((ring - want).abs().max())
                if begin == end:
                    ring_attention(queries[:, :1], torch.tensor([0]), *mine, scoring, group)
                    continue
                own = ring_attention(queries[:, part], torch.arange(begin, end), *mine, scoring, group)
                want = one(queries[:, part], torch.arange(begin, end), keys, values, scoring)
                found[f"{size} ring of a prompt {name} {dtype}"] = float((own - want).abs().max())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_tree_and_ring_are_the_attention_of_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=4)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    assert {len(each) for each in found[:2]} == {2 * 2 * 4 * 3 - 8, 2 * 2 * 4 * 3} and found[2]
    assert max(error for each in found for error in each.values()) < 1e-5


def test_a_tree_sends_the_same_however_long_the_text_is() -> None:
    assert tree_numbers(32, 1, 128) == 32 * 130
    assert ring_numbers(8, 32768, 4, 128, 128) == 3 * 8 * 32768 * 256
