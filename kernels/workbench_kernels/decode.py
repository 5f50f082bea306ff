"""Attention of the newest tokens over a cache: few queries, many entries."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu
from workbench_kernels.rows import PackedRows, Ragged


def decode_dense(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query [h, q, d] over rows of keys [t, d] and values [t, dv]; h = g * k, all of one dtype.

    Query head j reads KV head j // g; keys and values are equally long. query_positions int [q]: queries see rows at
    positions up to their own, and none `window` or more before it; positions [t, 1] int32 of the rows, if not their
    number in their head. Without query_positions every query sees everything.
    Returns the output [h, q, dv], in the query's dtype, and with `lse` the log of each query's sum of exponentiated
    scores, float32 [h, q], for joining parts (`join_parts`); a query that sees nothing gets zeros and minus infinity.
    """
    if on_gpu(query, keys.data) and query.dtype == keys.data.dtype and query.dtype.itemsize == 2:
        from workbench_kernels.gpu.dense import decode_dense as kernel

        return kernel(
            query, keys, values, scale=scale, softcap=softcap, window=window, query_positions=query_positions,
            positions=positions, lse=lse,
        )  # fmt: skip
    return decode_reference(
        query, keys, values, scale=scale, softcap=softcap, window=window, query_positions=query_positions,
        positions=positions,
    )  # fmt: skip


def decode_packed(
    query: Tensor,
    keys: PackedRows,
    values: PackedRows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same over rows of which the first of each head are bit-packed, keys and values each as many as they like."""
    if on_gpu(query, keys.codes.data) and query.dtype.itemsize == 2:
        from workbench_kernels.gpu.packed import decode_packed as kernel

        return kernel(
            query, keys, values, scale=scale, softcap=softcap, window=window, query_positions=query_positions,
            positions=positions, lse=lse,
        )  # fmt: skip
    return decode_reference(
        query, keys, values, scale=scale, softcap=softcap, window=window, query_positions=query_positions,
        positions=positions,
    )  # fmt: skip


def decode_reference(
    query: Tensor,
    keys: Ragged | PackedRows,
    values: Ragged | PackedRows,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_dense` and `decode_packed` in plain PyTorch."""
    key, real = keys.padded()
    value = values.padded()[0][:, : key.shape[1]]
    key, real = key[:, : value.shape[1]], real[:, : value.shape[1]]  # room, if one has more of it
    if positions is None:
        places = torch.arange(key.shape[1], device=query.device)[None]
    else:
        places = positions.padded()[0][:, : key.shape[1], 0]
    seen = real[:, None]
    if query_positions is not None:
        asked = query_positions.to(query.device)[None, :, None]
        seen = seen & (places[:, None] <= asked)
        if window is not None:
            seen = seen & (places[:, None] > asked - window)
    return softmax_over(query, key, value, seen, scale=scale, softcap=softcap)


def softmax_over(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: attention of query [h, q, d] over keys [k, m, d], values [k, m, dv] where seen [k, 1 or q, m].

    Computed in float32, or float64 if the query is. Returns output [h, q, dv] and log-sum-exp [h, q].
    """
    heads, count, width = query.shape
    kv_heads = keys.shape[0]
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(kind).reshape(kv_heads, -1, count, width)
    scores = torch.einsum("kgqd,kmd->kgqm", grouped, keys.to(kind)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    total = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - torch.where(total.isinf(), 0, total)[..., None])
    out = torch.einsum("kgqm,kmd->kgqd", weights, values.to(kind))
    return out.reshape(heads, count, -1).to(query.dtype), total.reshape(heads, count)


def join_parts(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over several sets of entries from that over each: outputs [h, q, dv] with log-sum-exps [h, q]."""
    if len(parts) == 1:
        return parts[0][0]
    sums = torch.stack([lse for _, lse in parts])
    shares = torch.softmax(sums, dim=0).to(parts[0][0].dtype)
    return sum(
        (out * share[..., None] for (out, _), share in zip(parts, shares, strict=True)), torch.zeros_like(parts[0][0])
    )
