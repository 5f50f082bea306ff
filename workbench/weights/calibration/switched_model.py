"""A copy of a model whose layers are switched between levels, judged over calibration texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import exclusive
from workbench.models.decoder import placed
from workbench.progress import Progress
from workbench.weights.calibration.block_runner import BlockRunner
from workbench.weights.calibration.model_head import ModelHead
from workbench.weights.layers import CompactLinear
from workbench.weights.surgery.sharing_copy import sharing_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SwitchedModel:
    """A copy of a model whose layers are switched between levels, and how far it then is from the model.

    ids: int64 [t, n], the texts. names: of the layers. made: at each level what stands for each layer, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        names: Sequence[str],
        made: Sequence[Mapping[str, nn.Module]],
        progress: Progress,
    ) -> None:
        self._names, self._made, self._progress = names, made, progress
        self._copy = sharing_copy(model)
        self._levels = torch.full((len(names),), -1)
        with exclusive(model):
            self._runner = BlockRunner(model, ids)
            self._entering = self._runner.hidden
            for name, _ in progress.track(self._runner, "reading the texts", len(list(self._runner))):
                for _ in self._runner.run(name):
                    progress.check()
            self._want = self._runner.hidden
        self._head = ModelHead(model)
        self._blocks = [name for name, _ in self._runner]

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return self._entering.shape[0]

    def divergence(self, levels: Tensor, texts: Sequence[int]) -> float:
        """From the model's distributions to those at these levels, averaged over the tokens of these texts."""
        for index in (levels != self._levels).nonzero()[:, 0].tolist():
            self._switch(index, int(levels[index]))
        self._levels = levels.clone()
        at = torch.tensor(texts, device=self._entering.device)
        return self._from(0, self._entering[at], at)

    def slopes(self, levels: Tensor, texts: Sequence[int], progress: Progress) -> Tensor:
        """How much more the model diverges, float64 [u, 2], when one layer alone is a level lower, and a level higher;
        infinity where there is no such level. Only what comes after that layer runs again.
        """
        base = self.divergence(levels, texts)
        at = torch.tensor(texts, device=self._entering.device)
        entering = [self._entering[at]]
        for name in self._blocks[:-1]:
            entering.append(self._runner.forward(name, entering[-1], self._copy.get_submodule(name)))
        slopes = torch.full((len(self._names), 2), torch.inf, dtype=torch.float64)
        for index, name in enumerate(progress.track(self._names, "measuring each layer", len(self._names))):
            first = placed(name, self._blocks)[0] or 0
            before = self._copy.get_submodule(name)
            for side, level in enumerate((int(levels[index]) - 1, int(levels[index]) + 1)):
                if 0 <= level < len(self._made):
                    self._switch(index, level)
                    slopes[index, side] = self._from(first, entering[first], at) - base
            self._copy.set_submodule(name, before)
        return slopes

    def _switch(self, index: int, level: int) -> None:
        name = self._names[index]
        self._copy.set_submodule(name, quickest(self._made[level][name], self._copy.dtype))

    def _from(self, first: int, hidden: Tensor, texts: Tensor) -> float:
        for name in self._blocks[first:]:
            self._progress.check()
            hidden = self._runner.forward(name, hidden, self._copy.get_submodule(name))
        return self._head.divergence(self._want[texts], hidden)


def quickest(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What computes the same as a small layer, and quicker: a plain layer, where that does; else the layer itself."""
    if not isinstance(layer, CompactLinear) or type(layer).forward is not CompactLinear.forward:
        return layer
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.dequantised(dtype), requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain
