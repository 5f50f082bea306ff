"""Saying so while kernels compile, which takes seconds the first time on a machine and nothing afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from workbench.progress import Progress
from workbench_kernels.dispatch import triton_found

STAGE = "compiling kernels, first use"


class _Hook:
    """What Triton calls before a kernel is compiled or fetched from its cache; it calls whoever was asked before."""

    def __init__(self, progress: Progress, before: Any) -> None:
        self.progress, self.before = progress, before
        self.thread = threading.get_ident()
        self.over = False

    def __call__(self, **given: Any) -> Any:
        if not self.over and threading.get_ident() == self.thread:
            self.progress.update(STAGE, 0, 1)
        return None if self.before is None else self.before(**given)


@contextmanager
def telling(progress: Progress | None) -> Iterator[None]:
    """Until the block ends report to `progress` when a kernel of this thread compiles. Nothing without a GPU."""
    if progress is None or not torch.cuda.is_available() or not triton_found():
        yield
        return
    with hooked(progress):
        yield


@contextmanager
def hooked(progress: Progress) -> Iterator[None]:
    """The same wherever Triton is. Other threads may come and go meanwhile: who is over is taken out of the chain."""
    import triton

    runtime = triton.knobs.runtime
    hook = runtime.jit_cache_hook = _Hook(progress, runtime.jit_cache_hook)
    try:
        yield
    finally:
        hook.over = True
        first = runtime.jit_cache_hook
        while isinstance(first, _Hook) and first.over:
            first = first.before
        runtime.jit_cache_hook = first
