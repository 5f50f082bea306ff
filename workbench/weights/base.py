"""What a weight method is, and how a compressed copy of a model is made without touching the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from workbench.errors import CalibrationFailed, OutOfRange
from workbench.progress import Progress
from workbench.registry import Family, Method
from workbench.weights.calibration.block_pass import BlockPass, passes
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.surgery.linears import outside
from workbench.weights.survey import Survey, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stage = Literal["structure", "transform", "factor", "select", "round", "activations"]
"""What a method does in a recipe of several weight methods (`workbench.weights.stages`)."""


class WeightMethod(Method):
    """Base of all methods that make a model's weights smaller.

    Budget: the share of the 16-bit bytes of the weight matrices that the method is for, or a size for them: by default
    those of the decoder's layers. What it cannot compress there, such as fused experts, counts at its full size; a
    budget that this leaves no room for is refused. The embedding and the output head stay, and do not count.

    Stages: `survey` says which matrices are taken and which are left, with the reason; `check` refuses what the
    parameters do not fit; `nbytes` or `total_nbytes` foretell the size, before anything is computed; `compress` makes
    one small layer from one plain one and what calibration saw of its input. A method that looks at what leaves a block
    overrides `refine`; one whose layers depend on each other in other ways, `apply`.
    """

    family: ClassVar[Family] = "weights"
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"needs_moment": "needs_hessian", "takes_size": "takes_budget"}
    )
    measure: ClassVar[str] = "16-bit size"  # what `full_nbytes` counts, in words
    needs_inputs: ClassVar[bool] = False  # `compress` is given what calibration saw of the layer's input ...
    needs_hessian: ClassVar[bool] = False  # ... with its second moment [i, i]
    stage: ClassVar[Stage] = "round"  # the methods of a recipe are applied in this order
    takes_pruned: ClassVar[bool] = False  # keeps weights at zero that a method before it left out (`kept_of`)
    every_size: ClassVar[bool] = False  # made once for all budgets: another one only loads more or less of it

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether a budget chooses how small the weights become; elsewhere that follows from the parameters."""
        return cls.default_budget is not None or cls.every_size

    @property
    def together(self) -> str:
        """Why its layers only make sense together; empty: each stands for the one of its name, whatever becomes of the
        others.
        """
        return ""

    def refuses(self, linear: nn.Linear) -> str | None:
        """Why this layer must be left alone whatever the parameters; None if it can be compressed."""
        if not linear.weight.is_floating_point():
            return f"its weight is {linear.weight.dtype}, not floating point"
        return None

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        """Which of these layers must be left alone because of where they stand in the model, by name, and why."""
        return outside(model, linears) if self.needs_inputs or self.needs_hessian else {}

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
        if type(self).refine is not WeightMethod.refine:
            self._block_by_block(twin, linears, study, progress)
            return
        for name, linear, inputs in self.visit(linears, study, progress, twin if self.recalibrates else None):
            with self.naming(name):
                twin.set_submodule(name, self.compress(linear, inputs))

    def refine(self, passed: BlockPass, linears: Mapping[str, nn.Linear]) -> Mapping[str, nn.Module]:
        """What becomes of those of a block's layers that are judged by what leaves the block, or one of its modules.

        Override it where layers of a block depend on each other, or on what comes before them in it: it may put other
        modules and parameters into `passed.block`. linears: those of the block that the method takes, by full name.
        Layers that are not in what it returns go to `compress`.
        """
        del passed, linears
        return {}

    def _block_by_block(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        done, behind = 0, twin if self.recalibrates else None
        hessians = self.needs_hessian
        for passed in passes(study, twin, self.texts_refined, hessians=hessians, progress=progress, behind=behind):
            own = {name: linears[name] for name in passed.inputs if name in linears}
            made = self.refine(passed, own) if own else {}
            for name, linear in own.items():
                progress.update(f"compressing by {self.key}", done, len(linears))
                with self.naming(name):
                    small = made[name] if name in made else self.compress(linear, passed.inputs[name])
                twin.set_submodule(name, small)
                done += 1
        progress.update(f"compressing by {self.key}", done, len(linears))

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

    @property
    def texts_refined(self) -> int:
        """How many calibration texts `refine` is shown on their way through the blocks."""
        return 4

    @property
    def recalibrates(self) -> bool:
        """Whether each block is calibrated on what the compressed blocks before it make of the texts."""
        return False

    def visit(
        self,
        linears: Mapping[str, nn.Linear],
        study: WeightStudy,
        progress: Progress,
        behind: PreTrainedModel | None = None,
    ) -> Iterator[tuple[str, nn.Linear, InputStats | None]]:
        """Each of these layers, with what calibration saw of its input where the method needs that; reports each.

        behind: the copy whose compressed blocks come before (see `WeightStudy.inputs`); None: the model's own do.
        """
        stage = f"compressing by {self.key}"
        if not (self.needs_inputs or self.needs_hessian):
            for name, linear in progress.track(linears.items(), stage, len(linears)):
                yield name, linear, None
            return
        done = 0
        for _, inputs in study.inputs(hessians=self.needs_hessian, progress=progress, behind=behind):
            for name in (name for name in linears if name in inputs):
                progress.update(stage, done, len(linears))
                yield name, linears[name], inputs[name]
                done += 1
        progress.update(stage, done, len(linears))

    def left_alone(self, model: nn.Module) -> dict[str, str]:
        """The weight matrices that keep their precision, by name, and why; vectors such as biases are not listed."""
        return self.survey(model).left

    def recast(self, model: nn.Module) -> dict[str, str]:
        """The layers whose numbers stand for something else than the model's afterwards, by name, and why.

        Their weights and outputs are not to be compared with those of the same name in the model, though what the
        model computes is the same: factors of their inputs or outputs are held elsewhere, or what flows between layers
        was rotated.
        """
        del model
        return {}

    def note(self, model: nn.Module) -> str:
        """One line for a run's record: what was compressed to which size, and what was left alone."""
        survey = self.survey(model)
        compact, full = survey.nbytes, survey.full_nbytes
        kept = f"; left alone: {grouped(survey.left)}" if survey.left else ""
        return (
            f"{self.key}: {len(survey.linears)} linear layers in {compact / 2**20:.1f} MiB "
            f"({compact / full:.1%} of their {self.measure}){kept}"
        )
