"""Retrieval by a codebook: which tokens have the highest scores, where a token's score is that of its code."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged


def codebook_scores(table: Tensor, codes: Ragged) -> Tensor:
    """The scores [k, r, m] of each head's tokens, of table [k, r, c], the scores of its entries for r queries.

    codes [t, 1], any integers: the entry of each token. Where a head is shorter than the longest, m, minus infinity.
    """
    entries, real = codes.padded()
    each = entries[..., 0].long().masked_fill(~real, 0)
    scores = table.gather(2, each[:, None].expand(-1, table.shape[1], -1))
    return scores.masked_fill(~real[:, None], -torch.inf)


def _takes(table: Tensor, codes: Ragged) -> bool:
    return on_gpu(table, codes.data) and codes.longest > 0


@with_kernel("gpu.codebook:codebook_top", when=_takes)
def codebook_top(
    table: Tensor, codes: Ragged, wanted: int, queries: int, *, fewer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each query the tokens that are among the `wanted` best of any query head of a KV head's group.

    table float32 [k, g * q, c]: scores of the entries for g query heads of q = `queries` queries, without NaN; codes
    [t, 1], uint8 or int16: each token's entry. fewer: where there is one, int32 [1] on the device, so many are wanted,
    and `wanted` is the most that may be. Of tokens with equal scores at the limit the first are taken. Returns
    slots int64 [k, q, g * w], w = min(wanted, longest), each once and ascending within their head, and how many of them
    count, bool alike, true in front; the others are 0. As in A2ATS (He et al. 2025, arXiv:2502.12665).

    On a GPU no score of a token is ever written: entries are counted, the limit is found among them, and what is read
    of a token is its code, three times. The reference sorts the scores of all tokens.
    """
    heads, rows, _ = table.shape
    count, group = min(wanted, codes.longest), rows // queries
    scores = codebook_scores(table, codes)
    best = scores.sort(dim=2, descending=True, stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    among = best.values[..., :count] > -torch.inf
    if fewer is not None:
        among &= torch.arange(count, device=table.device) < fewer
    chosen.scatter_(2, best.indices[..., :count], among)
    any_of = chosen.view(heads, group, queries, -1).any(dim=1)  # [k, q, m]
    room = group * count
    order = any_of.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices[..., :room]
    slots = torch.nn.functional.pad(order, (0, room - order.shape[2]))
    counts = torch.arange(room, device=table.device) < any_of.sum(dim=2, keepdim=True)
    return slots.masked_fill(~counts, 0), counts
