"""Q-Filters."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.kv.base import KVMethod, Study, keep_last
from workbench.kv.dense_preference import own_text
from workbench.kv.query_directions import query_directions
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class QFilters(KVMethod):
    """Keep the keys that lie furthest along the direction in which the model's queries lie.

    Queries of a head lie on one side of a direction, their first right singular vector, whatever is read: the product
    of a key with it says how much attention it can expect (theorem 3.1). Directions of a group's query heads are
    averaged. They are measured once for each model of a session, on a text of the package's own; the last `window`
    tokens always stay.
    """

    key = "qfilters"
    title = "Q-Filters"
    paper = Paper(
        "Q-Filters: Leveraging Query-Key Geometry for Efficient Key-Value Cache Compression",
        "Godey et al. 2025",
        "2503.02812",
    )
    claim = "99 % of needles at 32 times less cache, without looking at attention"
    fidelity = Fidelity("deviates", "directions come of one short text of ours, not of twenty of 2,048 tokens")
    presets = (
        Preset("code", "NathanGodey/qfilters, example.py and src/hf_cache.py, cda5c38", window=64),
        Preset("kvpress", "NVIDIA/kvpress, presses/qfilter_press.py, 8bb29b9", window=0),
    )
    default_budget = 0.5

    window: int = param(64, ge=0, le=1024, unit="tokens", help="tokens at the end that always stay")

    def scores(self, study: Study) -> Tensor:
        model, tokenizer = study.reader(self.key), study.trace.prompt.tokenizer
        along = study.of_model.once(
            self.key, lambda: query_directions(model, own_text(model, tokenizer), study.progress)
        )
        return stacked([
            keep_last(torch.einsum("knd,kd->kn", layer.keys.float(), along[layer.index].to(layer.device)), self.window)
            for layer in study.trace.compressible
        ])  # fmt: skip
