"""Compressed copies of a model, made without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

from torch import nn

from workbench.errors import BadRecipe, NotApplicable
from workbench.models.devices import check_changeable
from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.stages import clash, ordered
from workbench.weights.surgery.opened import closed, opened
from workbench.weights.surgery.sharing_copy import sharing_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SHORT = Calibration(SAMPLED, samples=16, tokens=64)  # where nobody says on what to calibrate


def compressed(
    model: PreTrainedModel,
    methods: Sequence[Method],
    progress: Progress | None = None,
    study: Callable[[PreTrainedModel, int], WeightStudy] | None = None,
    noted: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """A copy of the model compressed by `methods`, one after another in the order of their stages.

    It shares every tensor that they leave unchanged; the model itself is never written to. Each method is given what
    those before it left: factors and pruned weights as plain layers (`opened`), calibrated anew. progress: one step a
    layer. study: gives the calibration of the model as it is before the method of that number (default: on a few short
    texts that the model itself says). noted: is told one line for each method. Raises NotApplicable, BadRecipe,
    BudgetTooSmall, MissingExtra, Cancelled; then no copy remains.
    """
    progress = progress or Progress()
    chosen = ordered(weight_methods(methods))
    if chosen:
        check_changeable(model)
    twin = model
    for number, method in enumerate(chosen):
        before = opened(twin)
        twin = sharing_copy(before)
        try:
            survey = method.survey(twin)
        except NotApplicable as failure:
            if not number:
                raise
            raise clash(method, chosen[:number], str(failure)) from failure
        survey.check()
        if noted is not None:
            noted(method.note(twin))
        known = study(before, number) if study else WeightStudy(before, calibration=SHORT)
        survey.method.apply(twin, survey.linears, known, progress)
        _hook(twin, before)
    return closed(twin) if methods else sharing_copy(model)


def _hook(twin: nn.Module, before: nn.Module) -> None:
    """Let new modules take what comes from another device, where accelerate lets the old ones do so."""
    hooks = {name: hook for name, module in before.named_modules() if (hook := getattr(module, "_hf_hook", None))}
    for name, hook in hooks.items():
        try:
            module = twin.get_submodule(name)
        except AttributeError:  # the method took the module out
            continue
        if not hasattr(module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(module, copy(hook))


def weight_methods(methods: Sequence[Method]) -> list[WeightMethod]:
    """The same methods, all of which change weights. Raises BadRecipe, naming them, where there are others."""
    others = [method.key for method in methods if not isinstance(method, WeightMethod)]
    if others:
        raise BadRecipe(f"{', '.join(others)}: only weight methods change the model's weights; leave the others out")
    return [method for method in methods if isinstance(method, WeightMethod)]


def compressed_once(
    study: WeightStudy, method: WeightMethod, linears: Mapping[str, nn.Linear], progress: Progress
) -> dict[str, nn.Module]:
    """What a method makes of these layers, by name; kept in the study, for as long as that lives."""

    def make() -> dict[str, nn.Module]:
        copy = sharing_copy(study.model)
        method.apply(copy, linears, study, progress)
        return {name: copy.get_submodule(name) for name in linears}

    return study.once(("compressed", method.parameter_key(), method.effective_budget), make)
