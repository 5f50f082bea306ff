"""What a weight method finds in a model, and what its budget leaves for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from torch import nn

from workbench.errors import BadBudget, BudgetTooSmall, NotApplicable
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of, wanted_weights
from workbench.weights.surgery.linears import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.budget import Budget, BudgetLike
    from workbench.progress import Progress
    from workbench.registry import Parameter
    from workbench.weights.calibration.study import WeightStudy


class Surveying(Protocol):
    """What a survey asks of a weight method (`workbench.weights.base`)."""

    key: ClassVar[str]
    measure: ClassVar[str]

    @property
    def budget(self) -> Budget | None: ...
    @property
    def effective_budget(self) -> Budget | None: ...
    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]: ...
    def with_budget(self, budget: BudgetLike | None) -> Self: ...
    def refuses(self, linear: nn.Linear) -> str | None: ...
    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]: ...
    def check(self, linears: Mapping[str, nn.Linear]) -> None: ...
    def full_nbytes(self, linear: nn.Linear) -> int: ...
    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int: ...
    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None: ...


@dataclass(frozen=True)
class Survey:
    """What a weight method finds in a model.

    linears: the layers that it compresses, by name. left: the other weight matrices, with the reason. fixed: how many
    numbers those of the left ones hold that stand in the decoder's layers and are of a form that the method has no
    answer to: fused experts, routers. A budget is a share of both: what it asks of the layers is less by what is fixed.
    method: with the budget that is left for the layers; asked: as it was asked for.
    """

    method: Surveying
    linears: dict[str, nn.Linear]
    left: dict[str, str]
    fixed: dict[str, int] = field(default_factory=dict, kw_only=True)
    asked: Surveying | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, model: nn.Module, method: Surveying) -> Survey:
        """Look through a model. Raises NotApplicable where the method finds nothing to compress."""
        owners: dict[int, str] = {}  # of each weight matrix: the first module that has it
        counts: dict[int, int] = {}
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    owners.setdefault(id(parameter), name or key)
                    counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        head = output_head(model)
        inside = tuple(f"{name}." for name in decoder_layers(model)) if hasattr(model, "config") else ("",)
        linears: dict[str, nn.Linear] = {}
        left: dict[str, str] = {}
        fixed: dict[str, int] = {}
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    continue
                owner, linear = owners[id(parameter)], linear_of(module)
                path = name if linear is not None or isinstance(module, nn.Embedding) else f"{name}.{key}"
                if isinstance(module, nn.Embedding):
                    left[path] = "an embedding is looked up, not multiplied"
                elif owner != name and linear is not None:
                    left[path] = f"tied to {owner}"
                elif counts[id(parameter)] > 1:
                    left[path] = "its weight is shared with another module"
                elif module is head:
                    left[path] = "the output head keeps its precision"
                elif linear is None:
                    left[path] = f"{_form(module, parameter)} ({type(module).__name__})"
                else:
                    reason = _read_elsewhere(model, name) or method.refuses(linear)
                    if reason is None:
                        linears[name] = linear
                        continue
                    left[path] = reason
                if path.startswith(inside):
                    fixed[path] = parameter.numel()
        refused = method.refused(model, linears)
        linears = {name: linear for name, linear in linears.items() if name not in refused}
        left.update(refused)
        if not linears:
            raise NotApplicable(
                f"{method.key}: this {type(model).__name__} has no linear layer left that could be compressed: "
                f"{grouped({name: why for name, why in left.items() if name.startswith(inside)} or left)}"
            )
        return cls(_within(method, linears, sum(fixed.values())), linears, left, fixed=fixed, asked=method)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed layers."""
        return self.method.total_nbytes(self.linears)

    @property
    def full_nbytes(self) -> int:
        """Bytes of the same layers as the method measures them, usually at 16 bits."""
        return sum(self.method.full_nbytes(linear) for linear in self.linears.values())

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of what stays in the decoder's layers whatever the budget, measured in the same way."""
        return _measured(self.method, self.linears, sum(self.fixed.values()))

    def check(self) -> None:
        """Raise NotApplicable or BudgetTooSmall before anything is computed."""
        method, asked = self.method, self.asked or self.method
        try:
            method.check(self.linears)
        except BudgetTooSmall as failure:
            if not self.fixed:
                raise
            raise self._too_small(math.ceil(failure.smallest * self.full_nbytes)) from failure
        if asked.effective_budget is None:
            return
        limit = asked.effective_budget.nbytes(self.full_nbytes + self.fixed_nbytes)
        if limit is None:
            raise BadBudget(f'{asked.key}: weights have no budget in tokens; give a share (0.3) or a size ("64MiB")')
        if self.nbytes + self.fixed_nbytes > limit:
            raise self._too_small(self.nbytes)

    def _too_small(self, least: int) -> BudgetTooSmall:
        """least: bytes that the layers take at least."""
        asked, fixed, full = self.asked or self.method, self.fixed_nbytes, self.full_nbytes + self.fixed_nbytes
        smallest = math.ceil((least + fixed) / full * 1e4) / 1e4
        stays = ""
        if fixed:
            reasons = {name: self.left[name] for name in sorted(self.fixed, key=lambda name: -self.fixed[name])}
            stays = f", as {fixed / full:.1%} of it stay: {grouped(reasons)}"
        return BudgetTooSmall(
            f"{asked.key}: the budget {asked.effective_budget} of the weights' {asked.measure} cannot be met"
            f"{_settings(asked)}{stays}; the smallest possible is {smallest:.4g}",
            smallest,
        )


_LEAST = 1e-6  # the share that is asked of layers which have nothing left of the budget: less than any method can


def _within(method: Surveying, linears: Mapping[str, nn.Linear], fixed: int) -> Surveying:
    """The method with the part of its budget that so many `fixed` numbers beside its layers leave for these."""
    budget = method.effective_budget
    if budget is None or not fixed or budget.kind == "tokens":
        return method
    full, rest = sum(map(method.full_nbytes, linears.values())), _measured(method, linears, fixed)
    limit = budget.nbytes(full + rest)
    assert limit is not None
    if budget.kind == "share" and budget.amount >= 1:
        return method
    room = limit - rest
    return method.with_budget(max(room / full, _LEAST) if budget.kind == "share" else f"{max(room, 1)} bytes")


def _measured(method: Surveying, linears: Mapping[str, nn.Linear], numbers: int) -> int:
    """Bytes of so many numbers as the method measures those of its layers."""
    weights = sum(linear.weight.numel() for linear in linears.values())
    return numbers * sum(map(method.full_nbytes, linears.values())) // weights


def _form(module: nn.Module, parameter: nn.Parameter) -> str:
    """What a matrix is whose module is no linear layer."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "a convolution, not a linear layer"
    return "fused experts, not linear layers" if parameter.ndim > 2 else "not a plain linear layer"


def _read_elsewhere(model: nn.Module, name: str) -> str | None:
    """Why nothing can stand in the place of a linear layer: its owner reads the weight itself."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    return f"{type(owner).__name__} reads its weight itself" if key in wanted_weights(owner) else None


def grouped(reasons: Mapping[str, str]) -> str:
    """Matrices with their reasons in one line: of each reason the first one and how many more."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    more = {reason: f" and {len(same) - 1} more" if len(same) > 1 else "" for reason, same in names.items()}
    return "; ".join(f"{same[0]}{more[reason]} ({reason})" for reason, same in names.items())


def _settings(method: Surveying) -> str:
    settings = ", ".join(f"{parameter.name}={getattr(method, parameter.name)}" for parameter in method.parameters())
    return f" with {settings}" if settings else ""
