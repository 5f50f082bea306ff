"""ZipLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.errors import NotApplicable
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.structured_pruner import StructuredPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.switched_model import SwitchedModel
from workbench.weights.solvers.latency import ProductTimes, parsed
from workbench.weights.solvers.least_squares import refitted
from workbench.weights.solvers.module_levels import errors_of, kept_of, module_times, removals_of, stand_ins
from workbench.weights.solvers.spdy import searched, within_both
from workbench.weights.solvers.structure_removal import Removal
from workbench.weights.solvers.widths import ladders
from workbench.weights.surgery.prunable import PrunableAttention, PrunableMLP, PrunableModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BUCKETS = 10_000  # steps into which a total time is divided


@register
class ZipLM(StructuredPruner):
    """Leave out MLP neurons and channels of attention's values where the whole model loses least for the time saved.

    Each module's structures go in the order of structured second-order pruning, the rest making up for them (Kurtic et
    al. 2023, equations 2 and 3, algorithm 1). Each module can then have any of some widths, the next `shrink` times as
    wide as the last. Which, is found by SPDY (Frantar and Alistarh 2022, arXiv:2201.13096): of all widths within the
    total time, dynamic programming finds those for which the modules' errors, each times a coefficient, add up to
    least; the coefficients are searched so that the whole model, with those widths, loses least over calibration texts.
    A module's error is the change of its own outputs, of their mean square. The loss of the whole model is here the
    divergence of the next token's distribution from the uncompressed model's, which needs no labels.

    How long a module takes at each width is data: a `table` of seconds, recorded once for a model and machine
    (`workbench.weights.recorded_times`), or else its number of multiply-adds. So the same settings give the same model
    in every process. Widths are within the bytes of the budget and, where `speedup` is given, the pruned products
    together are that much faster by the table.

    The paper prunes whole heads; here every layer's cache needs as many KV heads as the others, so that each head gets
    narrower values instead. Inputs are those of the uncompressed model; gradual pruning and distillation are left out.
    """

    key = "ziplm"
    title = "ZipLM"
    paper = Paper("ZipLM: Inference-Aware Structured Pruning of Language Models", "Kurtic et al. 2023", "2302.04089")
    claim = "structured pruning that hits a target speed-up on the hardware at hand"
    fidelity = Fidelity(
        "deviates",
        "one shot, without the training between steps; narrower values in every head in place of whole heads",
    )
    presets = (Preset("spdy", "IST-DASLab/spdy, spdy.py, 0702e4b", starts=100, patience=100, resampled=0.1),)
    default_budget = 0.8
    needs_hessian: ClassVar[bool] = True
    narrows = (PrunableMLP, PrunableAttention)

    speedup: float = param(
        1.0,
        ge=1,
        le=50,
        help="how much faster the pruned products have to be; 1: as they come",
        own="the budget of bytes decides: a published target is one of a machine",
    )
    table: str = param(
        "", help="seconds of products by shape, as recorded_times gives them; empty: as many as multiply-adds",
        own="no source: seconds are those of the user's machine",
    )  # fmt: skip
    shrink: float = param(
        0.9,
        ge=0.5,
        le=0.95,
        help="how wide each level of a module is, of the one before",
        own="the paper's grid of widths could not be read",
    )
    damping: float = param(
        0.01,
        ge=1e-6,
        le=1,
        help="added to the diagonal of the inputs' Hessian, as a share of its mean",
        own="the paper's value could not be read; that of GPTQ and SparseGPT",
    )
    starts: int = param(
        32,
        ge=0,
        le=10_000,
        help="random coefficients from which the search begins",
        own="minutes on two cores; see `patience`",
    )
    patience: int = param(
        8,
        ge=0,
        le=10_000,
        help="draws in a row that gain nothing before fewer coefficients change; 0: no local search",
        own="minutes on two cores",
    )
    resampled: float = param(0.1, gt=0, le=1, help="of the modules, how many coefficients change at first")
    texts: int = param(
        8,
        ge=1,
        le=1024,
        help="calibration texts by which widths are judged",
        own="minutes on two cores; SPDY 1024 images",
    )
    tokens: int = param(128, ge=8, le=8192, unit="tokens", help="how much of each is read", own="minutes on two cores")
    seed: int = param(0, ge=0, le=2**31 - 1, help="of all coefficients that are drawn", own="any number serves")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        parsed(self.table)  # what is no table is refused here

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None and self.speedup == 1:
            return
        modules = self.prunable_modules(twin, tuple(linears))
        levels = ladders([module.width for module in modules], self.shrink)
        key = ("ziplm", self.damping, self.shrink)
        removals = study.once(key, lambda: removals_of(modules, levels, linears, study, self.damping, progress))
        counts = study.once(
            (self.parameter_key(), limit),
            lambda: self._searched(modules, levels, removals, linears, limit, study, progress),
        )
        done = 0
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for module in (module for module in modules if module.out in inputs):
                progress.update(f"compressing by {self.key}", done, len(modules))
                if counts[module.name] < module.width:
                    kept = kept_of(module, removals[module.name], counts[module.name])
                    weight, hessian = linears[module.out].weight.detach(), inputs[module.out].hessian
                    columns = module.columns(kept).to(hessian.device)
                    with self.naming(module.out):
                        module.prune(twin, kept, refitted(weight, hessian, columns, self.damping))
                done += 1
        progress.update(f"compressing by {self.key}", len(modules), len(modules))

    def _searched(
        self,
        modules: Sequence[PrunableModule],
        levels: Sequence[Sequence[int]],
        removals: Mapping[str, Removal],
        linears: Mapping[str, nn.Linear],
        limit: int | None,
        study: WeightStudy,
        progress: Progress,
    ) -> dict[str, int]:
        """How many dimensions each module keeps."""
        errors = errors_of(modules, levels, removals)
        widths = torch.tensor(levels)
        nbytes = widths * torch.tensor([module.dimension_nbytes for module in modules])[:, None]
        times = module_times(modules, levels, linears, ProductTimes(parsed(self.table)))
        whole, full = float(times[:, 0].sum()), int(nbytes[:, 0].sum())
        most = full if limit is None else limit
        room = whole / self.speedup if self.table else whole * min(1 / self.speedup, most / full)
        least = float(times.amin(dim=1).sum())
        if least * self.speedup > whole * (1 + 1e-9):
            raise NotApplicable(
                f"{self.key}: the products that can be pruned get at most {whole / least:.3g} times as fast by their "
                f"times, not {self.speedup:g} times"
            )
        names = [module.out for module in modules]
        stands = stand_ins(modules, levels, removals, linears)
        trial = SwitchedModel(study.model, study.ids[: self.texts, : self.tokens], names, stands, progress)
        seen: dict[tuple[int, ...], float] = {}

        def planned(coefficients: Tensor) -> list[int]:
            return within_both(errors * coefficients[:, None], times, room, nbytes, most, _BUCKETS)

        def score(coefficients: Tensor) -> float:
            found = tuple(planned(coefficients))
            if found not in seen:
                seen[found] = trial.divergence(torch.tensor(found), range(trial.texts))
            return seen[found]

        best = searched(
            len(modules), score,
            starts=self.starts, patience=self.patience, resampled=self.resampled, seed=self.seed, progress=progress,
        )  # fmt: skip
        return {module.name: row[level] for module, row, level in zip(modules, levels, planned(best), strict=True)}
