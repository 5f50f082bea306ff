"""The softmax rows of a few queries, once the log-sum-exp of each is known."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring

_MOST = 64  # query rows of a KV head, beyond which a matrix product is the faster way


def _takes(query: Tensor, keys: Ragged, lse: Tensor, scoring: Scoring) -> bool:
    few = query.shape[0] // max(keys.starts.numel(), 1) * query.shape[1] <= _MOST
    return few and scoring.in_kernels and on_gpu(query, keys.data, lse) and query.dtype == keys.data.dtype


@with_kernel("gpu.shares:shares", when=_takes)
def shares(query: Tensor, keys: Ragged, lse: Tensor, scoring: Scoring) -> Tensor:
    """The weights of query [h, q, d] over rows of keys [t, d], all of which it sees: float32 [k, g, q, m], m = longest.

    lse float32 [h, q]: of all scores of a query, as `decode_dense` gives it. Beyond a head's length weights are 0.
    """
    key, real = keys.padded()
    _, count, width = query.shape
    grouped = query.float().reshape(len(key), -1, count, width)
    scores = scoring.scores(torch.einsum("kgqd,kmd->kgqm", grouped, key.float()))
    weights = torch.exp(scores - lse.view(len(key), -1, count, 1))
    return weights.masked_fill(~real[:, None, None], 0.0)
