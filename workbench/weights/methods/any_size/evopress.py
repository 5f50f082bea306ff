"""EvoPress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from workbench.errors import BadBudget, NotApplicable
from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.level_search import fittest
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.switched_model import SwitchedModel
from workbench.weights.compress import compressed_once
from workbench.weights.levels import Profile, level_name, levels_of, possible_levels, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class EvoPress(WeightMethod):
    """Search for the level of each layer at which the whole model says most nearly the same, within one size.

    Each layer is compressed once at every level (bits, or shares of its bytes) by another method; the search then only
    switches between them. It is a (1 + λ) evolution: each child raises the levels of one to three layers and lowers
    others, so that the total stays, and is judged by the divergence of the next token's distribution from the
    uncompressed model's over calibration texts, in steps of more and more texts (algorithm 1;
    `workbench.core.evolution`). Nothing is assumed about how the errors of layers add up.

    The authors' scripts search for 150 to 400 generations of 64 to 128 children over half a million tokens; the
    defaults here are sized for minutes on two cores. For so few the beginning matters. The paper's is one level
    everywhere; here each layer is first switched one level up and down alone, and the search begins from the best of a
    few ways to exchange levels by what that did (`slopes`). The paper switches between layers of one size only; here
    any may, measured in bytes. The last step of a selection has all texts, so that the result is never worse on them
    than the same level everywhere.

    Budget: of the bytes of what `of` compresses, at 16 bits.
    """

    key = "evopress"
    title = "EvoPress"
    paper = Paper(
        "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", "Sieberling et al. 2025", "2410.14649"
    )
    claim = "the best levels for each layer at the same total size, for any compression"
    fidelity = Fidelity(
        "deviates", "a search of minutes over thousands of tokens, from a better beginning, not of hours over millions"
    )
    presets = (
        Preset(
            "quantisation", "IST-DASLab/EvoPress, scripts/run_quant_search.sh, 50888a0",
            of="gptq", generations=150, offspring=128, slopes=0,
        ),
        Preset(
            "pruning", "IST-DASLab/EvoPress, scripts/run_prune_search.sh, 50888a0",
            of="sparsegpt", generations=400, offspring=64, slopes=0,
        ),
    )  # fmt: skip
    default_budget = 0.22

    of: str = param("gptq", help='the method that compresses, and its parameters: "gptq", "rtn group_size=32"')
    levels: str = param(
        "",
        help='to choose from: bits ("2,3,4"), or budgets; empty: all bits, or shares around the budget',
        own="the script's 2 to 6 bits, of which quantisers here hold 2, 3, 4 and 8",
    )
    generations: int = param(20, ge=0, le=2000, help="how often the fittest has children", own="minutes on two cores")
    offspring: int = param(8, ge=1, le=256, help="children in each generation", own="minutes on two cores")
    texts: int = param(
        16,
        ge=1,
        le=1024,
        help="calibration texts by which levels are judged",
        own="minutes on two cores; the script's last step has 16 texts of 8192",
    )
    tokens: int = param(
        128,
        ge=8,
        le=8192,
        unit="tokens",
        help="how much of each is read",
        own="minutes on two cores; the script has 8192",
    )
    slopes: int = param(
        2,
        ge=0,
        le=1024,
        help="texts on which each layer is switched alone, to begin from; 0: the same level everywhere",
        own="for few generations the beginning matters",
    )
    seed: int = param(0, ge=0, le=2**31 - 1, help="of all that is drawn", own="any number serves")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.effective_budget is not None and self.effective_budget.kind == "tokens":
            raise BadBudget(f"{self.key}: the budget is a share (0.2) or a size, not {self.budget}")
        self.methods()  # a wrong `of` or level is refused here

    @property
    def together(self) -> str:
        return "their levels were chosen together"

    def methods(self) -> tuple[WeightMethod, ...]:
        """The method that compresses, at each level, in the order they were written."""
        return levels_of(self.key, self.of, self.levels, self.effective_budget)

    def refuses(self, linear: nn.Linear) -> str | None:
        return self.methods()[0].refuses(linear)

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        within = decoder_layers(cast("PreTrainedModel", model))
        outside = [name for name in linears if placed(name, within)[0] is None]
        return {
            **self.methods()[0].refused(model, linears),
            **dict.fromkeys(outside, "it stands in no block, and only blocks are run again"),
        }

    def full_nbytes(self, linear: nn.Linear) -> int:
        return self.methods()[0].full_nbytes(linear)

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        self.possible(linears)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        sizes = sizes_of(self.possible(linears), linears)
        least, most = int(sizes.amin(dim=1).sum()), int(sizes.amax(dim=1).sum())
        limit = self.limit(linears)
        return most if limit is None else max(least, min(limit, most))

    def limit(self, linears: Mapping[str, nn.Linear]) -> int | None:
        """How many bytes these layers may take together; None: as many as they do."""
        full = sum(self.full_nbytes(linear) for linear in linears.values())
        return None if self.effective_budget is None else self.effective_budget.nbytes(full)

    def possible(self, linears: Mapping[str, nn.Linear]) -> list[WeightMethod]:
        """The levels that all these layers can have, smallest first. Raises what the last of them raised if none."""
        return possible_levels(self.methods(), linears)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        methods = self.possible(linears)
        made = [
            compressed_once(study, method, linears, progress.part(index, len(methods), f"compressing by {self.of}"))
            for index, method in enumerate(methods)
        ]
        sizes, limit = sizes_of(methods, linears), self.limit(linears)
        if bool((sizes.diff(dim=1) < 0).any()):
            raise NotApplicable(f"{self.key}: the levels of {self.of} are not in the same order for every layer")
        if limit is None:
            levels = torch.full((len(linears),), len(methods) - 1)
        else:
            levels = self.searched(study, made, sizes, limit, progress)[0]
        for name, level in zip(linears, levels.tolist(), strict=True):
            twin.set_submodule(name, made[level][name])

    def profile(self, model: PreTrainedModel, study: WeightStudy, progress: Progress | None = None) -> Profile:
        """What the search chooses for a model, without a compressed copy of it; found once for each study."""
        survey = self.survey(model)
        asked, linears = cast("EvoPress", survey.method), survey.linears
        limit = asked.limit(linears)
        assert limit is not None  # there is a default budget
        methods, progress = asked.possible(linears), progress or Progress()
        made = [compressed_once(study, method, linears, progress) for method in methods]
        levels, before, after = asked.searched(study, made, sizes_of(methods, linears), limit, progress)
        labels = [level_name(method) for method in methods]
        chosen = {name: labels[level] for name, level in zip(linears, levels.tolist(), strict=True)}
        return Profile(chosen, before, after)

    def searched(
        self,
        study: WeightStudy,
        made: Sequence[Mapping[str, nn.Module]],
        sizes: Tensor,
        limit: int,
        progress: Progress,
    ) -> tuple[Tensor, float, float]:
        """The level of each layer int64 [u], and the divergence before and after the search; once for each study."""

        def search() -> tuple[Tensor, float, float]:
            ids = study.ids[: self.texts, : self.tokens]
            trial = SwitchedModel(study.model, ids, list(made[0]), made, progress)
            found = fittest(
                trial, sizes, limit,
                slopes=self.slopes, generations=self.generations, offspring=self.offspring, seed=self.seed,
                progress=progress,
            )  # fmt: skip
            return found.levels, found.before, found.unfitness

        return study.once((self.parameter_key(), limit), search)
