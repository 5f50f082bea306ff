"""Integers around zero with a small scale a group, and queries that meet keys held so."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged


def symmetric(x: Tensor, bits: int, group: int, scales: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers x [..., d] as integers of `bits` bits, float32 [..., d], with a scale for each `group` channels (the last
    may be narrower), [..., ceil(d / g)] of the type `scales`: rounded before the integers are chosen.
    """
    most = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scale = (padded.abs().amax(dim=-1) / most).to(scales)
    divisor = torch.where(scale.float() > 0, scale.float(), 1.0)
    return (x / spread(divisor, group, x.shape[-1])).round_().clamp_(-most - 1, most), scale


def spread(scale: Tensor, group: int, channels: int) -> Tensor:
    """Each row's scales [..., groups] for every channel, [..., d] (or [..., 1] where one serves all)."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(group, dim=-1)[..., :channels]


def rounded_to_fp8(x: Tensor) -> Tensor:
    """x [..., d] rounded to FP8 (e4m3) with a scale for each last dimension, its largest magnitude / 448."""
    most = torch.finfo(torch.float8_e4m3fn).max
    scale = x.abs().amax(dim=-1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).clamp(-most, most).to(torch.float8_e4m3fn).float() * scale


def _takes_query(query: Tensor, factors: Tensor) -> bool:
    return on_gpu(query, factors)


@with_kernel("gpu.symmetric:smoothed_query", when=_takes_query)
def smoothed_query(query: Tensor, factors: Tensor, fp8: bool) -> Tensor:
    """Queries [h, q, d] for keys multiplied with factors [k, d]: divided by them, and rounded to FP8, each with
    a scale of its own if asked for; in their own dtype.
    """
    groups = query.shape[0] // factors.shape[0]
    asked = query.float() / factors.float().repeat_interleave(groups, dim=0)[:, None]
    return (rounded_to_fp8(asked) if fp8 else asked).to(query.dtype)


def _takes_rows(keys: Ragged, values: Ragged) -> bool:
    return on_gpu(keys.data, values.data)


@with_kernel("gpu.symmetric:round_newest", when=_takes_rows)
def round_newest(
    keys: Ragged,
    values: Ragged,
    key_factors: Tensor,
    value_factors: Tensor,
    bits: int,
    group: int,
    scales: torch.dtype,
    into_keys: Tensor,
    into_values: Tensor,
) -> None:
    """Write what `symmetric` leaves of each head's last row of keys [t, d] and values [t, dv], times factors float16
    [k, d] and [k, 1], to the same row of `into_keys`, where keys keep the factors, and `into_values`, where values lose
    theirs. Each head has a row.
    """
    for rows, factors, into, kept in (
        (keys, key_factors, into_keys, True),
        (values, value_factors, into_values, False),
    ):
        at = rows.starts.long() + rows.lengths.long() - 1
        codes, scale = symmetric(rows.data[at].float() * factors.float(), bits, group, scales)
        found = codes * spread(scale.float(), group, codes.shape[-1])
        into[at] = (found if kept else found / factors.float()).to(into.dtype)
