"""One block of a copy with texts on their way through it, for methods that look at what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import exclusive
from workbench.progress import Progress
from workbench.weights.calibration.block_runner import BlockRunner, hidden_of
from workbench.weights.calibration.hessian import InputStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.weights.calibration.study import WeightStudy


class BlockPass(NamedTuple):
    """A block of a copy, its layers still plain, and what is known of it.

    name: of the block. block: of the copy: its modules and parameters may be exchanged, but no tensor written to, for
    they are the model's own. inputs: what calibration saw of its layers' inputs, by their full names. runner: a few
    texts that are about to enter this block in the model as it was.
    """

    name: str
    block: nn.Module
    inputs: Mapping[str, InputStats]
    runner: BlockRunner

    def output(self) -> Tensor:
        """What leaves the block as it now is [t, n, i]."""
        return self.runner.forward(self.name, self.runner.hidden, self.block)

    def again(self, inner: nn.Module) -> Callable[[], Tensor]:
        """What runs a module inside the block, as it then is, on what enters it now, and returns what leaves it."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        handle = inner.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self.output()
        finally:
            handle.remove()

        def run() -> Tensor:
            with torch.no_grad():
                return torch.cat([hidden_of(inner(*args, **kwargs)) for args, kwargs in calls])

        return run


def passes(
    study: WeightStudy,
    twin: PreTrainedModel,
    texts: int,
    *,
    hessians: bool,
    progress: Progress,
    behind: PreTrainedModel | None = None,
) -> Iterator[BlockPass]:
    """Block after block of a copy of a study's model, with the first `texts` calibration texts."""
    with exclusive(study.model):
        runner = BlockRunner(study.model, study.ids[:texts])
    for name, inputs in study.inputs(hessians=hessians, progress=progress, behind=behind):
        yield BlockPass(name, twin.get_submodule(name), inputs, runner)
        with exclusive(study.model):
            for _ in runner.run(name):
                progress.check()
