"""Retrieval by a codebook: what is found are the tokens with the highest scores, by kernels as by sorting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench_kernels.codebook import codebook_scores, codebook_top
from workbench_kernels.rows import Ragged

CASES: list[dict[str, Any]] = [
    {},
    {"entries": 5, "wanted": 20},
    {"lengths": [700, 3, 0], "wanted": 40},
    {"lengths": [300], "entries": 300, "wanted": 1, "group": 4},
    {"group": 3, "queries": 4, "lengths": [513, 512], "wanted": 100},
    {"lengths": [90, 60], "wanted": 500},
    {"equal": True, "wanted": 33, "lengths": [200, 257]},
]


def case(
    lengths: list[int] | None = None,
    entries: int = 64,
    group: int = 2,
    queries: int = 1,
    wanted: int = 25,
    equal: bool = False,
) -> tuple[Tensor, Ragged, int, int]:
    lengths = lengths or [400, 333]
    draw = torch.Generator().manual_seed(entries + sum(lengths))
    table = torch.randn(len(lengths), group * queries, entries, generator=draw)
    if equal:  # several entries share a score, and some have none at all
        table = (table * 2).round()
        table[0, 0, 3] = -torch.inf
    dtype = torch.uint8 if entries <= 256 else torch.int16
    codes = torch.randint(0, entries, (sum(lengths) + 7 * len(lengths), 1), generator=draw).to(dtype)
    starts = (torch.tensor([0, *lengths[:-1]]).cumsum(0) + 7 * torch.arange(len(lengths))).int()
    return table, Ragged(codes, starts, torch.tensor(lengths, dtype=torch.int32), max(lengths)), wanted, queries


@pytest.mark.parametrize("given", CASES, ids=str)
def test_the_highest_scores_are_found(given: dict[str, Any]) -> None:
    table, codes, wanted, queries = case(**given)
    slots, counts = codebook_top.reference(table, codes, wanted, queries)
    scores = codebook_scores(table, codes)
    heads, rows, _ = table.shape
    for head in range(heads):
        length = int(codes.lengths[head])
        start = int(codes.starts[head])
        own = codes.data[start : start + length, 0].long()
        for query in range(queries):
            found = slots[head, query][counts[head, query]].tolist()
            assert found == sorted(set(found)) and all(slot < length for slot in found)
            expected = set()
            for row in range(query, rows, queries):
                assert torch.equal(scores[head, row, :length], table[head, row][own])
                order = sorted(range(length), key=lambda slot, row=row: (-float(table[head, row, own[slot]]), slot))
                best = [slot for slot in order[:wanted] if table[head, row, own[slot]] > -torch.inf]
                expected |= set(best)
            assert set(found) == expected


@interpreted
@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("block", [128, 1024])
def test_kernels_find_what_sorting_finds(given: dict[str, Any], block: int) -> None:
    from workbench_kernels.gpu.codebook import codebook_top as kernel

    table, codes, wanted, queries = case(**given)
    found = kernel(table, codes, wanted, queries, block=block)
    expected = codebook_top.reference(table, codes, wanted, queries)
    fewer = torch.tensor([max(wanted // 2, 1)], dtype=torch.int32)
    for mine, other, half in zip(
        kernel(table, codes, wanted, queries, fewer=fewer, block=block),
        codebook_top.reference(table, codes, wanted, queries, fewer=fewer),
        codebook_top.reference(table, codes, int(fewer), queries),
        strict=True,
    ):
        assert torch.equal(mine, other) and torch.equal(mine[..., : half.shape[2]], half)
    assert found[0].dtype == torch.int64 and found[1].dtype == torch.bool
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
