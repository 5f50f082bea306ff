"""Decode attention kernels against float64, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.support import interpreted
from workbench_kernels.decode import decode_dense, decode_packed
from workbench_kernels.packing import pack, quantise
from workbench_kernels.rows import PackedRows, Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state, merge_states

pytestmark = interpreted
KIND = torch.float16  # the interpreter has no bfloat16 products


def rows_of(parts: list[Tensor]) -> Ragged:
    """Heads one behind the other, with a few rows that belong to nobody at the end."""
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    spare = torch.full((3, parts[0].shape[1]), 255).to(parts[0].dtype)
    return Ragged(torch.cat([*parts, spare]).contiguous(), starts, lengths, int(lengths.max()))


def random_rows(lengths: list[int], width: int, seed: int = 0) -> Ragged:
    made = torch.Generator().manual_seed(seed)
    return rows_of([torch.randn(n, width, generator=made).to(KIND) for n in lengths])


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - wanted).norm() / wanted.norm())


def wanted_of(query, keys, values, query_positions=None, window=None, softcap=None, scale=None):
    rows, real = keys.padded()
    others, _ = values.padded()
    slots = max(rows.shape[1], others.shape[1])
    rows, others = (torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[1])) for x in (rows, others))
    seen = torch.nn.functional.pad(real, (0, slots - real.shape[1]))[:, None]
    if query_positions is not None:
        places = torch.arange(slots)
        seen = seen & (places <= query_positions[:, None])
        if window is not None:
            seen = seen & (places > query_positions[:, None] - window)
    scoring = Scoring(scale or query.shape[-1] ** -0.5, softcap=softcap)
    return attention_state(query.double(), rows, others, seen, scoring)


@pytest.mark.parametrize(
    ("lengths", "groups", "queries", "width", "value_width"),
    [
        ([50, 1, 200], 3, 1, 64, 64),
        ([70, 90], 4, 5, 96, 96),
        ([300], 8, 1, 128, 128),
        ([33, 64, 65, 129], 1, 2, 16, 24),
        ([40, 0, 7], 4, 1, 256, 256),
        ([100] * 3, 4, 12, 64, 64),
    ],
)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_dense_and_ragged_equal_float64(lengths, groups, queries, width, value_width, softcap):
    from workbench_kernels.gpu.dense import Config
    from workbench_kernels.gpu.dense import decode_dense as kernel

    keys, values = random_rows(lengths, width), random_rows(lengths, value_width, seed=1)
    query = torch.randn(len(lengths) * groups, queries, width, generator=torch.Generator().manual_seed(2)).to(KIND)
    scoring = Scoring(width**-0.5, softcap=softcap)
    out, lse = kernel(query, keys, values, scoring, lse=True, config=Config(2, 16, 2, 1))
    wanted, sums = wanted_of(query, keys, values, softcap=softcap)
    assert error(out, wanted) < 1e-3
    torch.testing.assert_close(lse.double(), sums, atol=1e-4, rtol=0)


def test_sinks_join_what_a_kernel_found():
    from workbench_kernels.gpu.dense import Config
    from workbench_kernels.gpu.dense import decode_dense as kernel

    keys, values = random_rows([50, 0, 90], 32), random_rows([50, 0, 90], 24, seed=1)
    query = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(2)).to(KIND)
    scoring = Scoring(0.2, sinks=torch.randn(6, generator=torch.Generator().manual_seed(3)))
    out, sums = kernel(query, keys, values, scoring, lse=True, config=Config(2, 16, 2, 1))
    wanted, whole = decode_dense.reference(query.double(), keys, values, scoring, lse=True)
    assert error(out, wanted) < 1e-3
    torch.testing.assert_close(sums.double(), whole, atol=1e-4, rtol=0)  # of a head that holds nothing: the sinks alone


@pytest.mark.parametrize("window", [None, 40])
def test_queries_see_positions_up_to_their_own(window):
    from workbench_kernels.gpu.dense import Config
    from workbench_kernels.gpu.dense import decode_dense as kernel

    keys, values = random_rows([100, 100], 32), random_rows([100, 100], 32, seed=1)
    query = torch.randn(8, 3, 32, generator=torch.Generator().manual_seed(2)).to(KIND)
    where = torch.tensor([97, 98, 99])
    scoring, config = Scoring(0.2, window), Config(2, 16, 2, 1)
    out, _ = kernel(query, keys, values, scoring, query_positions=where, config=config)
    wanted, _ = wanted_of(query, keys, values, where, window, scale=0.2)
    assert error(out, wanted) < 1e-3
    # The same rows with positions of their own: every second position.
    placed = rows_of([2 * torch.arange(100, dtype=torch.int32)[:, None]] * 2)
    out, _ = kernel(
        query, keys, values, Scoring(0.2, None if window is None else 2 * window), query_positions=2 * where,
        positions=placed, config=Config(2, 16, 2, 1),
    )  # fmt: skip
    assert error(out, wanted) < 1e-3


def packed_rows(
    rows: list[Tensor], front: list[int], bits: int, group: int, axis: str, balance: Tensor | None = None
) -> PackedRows:
    codes, scales, zeros, tails = [], [], [], []
    for head, (x, count) in enumerate(zip(rows, front, strict=True)):
        old, width = x[:count].float(), x.shape[1]
        if balance is not None:
            old = old * balance[head].float()
        if axis == "channel":
            found, scale, zero = quantise(old.unflatten(0, (-1, group)).transpose(1, 2), bits)
            found = found.transpose(1, 2).flatten(0, 1)
        else:
            missing = -width % group
            old = torch.cat([old, old[:, -1:].expand(-1, missing)], dim=1)
            found, scale, zero = quantise(old.unflatten(1, (-1, group)), bits)
            found = found.flatten(1)[:, :width]
        codes.append(pack(found.contiguous(), bits))
        scales.append(scale)
        zeros.append(zero)
        tails.append(x[count:])
    return PackedRows(*(rows_of(x) for x in (codes, scales, zeros, tails)), bits, group, axis, balance)


CASES = [  # lengths, key rows packed, value rows packed, groups, queries, width, bits, group, axis of keys
    ([200, 130], [128, 96], [150, 98], 3, 1, 64, 4, 32, "channel"),
    ([300, 140], [256, 128], [290, 137], 4, 1, 128, 2, 64, "channel"),
    ([333], [320], [320], 4, 3, 128, 4, 64, "channel"),
    ([256], [256], [256], 8, 1, 128, 8, 64, "channel"),
    ([256], [192], [192], 2, 1, 64, 2, 64, "channel"),
    ([100, 70], [100, 64], [90, 70], 1, 1, 64, 8, 32, "token"),
    ([200, 70], [200, 64], [200, 64], 4, 1, 128, 2, 64, "token"),
    # Shapes that words do not fit: number by number.
    ([100], [64], [64], 4, 1, 96, 4, 32, "channel"),
    ([40, 33], [40, 30], [40, 30], 2, 2, 16, 4, 8, "token"),
    ([70], [64], [60], 2, 1, 20, 1, 8, "channel"),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{c[6]} bits of {c[5]}, {c[8]} {c[7]}" for c in CASES])
@pytest.mark.parametrize("blocks", [1, 2])
def test_packed_equals_float64_of_what_it_stands_for(case, blocks):
    from workbench_kernels.gpu.packed import Config
    from workbench_kernels.gpu.packed import decode_packed as kernel

    lengths, key_front, value_front, groups, queries, width, bits, group, axis = case
    made = torch.Generator().manual_seed(0)
    rows = [[torch.randn(n, width, generator=made).to(KIND) * size for n in lengths] for size in (3, 1)]
    balance = (torch.rand(len(lengths), width, generator=made) + 0.5).half() if axis == "token" else None
    keys = packed_rows(rows[0], key_front, bits, group, axis, balance)
    values = packed_rows(rows[1], value_front, bits, group, "token")
    query = torch.randn(len(lengths) * groups, queries, width, generator=made).to(KIND)
    config = Config(2, 32, blocks, 2, 1)
    out, lse = kernel(query, keys, values, Scoring(width**-0.5), lse=True, config=config)
    wanted, sums = wanted_of(query, keys, values)
    assert error(out, wanted) < 2e-3
    torch.testing.assert_close(lse.double(), sums, atol=1e-2, rtol=0)
    where = torch.arange(max(lengths) - queries, max(lengths))
    capped, _ = kernel(query, keys, values, Scoring(0.2, softcap=20.0), query_positions=where, config=config)
    assert error(capped, wanted_of(query, keys, values, where, softcap=20.0, scale=0.2)[0]) < 2e-3


@pytest.mark.parametrize("pair", [(8, 4), (4, 8), (8, 2), (2, 4), (4, None), (None, 4)])
def test_keys_and_values_have_precisions_of_their_own(pair):
    # None: that side is not quantised at all.
    from workbench_kernels.gpu.packed import Config
    from workbench_kernels.gpu.packed import decode_packed as kernel

    lengths, width = [200, 70], 64
    made = torch.Generator().manual_seed(0)
    rows = [[torch.randn(n, width, generator=made).to(KIND) for n in lengths] for _ in pair]
    keys, values = (
        packed_rows(x, lengths if bits else [0, 0], bits or 8, width, "token")
        for x, bits in zip(rows, pair, strict=True)
    )
    query = torch.randn(6, 1, width, generator=made).to(KIND)
    out, _ = kernel(query, keys, values, Scoring(0.2), config=Config(2, 32, 1, 2, 1))
    assert error(out, wanted_of(query, keys, values, scale=0.2)[0]) < 2e-3


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any),
    groups=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_lengths_give_every_head_its_own_attention(lengths, groups, seed):
    from workbench_kernels.gpu.dense import Config
    from workbench_kernels.gpu.dense import decode_dense as kernel

    keys, values = random_rows(lengths, 16, seed), random_rows(lengths, 16, seed + 1)
    query = torch.randn(len(lengths) * groups, 1, 16, generator=torch.Generator().manual_seed(seed)).to(KIND)
    out, lse = kernel(query, keys, values, Scoring(0.3), lse=True, config=Config(2, 16, 1, 1))
    wanted, sums = wanted_of(query, keys, values, scale=0.3)
    torch.testing.assert_close(out.double(), wanted, atol=4e-3, rtol=0)
    assert torch.equal(lse.isinf(), sums.isinf())  # a head without entries gives zeros, and minus infinity


def test_parts_join_to_the_whole():
    keys, values = random_rows([90, 90], 32), random_rows([90, 90], 32, seed=1)
    query = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(2))
    whole, _ = decode_dense(query, keys, values, Scoring(0.2))
    front = [x._replace(lengths=torch.tensor([30, 0], dtype=torch.int32)) for x in (keys, values)]
    behind = [
        x._replace(starts=x.starts + front[0].lengths, lengths=x.lengths - front[0].lengths) for x in (keys, values)
    ]
    parts = [decode_dense(query, *held, Scoring(0.2), lse=True) for held in (front, behind)]
    torch.testing.assert_close(merge_states(parts), whole, atol=1e-5, rtol=1e-5)


def test_the_reference_is_what_tensors_in_host_memory_get():
    keys, values = random_rows([30, 12], 16), random_rows([30, 12], 16, seed=1)
    query = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(2)).to(KIND)
    out, _ = decode_dense(query, keys, values, Scoring(0.25))
    assert error(out, wanted_of(query, keys, values, scale=0.25)[0]) < 1e-3
    rows = [[torch.randn(40, 16).to(KIND)] * 2] * 2
    held = packed_rows(rows[0], [32, 32], 4, 16, "channel"), packed_rows(rows[1], [32, 32], 4, 16, "token")
    assert error(decode_packed(query, *held, Scoring(0.25))[0], wanted_of(query, *held, scale=0.25)[0]) < 1e-3
