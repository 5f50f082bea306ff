"""EvoPress for depth: which blocks can be missed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.core.evolution import evolve
from workbench.models.decoder import decoder_layers
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.block_pruner import BlockPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.switched_model import SwitchedModel
from workbench.weights.surgery.depth import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class EvoPressDepth(BlockPruner):
    """Leave out the blocks without which, all together, the model says most nearly the same.

    A (1 + λ) evolution over sets of blocks: of `beginnings` random sets the fittest is the first parent; a child leaves
    out others in exchange for one to three that come back, and is judged by the divergence of the next
    token's distribution from the uncompressed model's over calibration texts, in steps of more and more texts
    (`workbench.core.evolution`). No block is scored alone: which ones go together well is what the search is about
    (Sieberling et al. 2025).

    The authors' code drops attention and MLPs apart, and whole blocks as an option; here whole blocks go, since every
    layer's cache is read and counted. The last step of a selection has all texts, so that the result is never worse
    on them than the parent it began with. As many blocks go as the bytes ask for.
    """

    key = "evopress-depth"
    title = "EvoPress, depth"
    paper = Paper(
        "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", "Sieberling et al. 2025", "2410.14649"
    )
    claim = "better sets of blocks to drop than any score of single blocks finds"
    fidelity = Fidelity("deviates", "whole blocks go (the authors' --drop_entire_block), not attention and MLPs apart")
    presets = (
        Preset(
            "depth",
            "IST-DASLab/EvoPress, scripts/run_drop_search.sh, 50888a0",
            offspring=32,
            beginnings=64,
            generations=0,
        ),
    )
    default_budget = 0.9

    generations: int = param(
        0, ge=0, le=5000, help="how often the fittest has children; 0: k (n - k) / 1.5 for k of n blocks"
    )
    offspring: int = param(32, ge=1, le=256, help="children in each generation")
    beginnings: int = param(64, ge=1, le=4096, help="random sets of blocks, of which the fittest begins")
    texts: int = param(
        16,
        ge=1,
        le=1024,
        help="calibration texts by which sets are judged",
        own="minutes on two cores; the script has 4",
    )
    tokens: int = param(
        128,
        ge=8,
        le=8192,
        unit="tokens",
        help="how much of each is read",
        own="minutes on two cores; the script has 8192",
    )
    seed: int = param(0, ge=0, le=2**31 - 1, help="of all that is drawn", own="any number serves")

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None:
            return
        sizes = self.block_nbytes(twin, linears)
        kept = study.once((self.parameter_key(), limit), lambda: self._searched(sizes, limit, study, progress))
        shorten(twin, kept)

    def _searched(self, sizes: Sequence[int], limit: int, study: WeightStudy, progress: Progress) -> list[int]:
        """Which blocks stay, ascending."""
        draw = torch.Generator().manual_seed(self.seed)
        blocks = decoder_layers(study.model)
        ids = study.ids[: self.texts, : self.tokens]
        trial = SwitchedModel(study.model, ids, list(blocks), [dict.fromkeys(blocks, _Passed()), blocks], progress)
        first = range(max(trial.texts // 16, 1))
        sets = [drawn(sizes, limit, draw) for _ in range(self.beginnings)]
        fitness = [trial.divergence(kept, first) for kept in progress.track(sets, "trying sets of blocks", len(sets))]
        begun = sets[min(range(len(sets)), key=lambda at: fitness[at])]
        gone = int((begun == 0).sum())
        found = evolve(
            begun,
            lambda parent, draw: exchanged(parent, sizes, limit, draw),
            trial.divergence,
            samples=trial.texts,
            generations=self.generations or int(gone * (len(sizes) - gone) / 1.5),
            offspring=self.offspring,
            seed=self.seed,
            progress=progress,
            stage="searching blocks",
        )
        kept: list[int] = found.levels.nonzero()[:, 0].tolist()
        return kept


class _Passed(nn.Module):
    """What stands in for a block that is left out."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def drawn(sizes: Sequence[int], limit: int, draw: torch.Generator) -> Tensor:
    """A random set of blocks that stay, int64 [l] of 0 and 1: others go until the rest takes at most `limit` bytes."""
    kept = torch.ones(len(sizes), dtype=torch.long)
    for index in torch.randperm(len(sizes), generator=draw).tolist():
        if int((kept * torch.tensor(sizes)).sum()) <= limit:
            break
        kept[index] = 0
    return kept


def exchanged(kept: Tensor, sizes: Sequence[int], limit: int, draw: torch.Generator) -> Tensor:
    """Blocks that stay [l] after one to three exchanges, fewer more likely: one comes back, and others go for it until
    the rest takes at most `limit` bytes.
    """
    kept, each = kept.clone(), torch.tensor(sizes)
    for _ in range(int(torch.randint(1, 4, (2,), generator=draw).min())):
        gone = (kept == 0).nonzero()[:, 0]
        if not gone.numel():
            break
        back = int(gone[torch.randint(gone.numel(), (1,), generator=draw)])
        kept[back] = 1
        while int((kept * each).sum()) > limit:
            others = [index for index in kept.nonzero()[:, 0].tolist() if index != back]
            if not others:
                break
            kept[others[int(torch.randint(len(others), (1,), generator=draw))]] = 0
    return kept
