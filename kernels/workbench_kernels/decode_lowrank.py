"""Decode attention over a cache held as coefficients in low-rank spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.decode import decode_dense
from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rotary import RotaryTable, rotate
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state


def decode_lowrank(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    value_basis: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    rotary: RotaryTable | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query [h, q, d] over keys and values that are given by coefficients; h = g * k.

    A key is its row of keys [t, rk] times key_basis [k, rk, d], a value its row of values [t, rv] times value_basis
    [k, rv, dv], all of one dtype. rotary: keys are then rotated to their positions, which are int32 [t, 1], or their
    number in their head. query_positions int [q]: queries see rows at positions up to their own; without, everything.
    Returns the output [h, q, dv] and, with `lse`, each query's log-sum-exp float32 [h, q].

    Without `rotary` queries are projected into the space ("Eigen Attention", Saxena et al. 2024, arXiv:2408.05646), so
    that only coefficients are read. With them each key leaves its space: 2 * rk * d operations a token and KV head for
    2 * (rk + rv) bytes of 16-bit numbers. That is d / 2 operations a byte where both ranks are alike, 64 for d = 128: a
    third of what an H200's matrix units do in the time that the bytes take, so that the memory still decides; it is
    bound by arithmetic for d of 256 and key ranks above about twice the value ranks. Values never leave theirs, but
    for their weighted sum.
    """
    if rotary is None:
        heads, count, width = query.shape
        projected = query.reshape(key_basis.shape[0], -1, width) @ key_basis.to(query.dtype).transpose(1, 2)
        out, sums = decode_dense(
            projected.reshape(heads, count, -1), keys, values, scoring, query_positions=query_positions,
            positions=positions, lse=lse,
        )  # fmt: skip
    else:
        out, sums = decode_rotated(
            query, keys, values, key_basis, rotary, scoring, query_positions=query_positions, positions=positions,
            lse=lse,
        )  # fmt: skip
    return _left(out, value_basis), sums


def _takes(query: Tensor, keys: Ragged, scoring: Scoring) -> bool:
    alike = query.dtype == keys.data.dtype and query.dtype.itemsize == 2
    return on_gpu(query, keys.data) and alike and scoring.window is None and scoring.in_kernels


@with_kernel("gpu.lowrank_decode:decode_rotated", when=_takes)
def decode_rotated(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    rotary: RotaryTable,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`decode_lowrank` with keys rotated to their positions; the output [h, q, rv] stays in the values' space.

    The reference has all keys out of their space, in float32, or float64 if the query is.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    coefficients, real = keys.padded()
    key = torch.where(real[..., None], coefficients.to(dtype), 0) @ key_basis.to(dtype)
    if positions is None:
        places = torch.arange(keys.longest, device=query.device)[None]
    else:
        places = positions.padded()[0][..., 0].long()
    cos, sin = (torch.cat([x, x], dim=-1).to(dtype) for x in rotary.at(places))
    order = rotary.order
    key = rotate(key if order is None else key[..., order], cos, sin)
    query = query if order is None else query[..., order]
    visible = real[:, None]
    if query_positions is not None:
        visible = visible & scoring.visible(query_positions.to(query.device), places)
    value = torch.where(real[..., None], values.padded()[0].to(dtype), 0)
    offsets = scoring.offsets(places if query_positions is None else query_positions, places)
    out, sums = attention_state(query, key, value, visible, scoring, offsets)
    return out, sums if lse else None


def _left(out: Tensor, basis: Tensor) -> Tensor:
    """Outputs [h, q, rv] in the space of basis [k, rv, dv], out of it."""
    heads, count, rank = out.shape
    return (out.reshape(basis.shape[0], -1, rank) @ basis.to(out.dtype)).reshape(heads, count, -1)
