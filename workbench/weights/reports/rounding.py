"""How well what enters each linear layer lends itself to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor, nn

from workbench import arguments
from workbench.engine.attention_hook import exclusive
from workbench.errors import NotApplicable
from workbench.measure.rounding import kernel_share, space_used
from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.calibration.block_runner import BlockRunner
from workbench.weights.compress import weight_methods
from workbench.weights.layers.rotated import RotatedLinear
from workbench.weights.surgery.linears import linear_layers
from workbench.weights.variants import Variants
from workbench_kernels.integer import cross_step, input_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALPHA = 0.15  # CrossQuant's: the weight of the token in the step of an element


def rounding(
    variants: Variants,
    methods: Sequence[Method] = (),
    *,
    bits: int = 8,
    texts: int = 4,
    tokens: int = 256,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How well what enters each linear layer lends itself to rounding, under weight methods; see `rounding_of`.

    texts, tokens: how much of the calibration texts is read, the beginning of each. Raises BadRecipe for methods of
    another family, BadParameter.
    """
    chosen = weight_methods(methods)
    bits, ids = arguments.whole("bits", bits, 2, 16), variants.ids(texts, tokens)
    return rounding_of(variants.get(chosen, progress), ids, bits, progress)


def rounding_of(model: PreTrainedModel, ids: Tensor, bits: int = 8, progress: Progress | None = None) -> pd.DataFrame:
    """One row for each linear layer of the blocks: what rounding its inputs to `bits` bits would lose to zero.

    ids: int64 [t, n], the texts. Columns: layer, module; kernel: the share of the inputs that become zero with one step
    for each token (the quantisation kernel, `workbench.measure.kernel_share`); kernel_cross: the same with CrossQuant's
    steps (alpha 0.15) of tokens and of the channels of these texts; space: how much of the space of levels the inputs
    fill (`workbench.measure.space_used`, of their second moments over these texts; 0 where these do not determine all
    directions). Of a layer that rotations its inputs, the rotated ones count: it is those that are rounded.
    """
    progress = progress or Progress()
    names = list(decoder_layers(model))
    inside = [name for name in linear_layers(model) if placed(name, names)[0] is not None]
    if not inside:
        raise NotApplicable(f"{type(model).__name__} has no linear layer in its decoder's layers")
    rows: list[dict[str, object]] = []
    with exclusive(model):
        runner = BlockRunner(model, ids)
        for block in progress.track(names, "measuring rounding", len(names)):
            heard: dict[str, list[Tensor]] = {}
            handles = [
                _rounded(model.get_submodule(name)).register_forward_pre_hook(partial(_hear, heard, name))
                for name in inside
                if name.startswith(f"{block}.")
            ]
            try:
                for _ in runner.run(block):
                    progress.check()
            finally:
                for handle in handles:
                    handle.remove()
            known: dict[int, dict[str, float]] = {}  # layers with the same input share its figures
            for name, parts in heard.items():
                layer, module = placed(name, names)
                if id(parts[0]) not in known:
                    known[id(parts[0])] = _figures(torch.cat(parts), bits)
                rows.append({"layer": layer, "module": module, **known[id(parts[0])]})
    return pd.DataFrame(rows, columns=["layer", "module", "kernel", "kernel_cross", "space"])


def _rounded(layer: nn.Module) -> nn.Module:
    return layer.inner if isinstance(layer, RotatedLinear) else layer


def _hear(heard: dict[str, list[Tensor]], name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    heard.setdefault(name, []).append(inputs[0])


def _figures(x: Tensor, bits: int) -> dict[str, float]:
    flat = x.flatten(0, -2).float()  # [n, i]
    return {
        "kernel": kernel_share(flat, input_step(flat, bits)),
        "kernel_cross": kernel_share(flat, cross_step(flat, bits, _ALPHA)),
        "space": space_used(flat.double().T @ flat.double() / flat.shape[0]),
    }
