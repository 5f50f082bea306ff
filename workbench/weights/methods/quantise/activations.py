"""Rounding of what enters linear layers, after any method for their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import exclusive
from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of
from workbench.progress import Progress
from workbench.registry import Fidelity, param, register
from workbench.weights.base import Stage, WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import CompactLinear, FactoredLinear, IntegerLinear, PackedLinear
from workbench.weights.layers.rotated import RotatedLinear
from workbench.weights.layers.rounded_input import MOST, Form, RoundedInput
from workbench.weights.layers.streamed_mlp import StreamedMLP
from workbench.weights.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BITS = {"int8": 8, "int4": 4}


@register
class Activations(WeightMethod):
    """Round what enters each linear layer of the blocks, token by token, whatever form its weight is in.

    The plain baseline of methods that round activations: symmetric, each token in steps of its own largest magnitude
    ("per-token W8A8" is `absmax | activations`); with `static`, one step for each layer, by the largest magnitude that
    calibration saw, beyond which inputs are cut. Of factors both round, of rotated layers what is rotated already.

    Weights that are packed as integers with one scale a row and no zeros are multiplied as integers (`IntegerLinear`).
    All others, FP8 and static steps multiply the rounded numbers as floating point: that shows the accuracy, and no
    speed. Weights' bytes stay as they are.
    """

    key = "activations"
    title = "Rounded activations"
    claim = "what methods that round activations are compared with"
    fidelity = Fidelity("baseline")
    measure: ClassVar[str] = "size"
    stage: ClassVar[Stage] = "activations"

    form: Form = param(
        "int8", help="what inputs become: integers of 8 or 4 bits, or FP8 (E4M3)", own="tables give W8A8 first"
    )
    static: bool = param(
        False,
        help="one step for each layer, from calibration; else one for each token",
        own="per token is the usual baseline",
    )

    def survey(self, model: nn.Module) -> Survey:
        inside = tuple(f"{name}." for name in decoder_layers(cast("PreTrainedModel", model)))
        found = {name: module for name, module in _multiplying(model) if name.startswith(inside)}
        taken = {name: cast("nn.Linear", module) for name, module in found.items() if not _rounds(module)}
        left = {name: "it rounds its inputs already" for name in found if name not in taken}
        left |= {name: "it stands in no block" for name, _ in _multiplying(model) if name not in found}
        if not taken:
            what = type(model).__name__
            raise NotApplicable(f"{self.key}: no linear layer of this {what}'s blocks takes inputs as they are")
        return Survey(self, taken, left)

    def full_nbytes(self, linear: nn.Linear) -> int:
        return linear.nbytes if isinstance(linear, CompactLinear) else linear.weight.nbytes

    def nbytes(self, linear: nn.Linear) -> int:
        return self.full_nbytes(linear) + 4 * self.static

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        largest = _largest(study, linears, progress) if self.static else {}
        for name, layer in progress.track(linears.items(), f"compressing by {self.key}", len(linears)):
            twin.set_submodule(name, self._rounding(layer, largest.get(name)))

    def _rounding(self, layer: nn.Linear | CompactLinear, largest: Tensor | None) -> nn.Module:
        if largest is not None:
            return RoundedInput(layer, self.form, (largest / MOST[self.form]).clamp_min(1e-12))
        if type(layer) is PackedLinear and layer.columns is None and self.form in _BITS:
            zero, bits = layer.zero, _BITS[self.form]
            held = layer.codes(), layer.scale, zero, layer.bits, layer.bias
            return IntegerLinear(*held, group=layer.group, input_bits=bits)
        return RoundedInput(layer, self.form)


def _multiplying(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that are called, plain and small, by name; of factors and rotated ones those inside."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)) or isinstance(module, RotatedLinear | FactoredLinear):
            continue
        if isinstance(module, StreamedMLP):  # it reads its factors itself
            inside = (*inside, f"{name}.")
            continue
        linear = module if isinstance(module, CompactLinear) else linear_of(module)
        if linear is not None:
            inside = (*inside, f"{name}.")
            yield name, linear


def _rounds(module: nn.Module) -> bool:
    return isinstance(module, IntegerLinear | RoundedInput)


def _largest(study: WeightStudy, names: Mapping[str, nn.Module], progress: Progress) -> dict[str, Tensor]:
    """The largest magnitude of what enters each of these layers over the calibration texts; 0 where nothing did."""
    found = {name: torch.zeros(1) for name in names}
    with exclusive(study.model):
        runner = study.block_runner()
        with _watching(study.model, found):
            for block, _ in progress.track(runner, "calibrating", len(study.blocks)):
                for _ in runner.run(block):
                    progress.check()
    return found


@contextmanager
def _watching(model: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    def watch(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].numel():
            found[name] = torch.maximum(found[name].to(args[0].device), args[0].detach().float().abs().max())

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(watch, name)) for name in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
