"""Which weights a method takes, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers, placed
from workbench.models.findings import Finding
from workbench.models.linear import linear_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from workbench.weights import WeightMethod


def weight_findings(model: PreTrainedModel, method: WeightMethod) -> tuple[Finding, ...]:
    """One finding for each name of weights inside a layer and what becomes of them; one where nothing can be done."""
    try:
        survey, layers = method.survey(model), list(decoder_layers(model))
    except NotApplicable as refusal:
        return (Finding("weights", (), "", type(model).__name__, "refused", str(refusal)),)
    fates, modules = dict.fromkeys(survey.linears, "") | survey.left, dict(model.named_modules())
    found: dict[tuple[str, str, str], list[tuple[int | None, int]]] = {}
    for name, why in fates.items():
        layer, short = placed(name, layers)
        kind, numbers = _held(modules, name)
        found.setdefault((short, kind, why), []).append((layer, numbers))
    return tuple(
        Finding(
            "weights",
            tuple(sorted({layer for layer, _ in places if layer is not None})),
            short,
            kind,
            "exact" if why else "compressible",
            why,
            numbers=sum(numbers for _, numbers in places),
        )
        for (short, kind, why), places in found.items()
    )


def _held(modules: Mapping[str, nn.Module], name: str) -> tuple[str, int]:
    """What holds the weights of this name, a module or a parameter of one, and how many numbers they are."""
    module = modules.get(name)
    if module is None:
        path, _, key = name.rpartition(".")
        return f"parameter of {type(modules[path]).__name__}", getattr(modules[path], key).numel()
    linear = linear_of(module)
    kind = "linear layer" if linear is not None else type(module).__name__
    return kind, sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim >= 2)
