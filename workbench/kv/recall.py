"""Which tokens a question recalls by its attention at one layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from workbench.core.attention_rows import row_blocks
from workbench.trace import LayerTrace


def attention_to(queries: Tensor, keys: Tensor, positions: Tensor, layer: LayerTrace) -> Tensor:
    """The softmax of queries [h, q, d] at positions [q] over keys [k, n, d] from 0 on, their mean: float32 [n]."""
    received = torch.zeros(keys.shape[1], device=keys.device)
    for block in row_blocks(queries, keys, layer.scoring, query_positions=positions):
        received[block.keys] += block.probs.sum(dim=(0, 1))
    return (received / (queries.shape[0] * queries.shape[1])).cpu()


def widths(count: int, widest: int) -> list[int]:
    """Odd pooling widths from 1 to `widest`, in equal ratios as near as may be, each once."""
    steps = [widest ** (step / (count - 1)) for step in range(count)] if count > 1 else [float(widest)]
    return sorted({2 * round((step - 1) / 2) + 1 for step in steps})


def recalled(scores: Tensor, kernels: list[int], count: int, sinks: int, last: int) -> Tensor:
    """The `count` positions, ascending, that the max-pooled scores [n] of each width choose in turns.

    The first `sinks` and the `last` are among them.
    """
    tokens = scores.numel()
    turn = torch.full((tokens,), tokens * len(kernels))
    for order, width in enumerate(kernels):
        pooled = max_pool1d(scores[None], width, stride=1, padding=width // 2)[0]
        place = pooled.argsort(descending=True, stable=True).argsort()
        turn = torch.minimum(turn, place * len(kernels) + order)
    turn[:sinks] = turn[tokens - last :] = -1
    return turn.argsort(stable=True)[:count].sort().values
