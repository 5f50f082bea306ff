"""Pages scored by their bounds, and fetched: the kernels do what the references do, and these what a loop does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench_kernels.pages import page_rows, page_scores
from workbench_kernels.rows import Ragged

PAGE = 8


def held(length: int, dtype: torch.dtype, width: int = 24) -> tuple[Tensor, Ragged, Tensor]:
    """A query [2, 3, d], keys of two heads with room behind, and bounds to which the newest key has not come."""
    draw = torch.Generator().manual_seed(length)
    room, pages = 50, -(-length // PAGE) + 2
    keys = torch.randn(2, room, width, generator=draw).to(dtype)
    rows = Ragged(
        keys.view(-1, width),
        torch.tensor([0, room], dtype=torch.int32),
        torch.tensor([length] * 2, dtype=torch.int32),
        44,
    )
    bounds = torch.full((2, pages + 3, 2 * width), 7.0).to(dtype)  # what no one has written means nothing
    for page in range(-(-(length - 1) // PAGE)):
        part = keys[:, page * PAGE : min((page + 1) * PAGE, length - 1)]
        bounds[:, page] = torch.cat([part.amin(dim=1), part.amax(dim=1)], dim=1)
    return torch.randn(2, 3, width, generator=draw).to(dtype), rows, bounds[:, :pages]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 8, 9, 31])
def test_a_page_scores_what_its_bounds_allow(length: int, dtype: torch.dtype) -> None:
    from workbench_kernels.gpu.pages import page_scores as kernel

    query, rows, bounds = held(length, dtype)
    keys = rows.data.view(2, -1, rows.data.shape[1])[:, :length].float()
    for score in (page_scores.reference, kernel):
        mine = torch.empty(2, bounds.shape[1] + 3, bounds.shape[2], dtype=dtype)[:, : bounds.shape[1]].copy_(bounds)
        found = score(query, rows, mine, PAGE)
        for page in range(bounds.shape[1]):
            part = keys[:, page * PAGE : (page + 1) * PAGE]
            if not part.shape[1]:
                assert bool((found[..., page] == -torch.inf).all())
                continue
            low, high = part.amin(dim=1)[:, None], part.amax(dim=1)[:, None]
            want = torch.maximum(query.float() * low, query.float() * high).sum(dim=-1)
            assert torch.allclose(found[..., page], want, atol=1e-4)
            assert torch.equal(mine[:, page].float(), torch.cat([low, high], dim=2)[:, 0])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_pages_are_fetched_for_each_query_head(dtype: torch.dtype) -> None:
    from workbench_kernels.gpu.pages import page_rows as kernel

    _, rows, _ = held(31, dtype)
    values = Ragged((rows.data * 2)[:, :20].contiguous(), *rows[1:])
    chosen = torch.stack([torch.stack([torch.randperm(4) for _ in range(3)]) for _ in range(2)])
    found, wanted = (fetch(chosen, rows, values, PAGE) for fetch in (kernel, page_rows.reference))
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))
    key, value, hidden = found
    assert key.shape == (6, 32, 24) and value.shape == (6, 32, 20) and int(hidden.sum()) == 6
    first = int(chosen[1, 2, 0]) * PAGE
    count = min(PAGE, 31 - first)
    assert torch.equal(key[5, :count], rows.data[50 + first : 50 + first + count])
