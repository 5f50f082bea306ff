"""Rows fetched by number: the kernel's are the reference's, of any width, and what is not wanted is zeros."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from workbench_kernels.fetching import fetch_rows


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int32])
@pytest.mark.parametrize("width", [1, 6, 33, 128, 2501])
def test_the_kernel_fetches_what_indexing_does(width: int, dtype: torch.dtype) -> None:
    from workbench_kernels.gpu.fetching import fetch_rows as kernel

    draw = torch.Generator().manual_seed(width)
    data = torch.randint(0, 100, (70, width), generator=draw).to(dtype)
    at = torch.randint(-20, 70, (3, 41), generator=draw)
    found = kernel(data, at)
    assert found.dtype == dtype and torch.equal(found, fetch_rows.reference(data, at))
    assert torch.equal(found[at >= 0], data[at[at >= 0]]) and not found[at < 0].any()
    assert kernel(data, at[:, :0]).shape == (3, 0, width)


def test_no_rows_are_fetched_from_nothing() -> None:
    assert torch.equal(fetch_rows(torch.empty(0, 4), torch.tensor([[-1, -1]])), torch.zeros(1, 2, 4))
