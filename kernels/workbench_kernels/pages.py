"""Attention to pages: which of them a new token's query could match best, and the rows that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged


def _takes(query: Tensor, keys: Ragged) -> bool:
    return on_gpu(query, keys.data)


@with_kernel("gpu.pages:page_scores", when=_takes)
def page_scores(query: Tensor, keys: Ragged, bounds: Tensor, page: int) -> Tensor:
    """Let each head's newest key join the bounds of its page, and return the largest products that keys within the
    bounds of each page could have with query [k, g, d]: float32 [k, g, p], minus infinity for pages not begun.

    keys: in pages of `page` rows, one after another. bounds [k, p, 2d], a view with its channels together: the least
    and greatest number of each channel of a page's keys, of which those of the page with the newest are written
    (Quest, Tang et al. 2024, arXiv:2406.10774, algorithm 1).
    """
    heads, pages, width = bounds.shape
    new = keys.data[keys.starts + keys.lengths - 1].to(bounds.dtype)  # [k, d]
    last = (keys.lengths.long() - 1)[:, None, None]  # [k, 1, 1]
    at = (last // page).expand(-1, -1, width)
    low, high = bounds.gather(1, at)[:, 0].chunk(2, dim=1)
    widened = torch.cat([torch.minimum(low, new), torch.maximum(high, new)], dim=1)
    begun = (last[:, 0] % page > 0).expand_as(widened)
    bounds.scatter_(1, at, torch.where(begun, widened, torch.cat([new, new], dim=1))[:, None])
    least, greatest = bounds.float().chunk(2, dim=2)
    asked = query.float()
    highest = asked.clamp_min(0) @ greatest.mT + asked.clamp_max(0) @ least.mT
    there = torch.arange(pages, device=query.device) * page < keys.lengths.view(heads, 1, 1)
    return highest.masked_fill(~there, -torch.inf)


def _takes_pages(chosen: Tensor, keys: Ragged, values: Ragged) -> bool:
    return on_gpu(chosen, keys.data, values.data)


@with_kernel("gpu.pages:page_rows", when=_takes_pages)
def page_rows(chosen: Tensor, keys: Ragged, values: Ragged, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of chosen pages, int64 [k, g, w], for each of g query heads of a KV head: keys [h, w * page, d], values
    [h, w * page, dv], and 1 where there is no such row, 0 elsewhere, int32 [h, w * page, 1].
    """
    inside = torch.arange(page, device=chosen.device)
    rows = (chosen[..., None] * page + inside).flatten(2)  # [k, g, w * page]
    real = rows < keys.lengths[:, None, None]
    rows = torch.where(real, rows, 0)
    at = (of.starts.long()[:, None, None] + rows for of in (keys, values))
    key, value = (
        of.data[where].masked_fill(~real[..., None], 0).flatten(0, 1)
        for of, where in zip((keys, values), at, strict=True)
    )
    return key, value, (~real).to(torch.int32).flatten(0, 1)[..., None]
