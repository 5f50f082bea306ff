"""What each layer's next step gains a model whose layers can all grow by steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workbench.engine.attention_hook import device_of, exclusive
from workbench.progress import Progress
from workbench.weights.calibration.switched_model import quickest
from workbench.weights.surgery.sharing_copy import sharing_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def step_losses(
    model: PreTrainedModel,
    ids: Tensor,
    made: Mapping[str, Sequence[nn.Module]],
    progress: Progress,
    stage: str = "measuring each step",
) -> dict[str, list[float]]:
    """For each layer and step: the model's loss on texts [t, n] once that is taken and all others are a step behind.

    made: what stands for each layer, by name, from its smallest size. A layer that has no more sizes stays at its last.
    """
    copy, ids = sharing_copy(model), ids.to(device_of(model))
    found: dict[str, list[float]] = {name: [] for name in made}
    steps = [
        (step, name) for step in range(max(map(len, made.values()))) for name in made if len(made[name]) > step + 1
    ]
    reached = -1
    for step, name in progress.track(steps, stage, len(steps)):
        if step > reached:
            for other, sizes in made.items():
                copy.set_submodule(other, quickest(sizes[min(step, len(sizes) - 1)], copy.dtype))
            reached = step
        before = copy.get_submodule(name)
        copy.set_submodule(name, quickest(made[name][step + 1], copy.dtype))
        found[name].append(text_loss(copy, ids))
        copy.set_submodule(name, before)
    return found


def text_loss(model: PreTrainedModel, ids: Tensor) -> float:
    """The mean negative log likelihood of the next token over texts [t, n]: the logarithm of perplexity."""
    total = 0.0
    with exclusive(model), torch.no_grad():
        for text in ids:
            logits = model(input_ids=text[None], use_cache=False).logits[0, :-1]
            total += float(cross_entropy(logits.float(), text[1:]))
    return total / len(ids)
