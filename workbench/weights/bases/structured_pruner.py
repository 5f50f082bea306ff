"""What methods that make modules narrower inside have in common: which modules, and what their budget gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from workbench.weights.bases.structured import StructuredMethod, WithinBudget
from workbench.weights.surgery.prunable import PrunableAttention, PrunableMLP, PrunableModule, prunable_modules
from workbench.weights.survey import Survey


class StructuredPruner(StructuredMethod):
    """Base of methods that leave out whole dimensions inside modules, with the rows and columns of the weights there.

    Each module keeps at least one dimension.
    """

    narrows: ClassVar[tuple[type[PrunableModule], ...]] = (PrunableMLP,)  # which modules are made narrower

    def prunable_modules(self, model: nn.Module, names: Sequence[str] | None = None) -> list[PrunableModule]:
        """The modules of a model that the method makes narrower; names: only those whose layers are all among these."""
        return [module for module in prunable_modules(model, names) if isinstance(module, self.narrows)]

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        refused = super().refused(model, linears)
        others = [name for name in linears if name not in refused]
        inside = {name for module in self.prunable_modules(model, others) for name in module.layers}
        return refused | {name: self.stays_whole(name) for name in others if name not in inside}

    def stays_whole(self, name: str) -> str:
        """Why the layer of this name is in no module that becomes narrower."""
        kinds = " and in no ".join(kind.what.removeprefix("a ") for kind in self.narrows)
        return f"it stands in no {kinds}"

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = Survey.of(model, self)
        modules = self.prunable_modules(model, tuple(survey.linears))
        whole = sum(self.module_nbytes(module, module.width) for module in modules)
        least = sum(self.module_nbytes(module, 1) for module in modules)
        return WithinBudget(**vars(survey), whole=whole, least=least)

    def module_nbytes(self, module: PrunableModule, width: int) -> int:
        """Bytes of a module's layers once each of its heads has `width` dimensions."""
        return module.dimension_nbytes * width


class IntraModulePruner(StructuredPruner):
    """Base of methods that narrow attention's values and MLPs' neurons, and leave queries and keys whole: scores stay
    exact, and rotary positions keep their meaning.
    """

    narrows: ClassVar[tuple[type[PrunableModule], ...]] = (PrunableMLP, PrunableAttention)

    def stays_whole(self, name: str) -> str:
        if name.endswith(("q_proj", "k_proj")):
            return "queries and keys stay whole"
        return "it stands in no module whose inside is known"
