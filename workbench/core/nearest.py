"""Which kept entry each evicted key is most similar to: where merging methods put what they evict."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def nearest_kept(keys: Tensor, kept: Tensor, block: int = 2048) -> tuple[Tensor, Tensor]:
    """For each of the keys [k, n, d] the largest cosine similarity to a kept [k, n] one, and where that is, [k, n].

    What is kept is nearest to itself. Works through `block` evicted keys of a head at a time, which bounds its memory.
    """
    units = normalize(keys.float(), dim=-1)
    similarity = torch.ones(kept.shape, device=keys.device)
    home = torch.arange(keys.shape[1], device=keys.device).repeat(len(kept), 1)
    for head, stays in enumerate(kept):
        there = stays.nonzero()[:, 0]
        for gone in (~stays).nonzero()[:, 0].split(block):
            best = (units[head, gone] @ units[head, there].T).max(dim=1)
            similarity[head, gone], home[head, gone] = best.values, there[best.indices]
    return similarity, home
