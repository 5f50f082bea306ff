"""The kernels that build a compressed cache do what their references do: to the bit, in any shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench_kernels import building, unpack
from workbench_kernels.kept import Kept
from workbench_kernels.rows import Axis

pytestmark = interpreted


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(heads: int, tokens: int, share: float = 0.4, seed: int = 0) -> Tensor:
    return torch.rand(heads, tokens, generator=torch.Generator().manual_seed(seed)) < share


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("tokens", [1, 300, 5000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_kept_is_listed_head_after_head(tokens: int, share: float) -> None:
    from workbench_kernels.gpu import building as gpu

    keep = some(3, tokens, share)
    keep[1] = False  # a head with nothing
    found, wanted = gpu.kept(keep), building.kept.reference(keep)
    assert same(found[:5], wanted[:5]) and found.tokens == wanted.tokens == tokens
    for head in range(3):
        begin, length = int(found.starts[head]), int(found.lengths[head])
        assert found.places[begin : begin + length].tolist() == keep[head].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("widths", [(128, 64), (96, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_gathered_from_where_they_stand(widths: tuple[int, int], dtype: torch.dtype) -> None:
    from workbench_kernels.gpu import building as gpu

    keep = some(3, 200)
    whole = building.kept.reference(keep)
    xs = [numbers(200, 3, width, seed=width).to(dtype).transpose(0, 1) for width in widths]  # heads side by side
    few = torch.tensor([7, 0, 1000])
    parts = (whole, whole.first(few), whole.after(few))
    for chosen in parts:
        found = gpu.gather(xs, chosen, torch.float32)
        assert same(found, building.gather.reference(xs, chosen, torch.float32))
    assert same(gpu.gather(xs, whole, torch.float32), tuple(x[keep].float() for x in xs))
    assert parts[1].total + parts[2].total == whole.total


SHAPES = [(128, 64), (96, 64), (100, 48), (37, 37)]


def both_ways(
    x: Tensor, bits: int, group: int, axis: Axis, chosen: Kept | None = None, balance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Assert that kernel and reference store the same; what they store."""
    from workbench_kernels.gpu import building as gpu

    wanted = building.quantise_rows.reference(x, bits, group, axis, chosen=chosen, balance=balance)
    found = gpu.quantise_rows(x, bits, group, axis, chosen=chosen, balance=balance)
    assert same(found, wanted)
    return wanted


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_codes_scales_and_zeros_equal_the_reference_to_the_bit(axis: Axis, bits: int, width: int, group: int) -> None:
    from workbench_kernels.gpu import building as gpu

    x = numbers(2, 3 * group, width, seed=bits, dtype=torch.bfloat16)
    x[:, :, 0] = 1.5  # a channel without a range
    chosen = building.kept.reference(some(2, 3 * group, 0.6))
    if axis == "channel":
        chosen = chosen.first(chosen.counts // group * group)
    balance = numbers(2, width, seed=3).abs().add(0.5).half()
    both_ways(x, bits, group, axis)
    both_ways(x, bits, group, axis, chosen)
    stored = both_ways(x, bits, group, axis, chosen, balance)
    owners = chosen.entries()[0]
    for dtype in (torch.float32, torch.float16):  # the interpreter cuts off what bfloat16 would round
        for factors, heads in ((None, None), (balance, owners)):
            found = gpu.dequantise_rows(*stored, bits, group, axis, width, dtype, balance=factors, owners=heads)
            wanted = building.dequantise_rows.reference(
                *stored, bits, group, axis, width, dtype, balance=factors, owners=heads
            )
            assert same((found,), (wanted,))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_numbers_in_the_middle_of_two_levels_go_to_the_even_one(axis: Axis) -> None:
    # From 0 to 15 in halves: the step is 1, and every second number is a tie.
    steps = torch.arange(0, 15.5, 0.5).repeat(64, 3)[:, :64]
    steps[:, 0], steps[:, -1] = 0.0, 15.0
    x = steps if axis == "token" else steps.T
    codes, scale, zero = both_ways(x[None].contiguous(), 4, 64, axis)
    assert bool((scale == 1).all()) and bool((zero == 0).all())
    assert torch.equal(unpack(codes, 4, 64), x.round().to(torch.uint8))


def test_a_range_beyond_float16_gives_the_lowest_level() -> None:
    x = torch.tensor([[-6e4, 0.0, 6e4, 1.2e5] * 16])[None]
    codes, scale, _ = both_ways(x, 1, 64, "token")
    assert bool(scale.isinf().all()) and not codes.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "count"), [(128, 38), (96, 96), (37, 5), (5, 1), (64, 0)])
def test_sparse_rows_hold_exactly_the_largest_and_expand_again(dtype: torch.dtype, width: int, count: int) -> None:
    from workbench_kernels.gpu import building as gpu

    x = numbers(2, 50, width, seed=width).to(dtype)
    x[:, :, ::3] = 0
    x[:, 7] = -1.0  # a row of ties
    chosen = building.kept.reference(some(2, 50))
    held, bitmap = gpu.sparse_rows(x, count, dtype, chosen=chosen)
    bits = unpack(bitmap, 1, width)
    rows = x[chosen.entries()]
    assert bool((bits.sum(dim=1) == count).all())
    nbytes = -(-width // 8)
    order = [c for byte in range(nbytes) for c in range(byte, width, nbytes)]  # of the bits, byte after byte
    assert torch.equal(held, rows[:, order][bits[:, order].bool()].view(len(rows), count))
    smallest_held = rows.abs().float().masked_fill(bits == 0, torch.inf).amin(dim=1)
    largest_lost = rows.abs().float().masked_fill(bits == 1, -torch.inf).amax(dim=1)
    assert bool((smallest_held >= largest_lost).all())
    if count:
        expanded = gpu.expand_rows(held, bitmap, width, torch.float32)
        assert torch.equal(expanded, building.expand_rows.reference(held, bitmap, width, torch.float32))
        assert torch.equal(expanded, rows.float() * bits)


def test_ties_go_to_the_first_channels() -> None:
    from workbench_kernels.gpu import building as gpu

    x = torch.tensor([[[1.0, -1.0, 2.0, 1.0, 0.0, 1.0]]])
    held, bitmap = gpu.sparse_rows(x, 3, torch.float32)
    assert held.tolist() == [[1.0, -1.0, 2.0]] and unpack(bitmap, 1, 6).tolist() == [[1, 1, 1, 0, 0, 0]]


def test_input_that_does_not_fit_is_refused() -> None:
    x = numbers(2, 30, 16)
    with pytest.raises(ValueError, match="multiple of 32 rows"):
        building.quantise_rows(x, 4, 32, "channel")
    with pytest.raises(ValueError, match="choose 1, 2, 4 or 8"):
        building.quantise_rows(x, 3, 32, "token")
    with pytest.raises(ValueError, match="give 0 to 16"):
        building.sparse_rows(x, 17, torch.float32)
    with pytest.raises(ValueError, match="bool"):
        building.kept(torch.zeros(3))
