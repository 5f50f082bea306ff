"""The levels of layers at which a whole model is nearest to itself, within one size."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.evolution import Found, evolve, filled, promising, switched, uniform
from workbench.progress import Progress
from workbench.weights.calibration.switched_model import SwitchedModel


def fittest(
    trial: SwitchedModel,
    sizes: Tensor,
    limit: int,
    *,
    slopes: int,
    generations: int,
    offspring: int,
    seed: int,
    progress: Progress,
) -> Found:
    """The levels [u] of the fittest, how far the model then is from itself, and how far it is at one level everywhere.

    sizes: int64 [u, v], bytes of each layer at each level; limit: of all layers together. slopes: texts on which each
    layer is switched alone, to begin from; 0: the same level everywhere, what room that leaves filled at random. How
    the search goes on: `workbench.core.evolution`.
    """
    everything = range(trial.texts)
    even = filled(uniform(sizes, limit), sizes, limit, torch.Generator().manual_seed(seed))
    before, begin = trial.divergence(even, everything), even
    if slopes:
        steep = trial.slopes(even, range(min(slopes, trial.texts)), progress)
        begin = promising(even, before, steep, sizes, limit, lambda levels: trial.divergence(levels, everything))
    found = evolve(
        begin,
        lambda parent, draw: switched(parent, sizes, limit, draw),
        trial.divergence,
        samples=trial.texts,
        generations=generations,
        offspring=offspring,
        seed=seed,
        progress=progress,
        stage="searching levels",
    )
    return found._replace(before=before)
