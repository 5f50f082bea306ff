"""Packed rows in the ways that settled parts of a cache hold them, by the kernel and by its reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from tests.kernels.test_decode import KIND, error, rows_of
from workbench_kernels.decode import decode_packed
from workbench_kernels.packing import pack, quantise
from workbench_kernels.rows import PackedRows, Ragged
from workbench_kernels.scoring import Scoring

pytestmark = interpreted
WHOLE_STRETCH = 1 << 20


def heads_of(lengths: list[int], width: int, seed: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=made) * torch.rand(width, generator=made).add(0.1) for n in lengths]


def no_tail(heads: int, width: int) -> Ragged:
    nothing = torch.zeros(heads, dtype=torch.int32)
    return Ragged(torch.empty(0, width, dtype=KIND), nothing, nothing, 0)


def by_channel(heads: list[Tensor], bits: int) -> PackedRows:
    """Each channel of a head has one scale and zero."""
    found = [quantise(x.T if len(x) else x.new_zeros(x.shape[1], 1), bits) for x in heads]
    codes = [pack(one[0].T[: len(x)].contiguous(), bits) for one, x in zip(found, heads, strict=True)]
    scale, zero = (rows_of([one[which][None] for one in found]) for which in (1, 2))
    return PackedRows(
        rows_of(codes), scale, zero, no_tail(len(heads), heads[0].shape[1]), bits, WHOLE_STRETCH, "channel"
    )


def by_token(heads: list[Tensor], bits: int, group: int, balance: Tensor | None = None) -> PackedRows:
    codes, scales, zeros = [], [], []
    for head, x in enumerate(heads):
        balanced = x if balance is None else x * balance[head].float()
        found, scale, zero = quantise(balanced.unflatten(1, (-1, group)), bits)
        codes.append(pack(found.flatten(1), bits))
        scales.append(scale)
        zeros.append(zero)
    parts = (rows_of(x) for x in (codes, scales, zeros))
    return PackedRows(*parts, no_tail(len(heads), heads[0].shape[1]), bits, group, "token", balance)


def around_the_middle(heads: list[Tensor], bits: int, group: int, scales: torch.dtype) -> PackedRows:
    codes, sizes = [], []
    for x in heads:
        grouped = x.unflatten(1, (-1, group))
        scale = (grouped.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)).to(scales)
        found = (grouped / scale.float()[..., None]).round().add(2 ** (bits - 1)).clamp(0, 2**bits - 1)
        codes.append(pack(found.to(torch.uint8).flatten(1), bits))
        sizes.append(scale.view(torch.uint8) if scales.itemsize == 1 else scale)
    scale = rows_of(sizes)
    scale = scale._replace(data=scale.data.view(scales))
    return PackedRows(rows_of(codes), scale, None, no_tail(len(heads), heads[0].shape[1]), bits, group, "token")


LENGTHS = [205, 0, 70]


def sides(how: str, width: int) -> tuple[PackedRows, PackedRows]:
    keys, values = heads_of(LENGTHS, width, 0), heads_of(LENGTHS, width, 1)
    if how == "channels of values divided":
        balance = torch.rand(len(LENGTHS), width, generator=torch.Generator().manual_seed(3)).add(0.5).half()
        return by_channel(keys, 4), by_token(values, 2, width, balance)
    if how.startswith("one bit"):
        return by_channel(keys, 1), by_channel(values, 1)
    if how == "two bits a channel":
        return by_channel(keys, 2), by_channel(values, 2)
    bits, scales = (4, torch.float8_e4m3fn) if how == "middle, FP8" else (8, torch.bfloat16)
    if how == "middle, float16, 4 bits":
        bits, scales = 4, torch.float16
    return around_the_middle(keys, bits, width, scales), around_the_middle(values, bits, width // 2, scales)


EVERY = [
    "channels of values divided", "one bit a channel", "two bits a channel", "middle, FP8", "middle, bfloat16",
    "middle, float16, 4 bits",
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "width"), [*((how, 64) for how in EVERY), (EVERY[0], 128), (EVERY[1], 128), (EVERY[3], 128), (EVERY[1], 48)]
)
def test_settled_rows_equal_their_reference(how: str, width: int) -> None:
    from workbench_kernels.gpu.packed import decode_packed as kernel

    keys, values = sides(how, width)
    query = torch.randn(4 * len(LENGTHS), 1, width, generator=torch.Generator().manual_seed(5)).to(KIND)
    for softcap in (None, 5.0) if width == 64 else (None,):
        scoring = Scoring(width**-0.5, softcap=softcap)
        out, lse = kernel(query, keys, values, scoring, lse=True)
        wanted, sums = decode_packed.reference(query.double(), keys, values, scoring, lse=True)
        assert error(out, wanted) < 2e-3
        torch.testing.assert_close(lse.double(), sums, atol=2e-3, rtol=0)
