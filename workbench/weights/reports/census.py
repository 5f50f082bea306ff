"""What became of each weight of a model: what was chosen for it, what it takes, and how far it is from the original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from workbench import arguments
from workbench.core.relative_error import ratio, relative_error
from workbench.measure.memory import tensor_bytes
from workbench.models.decoder import decoder_layers, placed
from workbench.models.linear import linear_of, linear_weight
from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.compress import weight_methods
from workbench.weights.layers import CompactLinear
from workbench.weights.surgery.linears import weight_of
from workbench.weights.variants import Variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLUMNS = (
    "layer", "module", "name", "form", "bits", "rank", "density", "chosen", "bytes", "share", "weight_error",
    "output_error", "reason",
)  # fmt: skip


def census(
    variants: Variants, methods: Sequence[Method], *, outputs: bool = True, progress: Progress | None = None
) -> pd.DataFrame:
    """What weight methods made of each weight: one row a matrix, also of those left as they are; see `census_of`.

    outputs: also the error of each layer's outputs over the calibration texts, whose Hessians are accumulated once for
    that. Raises BadRecipe for methods of another family, BadParameter, and what compressing raises.
    """
    chosen = weight_methods(methods)
    arguments.flag("outputs", outputs)
    twin = variants.get(chosen, progress)
    reasons = {name: why for method in chosen for name, why in method.left_alone(variants.model).items()}
    recast = {name: why for method in chosen for name, why in method.recast(variants.model).items()}
    return census_of(variants.model, twin, variants.study() if outputs else None, reasons, progress, recast)


def census_of(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    study: WeightStudy | None = None,
    reasons: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    recast: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """One row for each weight matrix of `model`, with what `twin`, a compressed copy of it, has in its place.

    layer, module: where it is; the layer is missing outside the decoder's blocks. form: the kind of layer that
    holds it now; "plain" where it did not change, "gone" where it has no place any more. bits, rank, density,
    chosen: what that layer says of itself. bytes: of what stands for it, plain ones at 16 bits; share: of the
    original at 16 bits. weight_error: ‖ΔW‖ / ‖W‖, missing where W is zero. output_error: the same of its outputs
    over the calibration texts of `study`, the root of tr(ΔW M ΔWᵀ) / tr(W M Wᵀ), for the linear layers of blocks.
    Errors are missing where the two have no common shape, and of layers in `recast`, whose numbers stand for something
    else than the model's of the same name: factors of their inputs are held elsewhere, or what flows between layers was
    rotated. reason: why it was left as it is, from `reasons`, or why it has no errors, from `recast`. Rows of tied
    matrices come once, at the first module that has them; matrices that the twin has besides come last.
    """
    progress = progress or Progress()
    known = dict(matrices(model))
    names = list(decoder_layers(model))
    rows: dict[str, dict[str, Any]] = {}
    changes: dict[str, tuple[Tensor, nn.Module]] = {}
    for full, (module, weight) in progress.track(known.items(), "comparing weights", len(known)):
        layer, short = placed(full, names)
        row = {"layer": layer, "module": short, "name": full, **_of(twin, full, weight)}
        row["share"] = row["bytes"] / (2 * weight.numel())
        row["reason"] = _reason(reasons or {}, full) if row["form"] == "plain" else ""
        rows[full] = row
        if row["form"] != "plain" and full in (recast or {}):
            row["weight_error"], row["reason"] = math.nan, f"not compared: {(recast or {})[full]}"
            continue
        stands = _at(twin, full)
        if row["form"] != "plain" and linear_of(module) is not None and stands is not None:
            changes[full] = (weight, stands)
    if study is not None and changes:
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for full in changes.keys() & inputs.keys():
                rows[full]["output_error"] = _output_error(*changes[full], inputs[full])
    for full, row in rows.items():
        if row["form"] == "plain" and linear_of(known[full][0]) is not None:
            row["output_error"] = 0.0
    for full, module in _besides(model, twin, known):
        layer, short = placed(full, names)
        rows[full] = {"layer": layer, "module": short, "name": full, **_described(module)}
    frame = pd.DataFrame(list(rows.values()), columns=list(_COLUMNS))
    return frame.astype({"layer": "Int64", "rank": "Int64", "bytes": "int64"})


def matrices(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, Tensor]]]:
    """Every weight matrix by name, with the module that has it, each once; one of several in a module by its own. Those
    of linear layers are [o, i], however they lie (`linear_of`).
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        weights = {key: weight for key, weight in module.named_parameters(recurse=False) if weight.ndim >= 2}
        for key, weight in weights.items():
            if id(weight) not in seen:
                seen.add(id(weight))
                shown = linear_weight(module) if key == "weight" else None
                yield name if key == "weight" else f"{name}.{key}", (module, weight if shown is None else shown)


def _reason(reasons: Mapping[str, str], full: str) -> str:
    return reasons.get(full, reasons.get(f"{full}.weight", ""))


def _of(twin: nn.Module, full: str, weight: Tensor) -> dict[str, Any]:
    """What the twin has in the place of one matrix."""
    stands = _at(twin, full)
    if stands is None:
        return {"form": "gone", "bits": 0.0, "bytes": 0}
    used = weight_of(stands, full)
    if used is not None and _same(used, weight):
        return {"form": "plain", "bits": 16.0, "bytes": 2 * weight.numel(), "weight_error": 0.0}
    made = _described(stands)
    if used is not None and used.shape == weight.shape:
        made["weight_error"] = relative_error(used, weight)
    return made


def _at(twin: nn.Module, full: str) -> nn.Module | None:
    """The module of this name, or the one that holds the parameter of this name."""
    for name in (full, full.rpartition(".")[0]):
        try:
            stands = twin.get_submodule(name)
        except AttributeError:
            continue
        if name == full or weight_of(stands, full) is not None:
            return stands
    return None


def _same(used: Tensor, weight: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return used is weight or (
        used.data_ptr() == weight.data_ptr()
        and (used.shape, used.stride(), used.dtype) == (weight.shape, weight.stride(), weight.dtype)
    )


def _described(module: nn.Module) -> dict[str, Any]:
    said = dict(module.describe()) if isinstance(module, CompactLinear) else {}
    buffers = tensor_bytes(module.buffers())
    parameters = sum(2 * weight.numel() for weight in module.parameters() if weight.ndim >= 2)
    nbytes = module.nbytes if isinstance(module, CompactLinear) else buffers + parameters
    row = {"form": type(module).__name__, "bytes": nbytes}
    for key in ("bits", "rank", "density"):
        if key in said:
            row[key] = said.pop(key)
    return {**row, "chosen": ", ".join(f"{key} {value}" for key, value in said.items())}


def _output_error(weight: Tensor, stands: nn.Module, inputs: InputStats) -> float:
    used = weight_of(stands)
    if used is None or used.shape != weight.shape or inputs.accumulated is None:
        return float("nan")
    plain = weight.detach().float()
    lost = inputs.output_error(used.to(plain.device).float() - plain).sum().clamp_min(0)
    return math.sqrt(ratio(float(lost), float(inputs.output_error(plain).sum())))


def _besides(model: nn.Module, twin: nn.Module, known: Mapping[str, object]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the twin that hold matrices where the model has none of that name; what the model holds itself, masks
    and tables in its buffers, is no weight of the twin's.
    """
    inside: tuple[str, ...] = ()
    known_tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for name, module in twin.named_modules():
        if name in known or name.startswith(inside or ("\0",)):
            inside = (*inside, f"{name}.") if isinstance(module, CompactLinear) else inside
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, CompactLinear) or any(x.ndim >= 2 and id(x) not in known_tensors for x in tensors):
            inside = (*inside, f"{name}.")
            yield name, module
