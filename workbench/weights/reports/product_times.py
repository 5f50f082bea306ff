"""A table of how long a model's products take on this machine, at every width that ZipLM may choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.engine.attention_hook import device_of
from workbench.weights.solvers.latency import recorded
from workbench.weights.solvers.widths import ladders
from workbench.weights.surgery.prunable import PrunableAttention, PrunableMLP, prunable_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recorded_times(model: PreTrainedModel, tokens: int = 1, shrink: float = 0.9) -> str:
    """Seconds of the products of a model's MLPs, and of its attention's values, by shape: ZipLM's `table`.

    tokens: how many are computed at once. shrink: ZipLM's parameter of that name. Measured anew each time; what is
    handed to ZipLM is this text, so that its choice can be made again wherever the text is known.
    """
    modules = [each for each in prunable_modules(model) if isinstance(each, PrunableMLP | PrunableAttention)]
    shapes = set()
    for module, widths in zip(modules, ladders([module.width for module in modules], shrink), strict=True):
        for name, (axis, heads) in module.layers.items():
            outputs, inputs = model.get_parameter(f"{name}.weight").shape
            shapes |= {(heads * width, inputs) if axis == 0 else (outputs, heads * width) for width in widths}
    return recorded(shapes, tokens, device_of(model), model.dtype)
