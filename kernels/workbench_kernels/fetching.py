"""Rows fetched from wherever they lie, host memory included, to where they are needed."""

from __future__ import annotations

from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel


def _takes(data: Tensor, at: Tensor) -> bool:
    return on_gpu(at) and data.numel() > 0 and (data.is_cuda or data.is_pinned())


@with_kernel("gpu.fetching:fetch_rows", when=_takes)
def fetch_rows(data: Tensor, at: Tensor) -> Tensor:
    """The rows of data [t, w], contiguous, numbered `at`, int64 [...], on the device of `at`: [..., w].

    Where a number is negative, zeros, for which nothing is read. On a GPU the kernel reads pinned host memory in place:
    the host is not waited for, and only what is asked for crosses the link.
    """
    rows = data[at.clamp_min(0).to(data.device)].to(at.device) if len(data) else at.new_zeros(*at.shape, data.shape[1])
    return rows.to(data.dtype).masked_fill((at < 0)[..., None], 0)
