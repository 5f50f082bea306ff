"""Attention over sparse rows: the reference against expanded rows, the kernel under the interpreter against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench_kernels.building import expand_rows, sparse_rows
from workbench_kernels.decode_bitmap import decode_bitmap
from workbench_kernels.rows import Ragged, SparseRows
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state


def ragged(data: Tensor, lengths: list[int]) -> Ragged:
    counts = torch.tensor(lengths, dtype=torch.int32)
    return Ragged(data, (counts.cumsum(0) - counts).to(torch.int32), counts, max(lengths))


def side(lengths: list[int], tails: list[int], width: int, count: int, seed: int) -> tuple[SparseRows, list[Tensor]]:
    """Rows of random numbers, and what each head's stand for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, sum(lengths), width, generator=generator).half()
    tail = torch.randn(sum(tails), width, generator=generator).half()
    numbers, bitmap = sparse_rows.reference(x, count, torch.float16)
    front = expand_rows.reference(numbers, bitmap, width, torch.float16)
    heads = [torch.cat(both) for both in zip(front.split(lengths), tail.split(tails), strict=True)]
    return SparseRows(ragged(numbers, lengths), ragged(bitmap, lengths), ragged(tail, tails)), heads


CASES = [
    # front and tail of each head, width, numbers, value width, numbers, queries, query heads a KV head, softcap, masked
    ([70, 5], [9, 0], 128, 39, 128, 39, 1, 4, None, False),
    ([33, 0], [0, 18], 64, 20, 96, 30, 1, 3, None, False),
    ([40, 21], [6, 3], 64, 20, 64, 20, 3, 1, 5.0, True),
    ([20], [0], 256, 10, 37, 37, 1, 8, None, False),
    ([12, 9], [3, 0], 16, 5, 16, 5, 1, 2, None, False),
]


@interpreted
@pytest.mark.parametrize("config", [(4, 16, 3), (2, 16, 5)])
@pytest.mark.parametrize("case", CASES)
def test_kernel_and_reference_attend_over_what_the_rows_stand_for(case: tuple, config: tuple) -> None:
    from workbench_kernels.gpu.bitmap import Config
    from workbench_kernels.gpu.bitmap import decode_bitmap as kernel

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
    scoring, options = Scoring(width**-0.5, softcap=softcap), {"query_positions": asked, "positions": positions}
    wanted = []
    for head, (k, v) in enumerate(zip(key, value, strict=True)):
        seen = torch.ones(1, queries, len(k), dtype=torch.bool)
        if asked is not None:
            seen = (2 * torch.arange(len(k)) <= asked[:, None])[None]
        part = query[head * group : (head + 1) * group].double()
        wanted.append(attention_state(part, k[None], v[None], seen, scoring))
    out, sums = (torch.cat(both) for both in zip(*wanted, strict=True))
    for found in (
        decode_bitmap.reference(query, keys, values, scoring, lse=True, **options),
        kernel(query, keys, values, scoring, lse=True, config=Config(*config), **options),
    ):
        torch.testing.assert_close(found[0].double(), out, atol=3e-3, rtol=3e-3)
        torch.testing.assert_close(found[1].double(), sums, atol=3e-3, rtol=1e-3)


def executed(code: str, inputs: list[int], outputs: int, memory: dict[int, int], width: int) -> list[int]:
    """What a few instructions of PTX leave in their outputs, from words of `width` bytes; others are rubbish."""
    held = {f"${outputs + i}": value for i, value in enumerate(inputs)} | {"room": 4096}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0) if name[0].isdigit() else 0x7FC17FC1

    def prmt(a: int, b: int, selector: int) -> int:
        pool, out = (a | b << 32).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = selector >> (4 * i) & 15
            byte = pool[nibble & 7]
            out |= (255 * (byte >> 7) if nibble & 8 else byte) << (8 * i)
        return out

    def dot(a: int, b: int, c: int) -> int:
        return c + sum((a >> (8 * i) & 255) * (b >> (8 * i) & 255) for i in range(4))

    does = {
        "mov": lambda a: a,
        "and": lambda a, b: a & b,
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "shl": lambda a, b: a << b,
        "shr": lambda a, b: a >> b,
        "setp": lambda a, b: int(a != b),
        "prmt": prmt,
        "dp4a": dot,
    }
    for line in code.strip("{} ").split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        if words[0].startswith("@") and not held[words.pop(0)[1:]]:
            continue
        name, to, *others = words
        if name.startswith("ld.shared"):
            place = held[others[0].strip("[]")] - 4096
            assert place % width == 0
            held[to] = memory.get(place // width, 0x7FC17FC1 & ((1 << 8 * width) - 1))
        else:
            held[to] = does[name.split(".")[0]](*map(value, others)) & 0xFFFFFFFF
    return [held[f"${i}"] for i in range(outputs)]


def windows() -> tuple[list[int], dict[int, int]]:
    """Numbers, and what shared memory holds of them: word r numbers r - 1 and r."""
    numbers = list(range(1, 200))
    return numbers, {r: (numbers[r - 1] if r else 0x7FC1) | numbers[r] << 16 for r in range(len(numbers))}


def unrolled(numbers: list[int], bits: int, unit: int, place: int) -> list[int]:
    """A unit's channels, bit by bit, whose numbers begin at `place`."""
    out = []
    for i in range(bits):
        out.append(numbers[place] if unit >> i & 1 else 0)
        place += unit >> i & 1
    return out


@interpreted
@pytest.mark.parametrize("bits", [8, 16])
def test_instructions_for_values_unroll_units_from_shared_memory(bits: int) -> None:
    from workbench_kernels.gpu import bitmap_code

    units = 32 // bits
    code = bitmap_code.window_code(bits)
    numbers, memory = windows()
    generator = torch.Generator().manual_seed(bits)
    for _ in range(60):
        some = torch.randint(1 << bits, (units,), generator=generator).tolist()
        first = torch.randint(150, (units,), generator=generator).tolist()
        rubbish = [unit | 0xABC << bits for unit in some]  # above the unit
        out = executed(code, [*rubbish, *(4 * i for i in first)], bits * units // 2, memory, 4)
        for unit in range(units):
            got = [out[i * (units // 2) + unit // 2] >> (16 * (unit % 2)) & 0xFFFF for i in range(bits)]
            assert got == unrolled(numbers, bits, some[unit], first[unit])


@interpreted
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_instructions_for_keys_unroll_a_unit_from_shared_memory(bits: int) -> None:
    from workbench_kernels.gpu import bitmap_code

    code = bitmap_code.window_code(bits, True)
    numbers, memory = windows()
    generator = torch.Generator().manual_seed(bits)
    for _ in range(60):
        unit, first = (int(torch.randint(many, (1,), generator=generator)) for many in (1 << bits, 150))
        whole = (unit | 0xABC << bits) & 0xFFFFFFFF  # rubbish above the unit
        out = executed(code, [whole] * 4 + [4 * first] * 4 + [0, 1, 2, 3], bits // 2, memory, 4)
        assert [word >> half & 0xFFFF for word in out for half in (0, 16)] == unrolled(numbers, bits, unit, first)
