"""Gates on a model's blocks, learned while all its weights stay: which blocks it can do without together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of, exclusive
from workbench.models.decoder import decoder_layers
from workbench.progress import Progress
from workbench.weights.calibration.block_runner import hidden_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def block_gates(
    model: PreTrainedModel, texts: Tensor, *, steps: int, rate: float, penalty: float, progress: Progress
) -> Tensor:
    """How far open each block's gate is, float32 [l] between 0 and 1: at 0 what enters the block leaves it unchanged.

    All begin open. Adam lowers the loss of the next token over texts int64 [t, n] plus `penalty` times the gates' mean,
    one text a step, for `steps` steps of `rate`. Gates learn together, so that of two blocks that stand in for each
    other one stays.
    """
    blocks = list(decoder_layers(model).values())
    gates = torch.ones(len(blocks), device=device_of(model), requires_grad=True)
    learner = torch.optim.Adam([gates], lr=rate)

    def through(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        left = entered + gates[index].to(entered) * (hidden_of(output) - entered)
        return type(output)([left, *output[1:]]) if isinstance(output, tuple | list) else left

    handles = [
        block.register_forward_hook(partial(through, index), with_kwargs=True) for index, block in enumerate(blocks)
    ]
    try:
        for step in progress.track(range(steps), "learning gates", steps):
            ids = texts[step % len(texts)][None].to(device_of(model))
            with exclusive(model), torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                loss = nn.functional.cross_entropy(logits, ids[0, 1:]) + penalty * gates.mean()
                (gates.grad,) = torch.autograd.grad(loss, gates)
            learner.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
    finally:
        for handle in handles:
            handle.remove()
    return gates.detach().cpu()
