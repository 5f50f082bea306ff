"""The Fisher information of weights, from gradients over calibration texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of, exclusive
from workbench.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FisherInformation:
    """Of a weight [o, i]: mean squares of its gradients over the texts, summed along its sides.

    rows: for each output [o]; columns: for each input [i]; float32.
    """

    rows: Tensor
    columns: Tensor


def fisher_information(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], texts: Tensor, progress: Progress
) -> dict[str, FisherInformation]:
    """Of each of a model's linear layers, by name: one pass back through the model for each of texts int64 [t, n]."""
    sums = {name: (torch.zeros(x.out_features), torch.zeros(x.in_features)) for name, x in linears.items()}

    def observe(name: str, _module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            squares = (gradient.flatten(0, -2).float().T @ x.float()).square()  # [o, i]
            rows, columns = sums[name]
            rows += squares.sum(dim=1).cpu()
            columns += squares.sum(dim=0).cpu()

        if out.requires_grad:
            out.register_hook(add)

    embedding = model.get_input_embeddings()
    handles = [model.get_submodule(name).register_forward_hook(partial(observe, name)) for name in linears]
    # A gradient has to flow through the blocks, but none into the model's own weights, which others may share.
    # What some models scale in place must not be the leaf itself.
    handles.append(embedding.register_forward_hook(lambda *call: call[2].detach().requires_grad_().clone()))
    try:
        for ids in progress.track(texts.split(1), "measuring gradients", texts.shape[0]):
            with exclusive(model), torch.enable_grad():
                logits = model(input_ids=ids.to(device_of(model)), use_cache=False).logits[0, :-1].float()
                nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device)).backward()
    finally:
        for handle in handles:
            handle.remove()
    count, device = texts.shape[0], device_of(model)
    return {name: FisherInformation(*((side / count).to(device) for side in sides)) for name, sides in sums.items()}
