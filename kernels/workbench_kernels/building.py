"""Building a compressed cache: kept rows gathered, quantised and packed, or made sparse, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.kept import Kept
from workbench_kernels.limits import FLOATS, WIDEST_GROUP, WIDEST_ROW
from workbench_kernels.packing import dequantise, pack, quantise, unpack
from workbench_kernels.rows import Axis

_COPIED = (*FLOATS, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_marks(keep: Tensor) -> None:
    if keep.ndim != 2 or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool [k, n], not {list(keep.shape)} ({keep.dtype})")


def _takes_marks(keep: Tensor) -> bool:
    return on_gpu(keep) and keep.numel() > 0


@with_kernel("gpu.building:kept", when=_takes_marks, check=_check_marks)
def kept(keep: Tensor) -> Kept:
    """What keep [k, n] bool marks. On a GPU this waits once, for the k lengths: sizes of results depend on them."""
    lengths = keep.sum(dim=1)
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    places = keep.nonzero()[:, 1].to(torch.int32)
    return Kept(places, starts, starts, lengths.to(torch.int32), lengths.cpu(), keep.shape[1])


def _takes_copies(xs: Sequence[Tensor], chosen: Kept, dtype: torch.dtype) -> bool:
    return on_gpu(*xs, chosen.places) and dtype in _COPIED and all(x.dtype in _COPIED for x in xs)


@with_kernel("gpu.building:gather", when=_takes_copies)
def gather(xs: Sequence[Tensor], chosen: Kept, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The chosen rows of each x [k, n, d], as `dtype`, one head after another: [t, d] each. Widths may differ."""
    index = chosen.entries()
    return tuple(x[index].to(dtype) for x in xs)


def _check_groups(x: Tensor, bits: int, group: int, axis: Axis, chosen: Kept | None) -> None:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits is {bits}: choose 1, 2, 4 or 8")
    if axis == "channel":
        uneven = x.shape[1] % group if chosen is None else int((chosen.counts % group).any())
        if uneven:
            raise ValueError(f"groups of {group} rows: each head must have a multiple of {group} rows")


def _takes_rows(x: Tensor, group: int, axis: Axis, balance: Tensor | None) -> bool:
    return on_gpu(x, balance) and x.dtype in FLOATS and _fits(x.shape[2], group, axis)


def _fits(channels: int, group: int, axis: Axis) -> bool:
    return channels <= WIDEST_ROW and (axis == "token" or group <= WIDEST_GROUP)


@with_kernel("gpu.building:quantise_rows", when=_takes_rows, check=_check_groups)
def quantise_rows(
    x: Tensor,
    bits: int,
    group: int,
    axis: Axis,
    *,
    chosen: Kept | None = None,
    balance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise and pack the chosen rows of x [k, n, d], all of them by default, one head after another.

    axis "channel": every channel has a scale and zero per `group` consecutive rows of a head, of which each head must
    have a multiple of `group`. axis "token": every row has a scale and zero per `group` channels, the last group of a
    row may be narrower. balance [k, d]: what each head's channels are multiplied with before.
    Returns codes uint8 [t, ceil(d * bits / 8)] as `pack` lays them out, scale and zero float16 [t / group, d]
    (channel) or [t, ceil(d / group)] (token): on any device the same as `quantise` and `pack` on a CPU, to the bit.
    """
    heads, tokens, channels = x.shape
    if chosen is None:
        rows = x.reshape(-1, channels).float()
        owners = torch.arange(heads, device=x.device).repeat_interleave(tokens)
    else:
        owners, places = chosen.entries()
        rows = x[owners, places].float()
    if balance is not None:
        rows = rows * balance.float()[owners]
    if axis == "channel":
        codes, scale, zero = quantise(rows.unflatten(0, (-1, group)).transpose(1, 2), bits)  # of [t / g, d, g]
        return pack(codes.transpose(1, 2).flatten(0, 1).contiguous(), bits), scale, zero
    missing = -channels % group
    if missing:  # a narrower last group repeats its last channel, which changes neither minimum nor maximum
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    codes, scale, zero = quantise(rows.unflatten(1, (-1, group)), bits)
    return pack(codes.flatten(1)[:, :channels].contiguous(), bits), scale, zero


def _takes_codes(
    codes: Tensor, scale: Tensor, group: int, axis: Axis, channels: int, dtype: torch.dtype, balance: Tensor | None,
    owners: Tensor | None,
) -> bool:  # fmt: skip
    return on_gpu(codes, scale, balance, owners) and dtype in FLOATS and _fits(channels, group, axis)


@with_kernel("gpu.building:dequantise_rows", when=_takes_codes)
def dequantise_rows(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group: int,
    axis: Axis,
    channels: int,
    dtype: torch.dtype,
    *,
    balance: Tensor | None = None,
    owners: Tensor | None = None,
) -> Tensor:
    """What `quantise_rows` stored, [t, channels] as `dtype`.

    balance [k, channels] with owners int64 [t], each row's head: undo the factors it was multiplied with.
    """
    levels = unpack(codes, bits, channels)
    if axis == "channel":
        grouped = levels.unflatten(0, (-1, group)).transpose(1, 2)  # [t / g, d, g]
        x = dequantise(grouped, scale, zero, torch.float32).transpose(1, 2).flatten(0, 1)
    else:
        padded = torch.nn.functional.pad(levels, (0, -channels % group)).unflatten(1, (-1, group))
        x = dequantise(padded, scale, zero, torch.float32).flatten(1)[:, :channels]
    if balance is not None:
        assert owners is not None, "balance needs the owner of each row"
        x = x / balance.float()[owners]
    return x.to(dtype)


def _check_count(x: Tensor, count: int) -> None:
    if not 0 <= count <= x.shape[2]:
        raise ValueError(f"{count} numbers of rows of {x.shape[2]}: give 0 to {x.shape[2]}")


def _takes_numbers(x: Tensor, dtype: torch.dtype) -> bool:
    return on_gpu(x) and x.dtype in FLOATS and dtype in FLOATS and x.shape[2] <= WIDEST_ROW


@with_kernel("gpu.building:sparse_rows", when=_takes_numbers, check=_check_count)
def sparse_rows(x: Tensor, count: int, dtype: torch.dtype, *, chosen: Kept | None = None) -> tuple[Tensor, Tensor]:
    """The `count` largest magnitudes of the chosen rows of x [k, n, d], all of them by default, head after head.

    Returns numbers [t, count], as `dtype`, and their bitmap uint8 [t, b], b = ceil(d / 8), packed as one-bit codes:
    byte j has the channels j, j + b and so on. Numbers are in the order of their bits, byte after byte. Exactly `count`
    bits of a row are set, zeros included; among equal magnitudes the kernel takes the first channels, the reference
    whichever torch.topk finds.
    """
    rows = x.reshape(-1, x.shape[2]) if chosen is None else x[chosen.entries()]
    largest = rows.abs().topk(count, dim=-1, sorted=False).indices
    bits = torch.zeros(rows.shape, dtype=torch.bool, device=x.device).scatter_(-1, largest, True)
    order = _bit_order(x.shape[2], x.device)
    return rows[:, order][bits[:, order]].view(len(rows), count).to(dtype), pack(bits.to(torch.uint8), 1)


def _bit_order(width: int, device: torch.device) -> Tensor:
    """The channels in the order of their bits in a row's bitmap, int64 [width]."""
    order = torch.arange(-(-width // 8) * 8, device=device).view(8, -1).t().flatten()
    return order[(order >= width).to(torch.uint8).argsort(stable=True)[:width]]  # no mask: a GPU would be waited for


def _takes_bitmap(numbers: Tensor, bitmap: Tensor, width: int, dtype: torch.dtype) -> bool:
    return on_gpu(numbers, bitmap) and numbers.dtype in FLOATS and dtype in FLOATS and width <= WIDEST_ROW


@with_kernel("gpu.building:expand_rows", when=_takes_bitmap)
def expand_rows(numbers: Tensor, bitmap: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """What `sparse_rows` stored, [t, width] as `dtype`, zeros where nothing is held."""
    order = _bit_order(width, numbers.device)
    bits = unpack(bitmap, 1, width).bool()[:, order]
    # A number's place in its row is how many bits are set before its own.
    place = (bits.cumsum(dim=1) - 1).clamp_(0, numbers.shape[1] - 1)
    out = torch.empty(bits.shape, dtype=dtype, device=numbers.device)
    out[:, order] = numbers.to(dtype).gather(1, place).masked_fill_(~bits, 0)
    return out
