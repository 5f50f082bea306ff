"""What a weight method is, and how a compressed copy of a model is made without touching the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.engine.attention_hook import exclusive
from workbench.errors import BadBudget, BadRecipe, BudgetTooSmall, CalibrationFailed, NotApplicable, OutOfRange
from workbench.models.linear import linear_of, multiplied_weights
from workbench.progress import Progress
from workbench.registry import Family, Method
from workbench.weights.calibration.block_by_block import blocks, output_head, outside
from workbench.weights.calibration.statistics import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = Calibration(SAMPLED, samples=16, tokens=64)  # where nobody says on what to calibrate


class WeightMethod(Method):
    """Base of all methods that make a model's weights smaller.

    Budget: the share of the 16-bit bytes of the weight matrices that the method is for, or a size for them: by default
    those of the decoder's layers. What it cannot compress there, such as fused experts, counts at its full size; a
    budget that this leaves no room for is refused. The embedding and the output head stay, and do not count.

    Stages: `survey` says which matrices are taken and which are left, with the reason; `check` refuses what the
    parameters do not fit; `nbytes` or `total_nbytes` foretell the size, before anything is computed; `compress` makes
    one small layer from one plain one and what calibration saw of its input. A method whose layers depend on each other
    overrides `apply`.
    """

    family: ClassVar[Family] = "weights"
    measure: ClassVar[str] = "16-bit size"  # what `full_nbytes` counts, in words
    needs_inputs: ClassVar[bool] = False  # `compress` is given what calibration saw of the layer's input ...
    needs_moment: ClassVar[bool] = False  # ... with its second moment [i, i]
    every_size: ClassVar[bool] = False  # made once for all budgets: another one only loads more or less of it
    alone: ClassVar[bool] = True  # each small layer stands for the one of its name, whatever becomes of the others

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether a budget chooses how small the weights become; elsewhere that follows from the parameters."""
        return cls.default_budget is not None or cls.every_size

    def refuses(self, linear: nn.Linear) -> str | None:
        """Why this layer must be left alone whatever the parameters; None if it can be compressed."""
        if not linear.weight.is_floating_point():
            return f"its weight is {linear.weight.dtype}, not floating point"
        return None

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        """Which of these layers must be left alone because of where they stand in the model, by name, and why."""
        return outside(model, linears) if self.needs_inputs or self.needs_moment else {}

    def survey(self, model: nn.Module) -> Survey:
        """What the method finds in a model: by default every linear layer but the output head."""
        return Survey.of(model, self)

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        """Raise NotApplicable, naming the layers, where the parameters do not fit them; nothing was started yet."""

    def nbytes(self, linear: nn.Linear) -> int:
        """Bytes of what becomes of this layer's weight."""
        raise NotImplementedError

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        """Bytes of what becomes of all these layers, at most; the sum of `nbytes` where each is by itself."""
        return sum(self.nbytes(linear) for linear in linears.values())

    def full_nbytes(self, linear: nn.Linear) -> int:
        """Bytes of this layer's weight by which budgets are measured: those at 16 bits."""
        return 2 * linear.weight.numel()

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        """The layer that stands in for this one, which stays as it is. inputs: what calibration saw, where needed."""
        raise NotImplementedError

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        """Put what becomes of these layers into the copy `twin`; override where they depend on each other.

        study: calibration of the model as it was before this method. What does not depend on the budget may be kept
        there (`study.once(self.parameter_key(), ...)`), so that a slider costs little.
        """
        for name, linear, inputs in self.visit(linears, study, progress):
            with self.naming(name):
                twin.set_submodule(name, self.compress(linear, inputs))

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """What fails for want of calibration or of range while the block runs says that this layer did."""
        try:
            yield
        except CalibrationFailed as failure:
            raise CalibrationFailed(f"{self.key}, {name}: {failure}") from failure
        except OutOfRange as failure:
            raise OutOfRange(
                f"{self.key}, {name}: {failure}; a method that holds it in another form may do"
            ) from failure

    def visit(
        self, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> Iterator[tuple[str, nn.Linear, InputStats | None]]:
        """Each of these layers, with what calibration saw of its input where the method needs that; reports each."""
        stage = f"compressing by {self.key}"
        if not (self.needs_inputs or self.needs_moment):
            for name, linear in progress.track(linears.items(), stage, len(linears)):
                yield name, linear, None
            return
        done = 0
        for _, inputs in study.inputs(moments=self.needs_moment, progress=progress):
            for name in (name for name in linears if name in inputs):
                progress.update(stage, done, len(linears))
                yield name, linears[name], inputs[name]
                done += 1
        progress.update(stage, done, len(linears))

    def left_alone(self, model: nn.Module) -> dict[str, str]:
        """The weight matrices that keep their precision, by name, and why; vectors such as biases are not listed."""
        return self.survey(model).left

    def note(self, model: nn.Module) -> str:
        """One line for a run's record: what was compressed to which size, and what was left alone."""
        survey = self.survey(model)
        compact, full = survey.nbytes, survey.full_nbytes
        kept = f"; left alone: {_grouped(survey.left)}" if survey.left else ""
        return (
            f"{self.key}: {len(survey.linears)} linear layers in {compact / 2**20:.1f} MiB "
            f"({compact / full:.1%} of their {self.measure}){kept}"
        )


@dataclass(frozen=True)
class Survey:
    """What a weight method finds in a model.

    linears: the layers that it compresses, by name. left: the other weight matrices, with the reason. fixed: how many
    numbers those of the left ones hold that stand in the decoder's layers and are of a form that the method has no
    answer to: fused experts, routers. A budget is a share of both: what it asks of the layers is less by what is fixed.
    method: with the budget that is left for the layers; asked: as it was asked for.
    """

    method: WeightMethod
    linears: dict[str, nn.Linear]
    left: dict[str, str]
    fixed: dict[str, int] = field(default_factory=dict, kw_only=True)
    asked: WeightMethod | None = field(default=None, kw_only=True)

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
        head = output_head(model)
        inside = tuple(f"{name}." for name in blocks(model)) if hasattr(model, "config") else ("",)
        linears: dict[str, nn.Linear] = {}
        left: dict[str, str] = {}
        fixed: dict[str, int] = {}
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    continue
                owner, linear = owners[id(parameter)], linear_of(module)
                path = name if linear is not None or isinstance(module, nn.Embedding) else f"{name}.{own}"
                if isinstance(module, nn.Embedding):
                    left[path] = "an embedding is looked up, not multiplied"
                elif owner != name and linear is not None:
                    left[path] = f"tied to {owner}"
                elif counts[id(parameter)] > 1:
                    left[path] = "its weight is shared with another module"
                elif module is head:
                    left[path] = "the output head keeps its precision"
                elif linear is None:
                    what = "fused experts, not linear layers" if parameter.ndim > 2 else "not a plain linear layer"
                    left[path] = f"{what} ({type(module).__name__})"
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
                f"{_grouped({name: why for name, why in left.items() if name.startswith(inside)} or left)}"
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
            stays = f", as {fixed / full:.1%} of it stay: {_grouped(reasons)}"
        return BudgetTooSmall(
            f"{asked.key}: the budget {asked.effective_budget} of the weights' {asked.measure} cannot be met"
            f"{_settings(asked)}{stays}; the smallest possible is {smallest:.4g}",
            smallest,
        )


_LEAST = 1e-6  # the share that is asked of layers which have nothing left of the budget: less than any method can


def _within(method: WeightMethod, linears: Mapping[str, nn.Linear], fixed: int) -> WeightMethod:
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


def _measured(method: WeightMethod, linears: Mapping[str, nn.Linear], numbers: int) -> int:
    """Bytes of so many numbers as the method measures those of its layers."""
    weights = sum(linear.weight.numel() for linear in linears.values())
    return numbers * sum(map(method.full_nbytes, linears.values())) // weights


def _read_elsewhere(model: nn.Module, name: str) -> str | None:
    """Why nothing can stand in the place of a linear layer: its owner multiplies the weight itself."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    return f"{type(owner).__name__} multiplies its weight itself" if own in multiplied_weights(owner) else None


def compressed(
    model: PreTrainedModel,
    methods: Sequence[Method],
    progress: Progress | None = None,
    study: Callable[[PreTrainedModel, int], WeightStudy] | None = None,
) -> PreTrainedModel:
    """A copy of the model compressed by `methods`, one after another.

    It shares every tensor that they leave unchanged; the model itself is never written to. progress: one step a layer.
    study: gives the calibration of the model as it is before the method of that number (default: on a few short texts
    that the model itself says). Raises NotApplicable, BudgetTooSmall, MissingExtra, Cancelled; then no copy remains.
    """
    progress = progress or Progress()
    twin = model
    for number, method in enumerate(methods):
        if not isinstance(method, WeightMethod):
            raise BadRecipe(f"{method.key} is no weight method: it is of the family {method.family!r}")
        before, twin = twin, sharing_copy(twin)
        survey = method.survey(twin)
        survey.check()
        known = study(before, number) if study else WeightStudy(before, calibration=SHORT)
        survey.method.apply(twin, survey.linears, known, progress)
    return twin if methods else sharing_copy(model)


def weight_methods(methods: Sequence[Method]) -> list[WeightMethod]:
    """The same methods, all of which change weights. Raises BadRecipe, naming them, where there are others."""
    others = [method.key for method in methods if not isinstance(method, WeightMethod)]
    if others:
        raise BadRecipe(f"{', '.join(others)}: only weight methods change the model's weights; leave the others out")
    return [method for method in methods if isinstance(method, WeightMethod)]


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the tree of modules that shares all parameters and buffers with the model."""
    with exclusive(model):  # not while a run has another attention implementation set
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, dict(shared))


def _grouped(reasons: Mapping[str, str]) -> str:
    """Matrices with their reasons in one line: of each reason the first one and how many more."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    more = {reason: f" and {len(same) - 1} more" if len(same) > 1 else "" for reason, same in names.items()}
    return "; ".join(f"{same[0]}{more[reason]} ({reason})" for reason, same in names.items())


def _settings(method: Method) -> str:
    found = ", ".join(f"{parameter.name}={getattr(method, parameter.name)}" for parameter in method.parameters())
    return f" with {found}" if found else ""
