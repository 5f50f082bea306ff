"""What attention each of some rows got, added to what it had got before."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring


def _takes(query: Tensor, keys: Ragged, lse: Tensor, into: Ragged, scoring: Scoring) -> bool:
    return scoring.in_kernels and on_gpu(query, keys.data, lse, into.data) and query.dtype == keys.data.dtype


@with_kernel("gpu.received:add_received", when=_takes)
def add_received(query: Tensor, keys: Ragged, lse: Tensor, into: Ragged, scoring: Scoring) -> None:
    """Add to `into` float32 [t, 1], for each row of keys [t', d], its softmax weights of query [h, q, d], all queries
    of its KV head together.

    lse float32 [h, q]: of all that the queries see, which may be more than these rows; they see all of these. `into`
    has a row for each of the keys', heads alike.
    """
    key, real = keys.padded()
    grouped = query.float().unflatten(0, (len(key), -1))
    products = torch.einsum("kgqd,kmd->kgqm", grouped, key.float())
    weights = torch.exp(scoring.scores(products) - lse.view(len(key), -1, query.shape[1], 1)).sum(dim=(1, 2))
    steps = torch.arange(keys.longest, device=query.device)
    # Rows beyond a head's end add nothing to its first row.
    at = into.starts.long()[:, None] + torch.where(real, steps, 0)
    into.data.view(-1).index_add_(0, at.clamp_max(max(len(into.data) - 1, 0)).flatten(), (weights * real).flatten())
