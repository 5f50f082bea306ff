"""What a process does of a sweep: hold one model, name the rows that a grid asks for, and measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from workbench.progress import Progress
from workbench.results.schema import Row
from workbench.session import Session
from workbench.sweep.bench import Bench
from workbench.sweep.grid import Item, ModelSpec, Options


class Workplace:
    """The one model that a process holds at a time, and the bench it lies on."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._held: tuple[ModelSpec, Bench] | None = None

    def bench(self, model: ModelSpec, progress: Progress | None = None) -> Bench:
        """The bench with a model, which is loaded where another lay there; that is let go first."""
        if self._held is None or self._held[0] != model:
            self._held = None
            session = Session(
                model.source, device=model.device, dtype=model.dtype, kv_dtype=model.kv_dtype, progress=progress
            )
            if model.calibration is not None:
                session.calibrate(model.calibration)
            options = self.options
            bench = Bench(
                session,
                chat=options.chat,
                max_new_tokens=options.max_new_tokens,
                keep_text=options.keep_text,
                study=options.study,
            )
            self._held = model, bench
        return self._held[1]


def keys_of(bench: Bench, items: Sequence[Item]) -> list[str]:
    """The keys of the rows that items will be."""
    return [bench.key(item.recipe, item.task, item.number) for item in items]


def measure(bench: Bench, items: Sequence[Item], give: Callable[[Row], None], progress: Progress) -> None:
    """Measure items in their order and hand each row over as soon as it is there; what was read for them alone is let
    go after the last of them. Raises Cancelled.
    """
    prompts = [bench.prompt(item.task, item.number) for item in items]
    last = {prompt: index for index, prompt in enumerate(prompts)}
    for index, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        progress.check()
        give(bench.row(item.recipe, item.task, item.number, progress))
        if last[prompt] == index:
            bench.forget(prompt)


@contextmanager
def computing_on(threads: int | None) -> Iterator[None]:
    """The block computes on so many threads of the CPU (None: on as many as torch has)."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
