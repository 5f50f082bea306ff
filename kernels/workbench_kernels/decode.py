"""Attention of the newest tokens over a cache: few queries, many entries."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import PackedRows, Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state


def _takes_dense(query: Tensor, keys: Ragged, scoring: Scoring) -> bool:
    return (
        scoring.in_kernels and on_gpu(query, keys.data) and query.dtype == keys.data.dtype and query.dtype.itemsize == 2
    )


@with_kernel("gpu.dense:decode_dense", when=_takes_dense)
def decode_dense(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    sizes: tuple[Ragged, Ragged] | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query [h, q, d] over rows of keys [t, d] and values [t, dv]; h = g * k, all of one dtype.

    Query head j reads KV head j // g; keys and values are equally long. query_positions int [q]: queries see rows at
    positions up to their own within `scoring.window`; positions [t, 1] int32 of the rows, if not their number in their
    head. Without query_positions every query sees everything. sizes: what each row of keys, and of values, is
    multiplied with, [t, 1] each; a key of infinite size is not seen.
    Returns the output [h, q, dv], in the query's dtype, and with `lse` the log of each query's sum of exponentiated
    scores, float32 [h, q], for `merge_states`; a query that sees nothing gets zeros and minus infinity, and sinks are
    one key more that all see. The kernel reads 16-bit numbers and knows no slopes; what else there is goes through the
    reference.
    """
    return _decode(query, keys, values, scoring, query_positions, positions, lse, sizes)


def _takes_packed(query: Tensor, keys: PackedRows, scoring: Scoring) -> bool:
    return scoring.in_kernels and on_gpu(query, keys.codes.data) and query.dtype.itemsize == 2


@with_kernel("gpu.packed:decode_packed", when=_takes_packed)
def decode_packed(
    query: Tensor,
    keys: PackedRows,
    values: PackedRows,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same over rows of which the first of each head are bit-packed, keys and values each as many as they like."""
    return _decode(query, keys, values, scoring, query_positions, positions, lse)


def _decode(
    query: Tensor,
    keys: Ragged | PackedRows,
    values: Ragged | PackedRows,
    scoring: Scoring,
    query_positions: Tensor | None,
    positions: Ragged | None,
    lse: bool,
    sizes: tuple[Ragged, Ragged] | None = None,
) -> tuple[Tensor, Tensor | None]:
    key, real = keys.padded()
    value = values.padded()[0][:, : key.shape[1]]
    key, real = key[:, : value.shape[1]], real[:, : value.shape[1]]  # room, if one has more of it
    if sizes is not None:
        of_keys, of_values = (side.padded()[0][:, : key.shape[1]] for side in sizes)
        real = real & of_keys[..., 0].isfinite()
        key = key.float() * of_keys.float().masked_fill(~real[..., None], 0)
        value = value.float() * of_values.float()
    if positions is None:
        places = torch.arange(key.shape[1], device=query.device)[None]
    else:
        places = positions.padded()[0][:, : key.shape[1], 0]
    visible = real[:, None]
    if query_positions is not None:
        visible = visible & scoring.visible(query_positions.to(query.device), places)
    offsets = scoring.offsets(places if query_positions is None else query_positions, places)
    out, sums = attention_state(query, key, value, visible, scoring, offsets)
    return out, sums if lse else None
