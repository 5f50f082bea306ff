"""EvoPress for caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.core.apportion import apportion
from workbench.core.evolution import evolve, switched
from workbench.kv.base import Study
from workbench.kv.isolated_loss import stores_before
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.kv.stores import DenseStore, Store
from workbench.measure.quality import divergence
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

_SHORT = (
    "the authors take 400 generations of 64, here a prompt waits for it: six by six find a KL of 0.44, twenty by "
    "sixteen 0.38, and equal layers have 0.47 (workbench-tiny at a quarter, two held texts and three needles)"
)
_EVEN = 4  # levels up to an equal share: sizes are searched in steps of a quarter of it


@register
class EvoPressKV(SnapKV):
    """Search for the room of each layer with which the prompt's last tokens are predicted most nearly the same.

    EvoPress allocates weights; this is its search (`workbench.core.evolution`), level-switch mutation and elitist
    (1 + λ) selection, over the cache. The levels of a layer are multiples of a quarter of an equal share; the
    fitness is the divergence of the model's predictions at the last `window` tokens of the prompt when what came
    before them is cut to the levels, from those over the whole cache. It is found once for a prompt, at the size
    `share`; other sizes are divided among the layers in the same proportions. The heads of a layer have one size.
    Scores are SnapKV's, or those of another scorer in the recipe; the model reads the last tokens again for each
    candidate.
    """

    key = "evopress-kv"
    title = "EvoPress for caches"
    paper = Paper(
        "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", "Sieberling et al. 2025", "2410.14649"
    )
    claim = "room for each layer by what the whole model loses, not by how layers look"
    fidelity = Fidelity(
        "deviates", "the paper searches the sizes of weights; its search is carried over to caches here"
    )
    presets = (
        Preset(
            "quantisation", "IST-DASLab/EvoPress, scripts/run_quant_search.sh, 50888a0", generations=150, offspring=128
        ),
        Preset("pruning", "IST-DASLab/EvoPress, scripts/run_prune_search.sh, 50888a0", generations=400, offspring=64),
        SnapKV.presets[0],
    )
    default_budget = 0.5

    share: float = param(
        0.25, gt=0, le=1, help="the share of all positions at which layers are compared",
        own="the paper has no caches",
    )  # fmt: skip
    generations: int = param(6, ge=0, le=1000, help="how often the fittest has children", own=_SHORT)
    offspring: int = param(6, ge=1, le=256, help="children in each generation", own=_SHORT)
    seed: int = param(0, ge=0, le=2**31 - 1, help="of all that is drawn", own="any number will do")

    def importance(self, study: Study) -> Tensor | None:
        """How much room each compressible layer gets, float64 [l], 1 on average."""
        trace = study.trace
        study.reader(self.key)  # refuses a trace without a model
        ranking = study.ranking or Ranking(self.scores(study))
        first = trace.tokens - min(self.window, trace.tokens // 2)  # where the tokens begin that are read again
        step = int(self.share * first / _EVEN)
        if step < 1 or ranking.layers < 2:
            return torch.ones(ranking.layers, dtype=torch.float64)
        earlier = Ranking(ranking.scores[..., :first])
        levels = torch.arange(1, max(first // step, _EVEN) + 1) * step
        sizes = levels.expand(ranking.layers, -1)
        ids = trace.ids[first:]

        def predictions(kept: Tensor) -> Tensor:
            """Log-probabilities at the last tokens over what is kept [l, k, n] of those before."""

            def made(place: int, layer: LayerTrace) -> Store:
                return DenseStore.where(layer.keys, layer.values, kept[place].to(layer.device), layer.keys.dtype)

            return study.forced(self.key, stores_before(trace, first, made), first, ids).log_softmax(-1)

        whole = predictions(torch.ones_like(earlier.scores, dtype=torch.bool))

        def measure(chosen: Tensor, _: Sequence[int]) -> float:
            counts = levels[chosen].to(earlier.scores.device)[:, None].expand(-1, ranking.kv_heads)
            return float(divergence(whole, predictions(earlier.selected(counts))).mean())

        even = torch.full((ranking.layers,), _EVEN - 1)
        limit = int(levels[even].sum())
        fittest = evolve(
            even, lambda parent, draw: switched(parent, sizes, limit, draw), measure, samples=1,
            generations=self.generations, offspring=self.offspring, seed=self.seed, progress=study.progress,
            stage=f"searching levels by {self.key}",
        )  # fmt: skip
        room = levels[fittest.levels].double()
        return room / room.mean()

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        beyond = entries // ranking.kv_heads - ranking.layers  # every layer is certain of one position
        if beyond < 0 or ranking.importance is None:
            return super().allocate(ranking, entries)
        most = torch.full((ranking.layers,), ranking.tokens - 1)
        counts = 1 + apportion(beyond, ranking.importance, most)
        return counts[:, None].expand(-1, ranking.kv_heads)
