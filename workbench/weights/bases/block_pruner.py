"""What methods that leave out whole blocks of a decoder have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import nn

from workbench.models.decoder import decoder_layers, placed
from workbench.weights.bases.structured import StructuredMethod, WithinBudget
from workbench.weights.surgery.depth import check_depth
from workbench.weights.surgery.linears import outside
from workbench.weights.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockPruner(StructuredMethod):
    """Base of methods that leave out whole blocks, whatever is in them; at least the largest of them stays."""

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        return outside(model, linears)

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = Survey.of(model, self)
        if self.limit(survey.linears) is not None:  # before anything is learned
            check_depth(cast("PreTrainedModel", model))
        sizes = [size for size in self.block_nbytes(model, survey.linears) if size]
        return WithinBudget(**vars(survey), whole=sum(sizes), least=max(sizes))

    def block_nbytes(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> list[int]:
        """What those of these layers take that stand in each block."""
        names = list(decoder_layers(model))
        sizes = [0] * len(names)
        for name, linear in linears.items():
            index = placed(name, names)[0]
            assert index is not None  # `refused` left no others
            sizes[index] += self.full_nbytes(linear)
        return sizes
