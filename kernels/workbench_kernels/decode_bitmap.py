"""Decode attention over rows that keep some of their numbers, with a bitmap of which (Mustafar, arXiv:2505.22913)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.building import expand_rows
from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged, SparseRows
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state


def _takes(query: Tensor, keys: SparseRows, values: SparseRows, scoring: Scoring) -> bool:
    tensors = (x.data for side in (keys, values) for x in (side.numbers, side.tail))
    alike = all(x.dtype == query.dtype for x in tensors) and query.dtype in (torch.float16, torch.bfloat16)
    several = keys.numbers.data.shape[1] > 0 and values.numbers.data.shape[1] > 0
    return on_gpu(query, keys.numbers.data) and alike and several and scoring.window is None and scoring.in_kernels


@with_kernel("gpu.bitmap:decode_bitmap", when=_takes)
def decode_bitmap(
    query: Tensor,
    keys: SparseRows,
    values: SparseRows,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query [h, q, d] over sparse rows and the whole ones behind them; h = g * k, one dtype.

    Query head j reads KV head j // g; keys and values are equally long, sparse and whole. query_positions int [q]:
    queries see entries at positions up to their own; positions [t, 1] int32 of a head's sparse and then whole rows, if
    not their number in their head. Without query_positions every query sees everything.
    Returns the output [h, q, dv], in the query's dtype, and with `lse` the log of each query's sum of exponentiated
    scores, float32 [h, q] (see `decode_dense`). The kernel reads 16-bit numbers and knows no window and
    no slopes; what else there is goes through the reference.
    """
    key, real, number = _expanded(keys)
    value, _, _ = _expanded(values)
    visible = real[:, None]
    if positions is not None:
        at = (positions.starts.long()[:, None] + number).clamp_max(max(positions.data.shape[0] - 1, 0))
        number = positions.data[at, 0]
    if query_positions is not None:
        visible = visible & scoring.visible(query_positions.to(query.device), number)
    offsets = scoring.offsets(number if query_positions is None else query_positions, number)
    out, sums = attention_state(query, key, value, visible, scoring, offsets)
    return out, sums if lse else None


def _expanded(rows: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    """What rows stand for, float32 or float64 [k, m, d], which are real [k, m], and their number in their head."""
    width, dtype = rows.tail.data.shape[1], rows.tail.data.dtype
    numbers, sparse = rows.numbers.padded()
    bitmap, _ = rows.bitmap.padded()
    front = expand_rows.reference(numbers.flatten(0, 1), bitmap.flatten(0, 1), width, dtype)
    tail, whole = rows.tail.padded()
    first = torch.arange(sparse.shape[1], device=sparse.device).expand(sparse.shape)
    behind = rows.numbers.lengths.long()[:, None] + torch.arange(whole.shape[1], device=whole.device)
    return (
        torch.cat([front.view(*sparse.shape, width), tail], dim=1),
        torch.cat([sparse, whole], dim=1),
        torch.cat([first, behind], dim=1),
    )
