"""Attention over sparse rows: the reference against expanded rows, the kernel under the interpreter against it."""

from __future__ import annotations

import pytest
import torch
from kernels_support import interpreted
from torch import Tensor

from workbench_kernels.building import expand_rows_reference, sparse_rows_reference
from workbench_kernels.decode import softmax_over
from workbench_kernels.decode_bitmap import decode_bitmap_reference
from workbench_kernels.rows import Ragged, SparseRows


def ragged(data: Tensor, lengths: list[int]) -> Ragged:
    counts = torch.tensor(lengths, dtype=torch.int32)
    return Ragged(data, (counts.cumsum(0) - counts).to(torch.int32), counts, max(lengths))


def side(lengths: list[int], tails: list[int], width: int, count: int, seed: int) -> tuple[SparseRows, list[Tensor]]:
    """Rows of random numbers, and what each head's stand for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, sum(lengths), width, generator=generator).half()
    tail = torch.randn(sum(tails), width, generator=generator).half()
    numbers, bitmap = sparse_rows_reference(x, count, torch.float16)
    front = expand_rows_reference(numbers, bitmap, width, torch.float16)
    heads = [torch.cat(both) for both in zip(front.split(lengths), tail.split(tails), strict=True)]
    return SparseRows(ragged(numbers, lengths), ragged(bitmap, lengths), ragged(tail, tails)), heads


CASES = [
    # front and tail of each head, width, numbers, value width, numbers, queries, query heads a KV head, softcap, masked
    ([70, 5], [9, 0], 128, 39, 128, 39, 1, 4, None, False),
    ([33, 0], [0, 18], 64, 20, 96, 30, 1, 3, None, False),
    ([40, 21], [6, 3], 64, 20, 64, 20, 3, 1, 5.0, True),
    ([20], [0], 256, 10, 37, 37, 1, 8, None, False),
]


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_kernel_and_reference_attend_over_what_the_rows_stand_for(case: tuple) -> None:
    from workbench_kernels.gpu.bitmap import decode_bitmap

    lengths, tails, width, count, value_width, value_count, queries, group, softcap, masked = case
    keys, key = side(lengths, tails, width, count, 1)
    values, value = side(lengths, tails, value_width, value_count, 2)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(len(lengths) * group, queries, width, generator=generator).half()
    every = [front + tail for front, tail in zip(lengths, tails, strict=True)]
    asked = positions = None
    if masked:
        asked = torch.tensor([2 * max(every) - 9 * (queries - i) for i in range(queries)])
        placed = torch.cat([2 * torch.arange(count, dtype=torch.int32) for count in every])
        positions = ragged(placed[:, None], every)
    options = {"scale": width**-0.5, "softcap": softcap, "query_positions": asked, "positions": positions}
    wanted = []
    for head, (k, v) in enumerate(zip(key, value, strict=True)):
        seen = torch.ones(1, queries, len(k), dtype=torch.bool)
        if asked is not None:
            seen = (2 * torch.arange(len(k)) <= asked[:, None])[None]
        part = query[head * group : (head + 1) * group].double()
        wanted.append(softmax_over(part, k[None], v[None], seen, scale=width**-0.5, softcap=softcap))
    out, sums = (torch.cat(both) for both in zip(*wanted, strict=True))
    for found in (
        decode_bitmap_reference(query, keys, values, **options),
        decode_bitmap(query, keys, values, lse=True, **options),
    ):
        torch.testing.assert_close(found[0].double(), out, atol=3e-3, rtol=3e-3)
        torch.testing.assert_close(found[1].double(), sums, atol=3e-3, rtol=1e-3)
