"""What a recipe's weight methods make of a model that is not there: bytes, as the methods foretell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from workbench.cost.architecture import Architecture, Matrix
from workbench.errors import BadRecipe, NotApplicable
from workbench.weights import WeightMethod
from workbench.weights.compress import weight_methods
from workbench.weights.stages import ordered
from workbench.weights.survey import Survey, grouped

_PLAIN = "linear"
_MEASURED_BITS = (2, 4, 8)


@dataclass(frozen=True)
class HeldMatrix:
    """A matrix as it lies in memory under a recipe, and the kernel whose measured times it is told by."""

    matrix: Matrix
    nbytes: float
    kernel: str


@dataclass(frozen=True)
class Weights:
    """All weights under a recipe. notes: what is left alone and why, and what is not told exactly."""

    nbytes: int
    full_nbytes: int
    matrices: tuple[HeldMatrix, ...]
    notes: tuple[str, ...] = ()


def weights_under(methods: Sequence[Any], model: Any, architecture: Architecture) -> Weights:
    """The weights of a blank model under these methods.

    Raises what surveying raises, NotApplicable where a method's size follows from the weights themselves, and BadRecipe
    for several methods of which one is given what another leaves.
    """
    full = architecture.weight_nbytes
    plain = tuple(HeldMatrix(matrix, matrix.nbytes, _PLAIN) for matrix in architecture.matrices)
    chosen = ordered(weight_methods(methods))
    if not chosen:
        return Weights(full, full, plain)
    beside = [method for method in chosen if method.stage in ("transform", "activations")]
    main = [method for method in chosen if method not in beside]
    if len(main) > 1:
        raise BadRecipe(
            f"{' and '.join(method.key for method in main)}: what one leaves for the other is only known once it is "
            "applied; estimate one of them at a time"
        )
    surveys = {method.key: _surveyed(method, model) for method in chosen}
    deciding = surveys[(main or beside)[-1].key]
    known = _nbytes(deciding)
    before = {name: linear.weight.nbytes for name, linear in deciding.linears.items()}
    nbytes = full - sum(before.values()) + deciding.nbytes
    for method in beside if main else beside[:-1]:
        other = surveys[method.key]
        nbytes += other.nbytes - sum(linear.weight.nbytes for linear in other.linears.values())
    share = deciding.nbytes / sum(before.values())
    kernel = _kernel((main or beside)[-1])
    held = tuple(
        HeldMatrix(each.matrix, known.get(each.matrix.path, each.nbytes * share), kernel)
        if each.matrix.path in before
        else each
        for each in plain
    )
    notes = [f"weights left alone: {grouped(deciding.left)}"] if deciding.left else []
    if main and any(method.stage == "transform" for method in beside):
        notes.append("vectors that a rotation folds into matrices are counted as they were")
    if any(method.stage == "structure" for method in chosen):
        notes.append("layers and heads that are taken out save their KV too, which is counted as if they stayed")
    return Weights(nbytes, full, held, tuple(notes))


def _surveyed(method: WeightMethod, model: Any) -> Survey:
    try:
        survey = method.survey(model)
        survey.check()
        _ = survey.nbytes
    except (RuntimeError, NotImplementedError) as error:  # torch's answer where a number is asked of a meta tensor
        raise NotApplicable(f"{method.key} looks at the weights before it can tell its size") from error
    return survey


def _nbytes(survey: Survey) -> Mapping[str, int]:
    """Bytes of each layer, where the method tells them one by one and they add up."""
    method: Any = survey.method
    linears: Mapping[str, nn.Linear] = survey.linears
    try:
        each = {name: int(method.nbytes(linear)) for name, linear in linears.items()}
    except (NotImplementedError, RuntimeError):
        return {}
    return each if sum(each.values()) == survey.nbytes else {}


def _kernel(method: WeightMethod) -> str:
    """The measured kernel that computes with what the method makes; that of plain matrices where there is none."""
    if method.stage == "select":
        return "linear sparse"
    if method.stage == "factor":
        return "linear low rank"
    bits = getattr(method, "bits", None)
    return f"linear packed {bits} bit" if method.stage == "round" and bits in _MEASURED_BITS else _PLAIN
