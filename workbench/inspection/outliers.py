"""Outlying channels of keys, values, activations or weights, under a recipe's weight methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from workbench import arguments
from workbench.inspection.channels import Kind, channel_table
from workbench.recipe import Recipe
from workbench.weights.surgery.linears import used_weights

if TYPE_CHECKING:
    import pandas as pd

    from workbench.progress import Progress
    from workbench.registry import Method
    from workbench.runtime.readings import Readings


def outliers(
    readings: Readings, kind: Kind, weights: Sequence[Method] = (), *, progress: Progress | None = None
) -> pd.DataFrame:
    """Largest magnitude, kurtosis and share of energy of every channel; see `Session.outliers`.

    weights: methods whose layers count as the weights they stand for.
    """
    arguments.choice("kind", kind, get_args(Kind))
    model = readings.variants.get(weights, progress)
    if kind == "weights":
        return channel_table(kind, model, progress=progress, weights=used_weights(model) if weights else None)
    trace = readings.recorded(Recipe.of(list(weights) or "full"), progress)
    return channel_table(kind, model, trace, progress)
