"""Which inputs of some layers each calibration text activates most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.engine.attention_hook import exclusive
from workbench.progress import Progress
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.core_mlp import votes


def text_votes(study: WeightStudy, outs: Sequence[str], share: float, progress: Progress) -> list[Tensor]:
    """The votes of each calibration text for the inputs of each of these layers, float32 [t, i]."""
    found: dict[str, list[Tensor]] = {out: [] for out in outs}
    runner = study.block_runner()

    def count(out: str, inside: Tensor) -> None:
        found[out] += [votes(text, share) for text in inside.detach()]

    for name, block in progress.track(runner, "reading the texts", len(study.blocks)):
        handles = [
            block.get_submodule(out.removeprefix(f"{name}.")).register_forward_pre_hook(
                lambda _, inputs, out=out: count(out, inputs[0])
            )
            for out in outs
            if out.startswith(f"{name}.")
        ]
        try:
            with exclusive(study.model):
                for _ in runner.run(name):
                    progress.check()
        finally:
            for handle in handles:
                handle.remove()
    return [torch.stack(found[out]) for out in outs]
