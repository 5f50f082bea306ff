"""TransAct."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.structured import WithinBudget
from workbench.weights.bases.structured_pruner import IntraModulePruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.surgery.prunable import PrunableAttention, PrunableModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class TransAct(IntraModulePruner):
    """Leave out dimensions inside attention and MLP modules that carry little, and keep what flows between modules.

    Inside a module lie its transitional activations: the neurons of an MLP, and in attention what each head takes out
    of its values. Those with the smallest magnitude over calibration texts (root of the mean square) go, with the rows
    and columns of the weights around them, the same share in every module and head; the query heads that share a KV
    head count together. Matrices are really smaller, and so is the cache, whose values have fewer channels. Pruning is
    iterative: a part goes, the activations of what is left are measured again, the next part goes.

    The published method also prunes queries and keys, and trains the pruned model on. Here
    queries and keys stay whole, so that scores are exact and rotary positions keep their meaning, and nothing is
    trained, so that much smaller shares can be pruned.

    Budget: the share of the bytes of the layers that are pruned, at the precision they are held in.
    """

    key = "transact"
    title = "TransAct"
    paper = Paper(
        "Pruning Large Language Models to Intra-module Low-rank Architecture with Transitional Activations",
        "Shen et al. 2024",
        "2407.05690",
    )
    claim = "smaller weights, KV cache and attention at high compression, with training after pruning"
    fidelity = Fidelity(
        "untrained part of a trained method", "queries and keys stay whole, and nothing is trained after pruning"
    )
    default_budget = 0.9

    texts: int = param(
        16,
        ge=1,
        le=1024,
        help="calibration texts over which activations are measured",
        own="the paper's corpus and its size could not be read",
    )
    tokens: int = param(
        128, ge=8, le=8192, unit="tokens", help="how much of each is read", own="as for the number of texts"
    )
    rounds: int = param(
        2, ge=1, le=16, help="in how many steps the dimensions go", own="the paper prunes while it trains"
    )

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = super().survey(model)
        assert isinstance(survey.method, TransAct)  # with the budget that is left for these layers
        modules = self.prunable_modules(model, tuple(survey.linears))
        widths = survey.method.widths(modules)
        nbytes = sum(module.dimension_nbytes * width for module, width in zip(modules, widths, strict=True))
        return replace(survey, whole=nbytes, least=nbytes)

    def widths(self, modules: Sequence[PrunableModule]) -> list[int]:
        """How many dimensions of each head, or neurons, each module keeps.

        Each head keeps the budget's share of its channels, at least one; neurons take what is left of the budget.
        """
        assert self.effective_budget is not None
        attention = [module for module in modules if isinstance(module, PrunableAttention)]
        whole, values = (sum(module.dimension_nbytes * module.width for module in m) for m in (modules, attention))
        limit = self.effective_budget.nbytes(whole)
        if limit is None:  # a budget in tokens, which is refused
            return [module.width for module in modules]
        room = limit
        if attention:
            room -= values * _within(attention[0].width, limit / whole) // attention[0].width
        return [
            _within(module.width, limit / whole if module in attention else room / (whole - values))
            for module in modules
        ]

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        modules = self.prunable_modules(twin, tuple(linears))
        targets, begun = self.widths(modules), [module.width for module in modules]
        if begun == targets:
            return
        ids = study.ids[: self.texts, : self.tokens]
        count = self.rounds * len(modules)
        for step in progress.track(range(count), f"compressing by {self.key}", count):
            done, index = divmod(step, len(modules))
            if index == 0:
                sizes = activations(twin, modules, ids)
            ahead = self.rounds - done - 1
            width = targets[index] + math.ceil((begun[index] - targets[index]) * ahead / self.rounds)
            modules[index].prune(twin, sizes[index].topk(width, dim=-1).indices.sort(dim=-1).values)


def _within(width: int, share: float) -> int:
    return min(max(int(width * share + 1e-9), 1), width)


def activations(model: PreTrainedModel, modules: list[PrunableModule], ids: Tensor) -> list[Tensor]:
    """Root mean square of each module's transitional activations over texts ids [t, n], float32 [heads, width] each."""
    sums: dict[str, Tensor] = {}
    with _observing(model, [module.out for module in modules], sums), torch.inference_mode():
        for text in ids.split(4):
            model(input_ids=text.to(device_of(model)), use_cache=False)
    return [module.by_head(sums[module.out] / ids.numel()).sqrt() for module in modules]


@contextmanager
def _observing(model: PreTrainedModel, names: list[str], sums: dict[str, Tensor]) -> Iterator[None]:
    """Until the block ends, add the squares of what enters these layers, over all tokens, to `sums`."""

    def add(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].float().square().flatten(0, -2).sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
