"""What a weight method is, and how a compressed copy of a model is made without touching the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from workbench.engine import exclusive
from workbench.errors import BadBudget, BadRecipe, BudgetTooSmall, NotApplicable
from workbench.progress import Progress
from workbench.registry import Family, Method


class WeightMethod(Method):
    """Base of all methods that make a model's weights smaller.

    Budget: the share of the 16-bit bytes of the weight matrices that the method compresses, or a size for them.
    """

    family: ClassVar[Family] = "weights"
    measure: ClassVar[str] = "16-bit size"  # what `full_nbytes` counts, in words

    def refuses(self, linear: nn.Linear) -> str | None:
        """Why this layer must be left alone whatever the parameters; None if it can be compressed."""
        return None

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        """Which of these layers must be left alone because of where they stand in the model, by name, and why."""
        return {}

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        """Raise NotApplicable, naming the layers, where the parameters do not fit them; nothing was started yet."""

    def nbytes(self, linear: nn.Linear) -> int:
        """Bytes of what becomes of this layer's weight."""
        raise NotImplementedError

    def full_nbytes(self, linear: nn.Linear) -> int:
        """Bytes of this layer's weight by which budgets are measured: those at 16 bits."""
        return 2 * linear.weight.numel()

    def compress(self, linear: nn.Linear) -> nn.Module:
        """The layer that stands in for this one, which stays as it is."""
        raise NotImplementedError

    def apply(self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], progress: Progress) -> None:
        """Put what becomes of these layers into the copy `twin`; override where they depend on each other."""
        for name, linear in progress.track(linears.items(), f"compressing by {self.key}", len(linears)):
            twin.set_submodule(name, self.compress(linear))

    def left_alone(self, model: nn.Module) -> dict[str, str]:
        """The weight matrices that keep their precision, by name, and why; vectors such as biases are not listed."""
        return Survey.of(model, self).left

    def note(self, model: nn.Module) -> str:
        """One line for a run's record: what was compressed to which size, and what was left alone."""
        survey = Survey.of(model, self)
        compact, full = survey.nbytes, survey.full_nbytes
        left = sorted(survey.left.items(), key=lambda item: item[1])
        parts = [_several([name for name, _ in same], reason) for reason, same in groupby(left, lambda item: item[1])]
        kept = f"; left alone: {'; '.join(parts)}" if parts else ""
        return (
            f"{self.key}: {len(survey.linears)} linear layers in {compact / 2**20:.1f} MiB "
            f"({compact / full:.1%} of their {self.measure}){kept}"
        )


@dataclass(frozen=True)
class Survey:
    """What a weight method finds in a model.

    linears: the layers that it compresses, by name. left: the other weight matrices, with the reason.
    """

    method: WeightMethod
    linears: dict[str, nn.Linear]
    left: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, method: WeightMethod) -> Survey:
        """Look through a model. Raises NotApplicable where the method finds nothing to compress."""
        owners: dict[int, str] = {}  # of each weight matrix: the first module that has it
        counts: dict[int, int] = {}
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    owners.setdefault(id(parameter), name or own)
                    counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        linears: dict[str, nn.Linear] = {}
        left: dict[str, str] = {}
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    continue
                owner = owners[id(parameter)]
                if isinstance(module, nn.Embedding):
                    left[name] = "an embedding is looked up, not multiplied"
                elif owner != name and isinstance(module, nn.Linear):
                    left[name] = f"tied to {owner}"
                elif counts[id(parameter)] > 1:
                    left[name] = "its weight is shared with another module"
                elif module is head:
                    left[name] = "the output head keeps its precision"
                elif type(module) is not nn.Linear:
                    what = "fused experts, not linear layers" if parameter.ndim > 2 else "not a plain linear layer"
                    left[f"{name}.{own}"] = f"{what} ({type(module).__name__})"
                else:
                    reason = method.refuses(module)
                    if reason is None:
                        linears[name] = module
                    else:
                        left[name] = reason
        refused = method.refused(model, linears)
        linears = {name: linear for name, linear in linears.items() if name not in refused}
        left.update(refused)
        if not linears:
            raise NotApplicable(f"{method.key}: this model has no linear layer left that could be compressed")
        return cls(method, linears, left)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed layers."""
        return sum(self.method.nbytes(linear) for linear in self.linears.values())

    @property
    def full_nbytes(self) -> int:
        """Bytes of the same layers as the method measures them, usually at 16 bits."""
        return sum(self.method.full_nbytes(linear) for linear in self.linears.values())

    def check(self) -> None:
        """Raise NotApplicable or BudgetTooSmall before anything is computed."""
        method = self.method
        method.check(self.linears)
        if method.effective_budget is None:
            return
        limit = method.effective_budget.nbytes(self.full_nbytes)
        if limit is None:
            raise BadBudget(f'{method.key}: weights have no budget in tokens; give a share (0.3) or a size ("64MiB")')
        if self.nbytes > limit:
            smallest = math.ceil(self.nbytes / self.full_nbytes * 1e4) / 1e4
            raise BudgetTooSmall(
                f"{method.key}: the budget {method.effective_budget} of the weights' {method.measure} cannot be met "
                f"with {_settings(method)}; the smallest possible is {smallest:.4g}",
                smallest,
            )


def compressed(model: PreTrainedModel, methods: Sequence[Method], progress: Progress | None = None) -> PreTrainedModel:
    """A copy of the model compressed by `methods`, one after another.

    It shares every tensor that they leave unchanged; the model itself is never written to. progress: one step a layer.
    Raises NotApplicable, BudgetTooSmall, MissingExtra, Cancelled; then no copy remains.
    """
    progress = progress or Progress()
    twin = sharing_copy(model)
    for method in methods:
        if not isinstance(method, WeightMethod):
            raise BadRecipe(f"{method.key} is no weight method: it is of the family {method.family!r}")
        survey = Survey.of(twin, method)
        survey.check()
        method.apply(twin, survey.linears, progress)
    return twin


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the tree of modules that shares all parameters and buffers with the model."""
    with exclusive(model):  # not while a run has another attention implementation set
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, dict(shared))


def _several(names: Sequence[str], reason: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} ({reason})"


def _settings(method: Method) -> str:
    return ", ".join(f"{parameter.name}={getattr(method, parameter.name)}" for parameter in method.parameters())
