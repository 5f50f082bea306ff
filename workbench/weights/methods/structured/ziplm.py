"""ZipLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import NotApplicable
from workbench.progress import Progress
from workbench.registry import Paper, param, register
from workbench.weights.bases.structured_pruner import StructuredPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.solvers.latency import product_seconds
from workbench.weights.solvers.least_squares import damped, refitted
from workbench.weights.surgery.prunable import PrunableAttention, PrunableMLP, PrunableModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDS = 64  # in how many steps at least the structures of a head go: several at once where there are many


@dataclass(frozen=True)
class Removal:
    """In which order the dimensions of a module go, int64 [heads, width], and what that costs, float64 [width + 1].

    errors[m]: the change of the module's outputs once m dimensions of each head are gone, of the outputs' mean square.
    """

    order: Tensor
    errors: Tensor


def removal(weight: Tensor, hessian: Tensor, columns: Tensor, damping: float, together: int = 1) -> Removal:
    """Leave out structures of a weight [o, i] one after another, each time those that cost least, until none is left.

    columns: int64 [heads, width, c], the inputs that make up each structure; one of every head goes in each step, or
    `together` of them. The cost of a structure S is tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ); what stays makes up for it, W and H⁻¹ are
    brought up to date (Kurtic et al. 2023, arXiv:2302.04089, equations 2 and 3, algorithm 1). hessian: the mean of
    x xᵀ [i, i], damped as `refitted` does.
    """
    left = weight.double().clone()
    whole = damped(hessian, damping)
    inverse = torch.linalg.inv(whole)
    scale = float(((left @ whole) * left).sum().clamp_min(1e-30))
    heads, width, _ = columns.shape
    present = torch.ones(heads, width, dtype=torch.bool, device=columns.device)
    order: list[Tensor] = []
    errors = [0.0]
    while len(errors) <= width:
        costs = _costs(left, inverse, columns).masked_fill(~present, torch.inf)
        count = min(together, width - len(errors) + 1)
        chosen = costs.topk(count, dim=1, largest=False).indices  # [heads, count]
        gone = columns.gather(1, chosen[..., None].expand(-1, -1, columns.shape[2])).flatten()
        pivot = torch.linalg.inv(inverse[gone][:, gone])
        cost = float(((left[:, gone] @ pivot) * left[:, gone]).sum()) / scale
        rows = inverse[gone]
        left.addmm_(left[:, gone] @ pivot, rows, alpha=-1)
        inverse.addmm_(rows.T @ pivot, rows, alpha=-1)
        left[:, gone] = 0
        inverse[gone], inverse[:, gone] = 0, 0
        inverse[gone, gone] = 1  # so that what is gone can be inverted, and costs nothing
        present.scatter_(1, chosen, False)
        order.append(chosen)
        errors += [errors[-1] + cost * (step + 1) / count for step in range(count)]
        if 0 < 1.3 * int(present.sum()) * columns.shape[2] < left.shape[1]:
            left, inverse, columns = _compacted(left, inverse, columns, present)
    return Removal(torch.cat(order, dim=1), torch.tensor(errors, dtype=torch.double))


def _compacted(left: Tensor, inverse: Tensor, columns: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the columns that are gone; structures that are gone point to one of their head that is not."""
    alive = columns[present].flatten().sort().values
    places = torch.zeros(left.shape[1], dtype=torch.long, device=columns.device)
    places[alive] = torch.arange(len(alive), device=columns.device)
    some = columns.gather(1, present.int().argmax(dim=1)[:, None, None].expand(-1, 1, columns.shape[2]))
    columns = places[torch.where(present[..., None], columns, some)]
    return left[:, alive], inverse[alive][:, alive].contiguous(), columns


def _costs(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """What each structure costs, [heads, width]."""
    if columns.shape[2] == 1:
        flat = columns[..., 0]
        return weight.square().sum(dim=0)[flat] / inverse.diagonal()[flat]
    pivots = inverse[columns[..., :, None], columns[..., None, :]]  # [heads, width, c, c]
    part = weight.T[columns]  # [heads, width, c, o]
    costs: Tensor = (torch.linalg.solve(pivots, part) * part).sum(dim=(-1, -2))
    return costs


@register
class ZipLM(StructuredPruner):
    """Leave out MLP neurons and channels of attention's values where least is lost for the time that is saved.

    Each module's structures go in the order of structured second-order pruning, the rest making up for them (Kurtic et
    al. 2023); how long a module takes at each of some widths is measured on this machine, once a process, for
    `tokens` tokens at once. From the whole model on, the module whose next step loses least for each second it saves
    takes it, until the bytes are within the budget and, where `speedup` is given, the measured products of all pruned
    modules are that much faster together.

    The paper prunes whole heads; here every layer's cache needs as many KV heads as the others, so that each head gets
    narrower values instead. It searches widths by SPDY with trials on the whole model; here the error of each module's
    own outputs counts, of their mean square. Inputs are those of the uncompressed model; training is left out.
    """

    key = "ziplm"
    title = "ZipLM"
    paper = Paper("ZipLM: Inference-Aware Structured Pruning of Language Models", "Kurtic et al. 2023", "2302.04089")
    claim = "structured pruning that hits a target speed-up on the hardware at hand"
    default_budget = 0.8
    needs_hessian: ClassVar[bool] = True
    narrows = (PrunableMLP, PrunableAttention)

    speedup: float = param(1.0, ge=1, le=50, help="how much faster the pruned products have to be; 1: as they come")
    tokens: int = param(1, ge=1, le=8192, unit="tokens", help="how many are computed at once where time is measured")
    steps: int = param(16, ge=2, le=128, help="into how many widths each module is divided")
    damping: float = param(
        0.01, ge=1e-6, le=1, help="added to the diagonal of the inputs' Hessian, as a share of its mean"
    )

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None and self.speedup == 1:
            return
        modules = self.prunable_modules(twin, tuple(linears))
        key = ("ziplm", self.damping)
        removals = study.once(key, lambda: self._removals(modules, linears, study, progress))
        counts = self._searched(twin, modules, removals, limit)
        done = 0
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for module in (module for module in modules if module.out in inputs):
                progress.update(f"compressing by {self.key}", done, len(modules))
                if counts[module.name] < module.width:
                    kept = removals[module.name].order[:, module.width - counts[module.name] :].sort(dim=1).values
                    weight, hessian = linears[module.out].weight.detach(), inputs[module.out].hessian
                    columns = module.columns(kept).to(hessian.device)
                    with self.naming(module.out):
                        module.prune(twin, kept, refitted(weight, hessian, columns, self.damping))
                done += 1
        progress.update(f"compressing by {self.key}", len(modules), len(modules))

    def _removals(
        self,
        modules: Sequence[PrunableModule],
        linears: Mapping[str, nn.Linear],
        study: WeightStudy,
        progress: Progress,
    ) -> dict[str, Removal]:
        removals: dict[str, Removal] = {}
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for module in (module for module in modules if module.out in inputs):
                progress.update("finding what costs least", len(removals), len(modules))
                each = torch.arange(module.width).expand(module.heads, -1)
                structures = (
                    module.columns(each).view(module.heads, -1, module.width).transpose(1, 2)
                )  # [heads, width, c]
                hessian = inputs[module.out].hessian
                together = max(module.width // _ROUNDS, 1)
                weight = linears[module.out].weight.detach()
                removals[module.name] = removal(weight, hessian, structures.to(hessian.device), self.damping, together)
        return removals

    def _searched(
        self,
        twin: PreTrainedModel,
        modules: Sequence[PrunableModule],
        removals: Mapping[str, Removal],
        limit: int | None,
    ) -> dict[str, int]:
        """How many dimensions each module keeps."""
        levels = [_levels(module.width, self.steps) for module in modules]  # widest first
        seconds = [self._seconds(twin, module, widths) for module, widths in zip(modules, levels, strict=True)]
        errors = [removals[module.name].errors for module in modules]
        at = [0] * len(modules)
        nbytes = sum(self.module_nbytes(module, module.width) for module in modules)
        whole = time = sum(row[0] for row in seconds)

        def loss(index: int) -> float:
            """What the next step of a module loses, for each second that it saves."""
            width, less = levels[index][at[index] : at[index] + 2]
            lost = float(errors[index][modules[index].width - less] - errors[index][modules[index].width - width])
            return lost / max(seconds[index][at[index]] - seconds[index][at[index] + 1], 1e-12)

        while (limit is not None and nbytes > limit) or time > whole / self.speedup:
            open_ = [index for index in range(len(modules)) if at[index] + 1 < len(levels[index])]
            if not open_:
                break
            index = min(open_, key=loss)
            before, after = levels[index][at[index]], levels[index][at[index] + 1]
            nbytes -= modules[index].dimension_nbytes * (before - after)
            time -= seconds[index][at[index]] - seconds[index][at[index] + 1]
            at[index] += 1
        if time > whole / self.speedup * (1 + 1e-9):
            raise NotApplicable(
                f"{self.key}: the products that can be pruned get at most {whole / time:.3g} times as fast on this "
                f"machine, not {self.speedup:g} times"
            )
        return {module.name: levels[index][at[index]] for index, module in enumerate(modules)}

    def _seconds(self, twin: PreTrainedModel, module: PrunableModule, widths: Sequence[int]) -> list[float]:
        """How long a module's layers take at these widths, never longer when narrower."""
        seconds: list[float] = []
        for width in widths:
            total = 0.0
            for name, (axis, heads) in module.layers.items():
                layer = twin.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                weight = layer.weight
                narrow = heads * width
                shape = (narrow, weight.shape[1]) if axis == 0 else (weight.shape[0], narrow)
                total += product_seconds(*shape, self.tokens, weight.device, weight.dtype)
            seconds.append(min(total, seconds[-1]) if seconds else total)
        return seconds


def _levels(width: int, steps: int) -> list[int]:
    """The widths that a module can have, the whole first and 1 last."""
    return sorted({max(round(width * step / steps), 1) for step in range(steps + 1)}, reverse=True)
