"""KVTuner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from workbench.budget import Budget
from workbench.core.knapsack import cheapest
from workbench.errors import BadParameter
from workbench.kv.base import Study
from workbench.kv.isolated_loss import isolated_losses
from workbench.kv.layerwise import LayerwiseMethod
from workbench.kv.stores.format import DenseFormat, Format, PackedFormat, Shape
from workbench.kv.stores.layered import LayeredFormat
from workbench.kv.stores.packed import WHOLE
from workbench.registry import Fidelity, Paper, Preset, param, register

PAIRS = ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (WHOLE, WHOLE))
"""Bits of keys and of values that a layer may have, fewest first."""
_WRITTEN = re.compile(r"(2|4|8|16)/(2|4|8|16)")
_OFFLINE = "the authors find it offline, for each model; here a budget decides"


@register
class KVTuner(LayerwiseMethod):
    """Keep every token, keys and values of each layer at bits of their own, fewer where the model minds least.

    Layers differ in how much rounding harms (section 4). "auto" holds each layer alone at each pair of bits and reads
    the last `window` tokens of the prompt again: the divergence of their predictions is the layer's loss. Of all
    choices of pairs within the budget it takes the one with the least sum of losses (`workbench.core.knapsack`), and
    measures once for all budgets. The paper prunes pairs and groups layers by the errors of attention outputs, and
    then searches all layers together for accuracy on examples; `wb.search` does that with these losses as its
    beginning, and writes what it finds as `bits`: "8/4 4/4 2/2" are bits of keys and values of the layers that may be
    compressed, in order.

    Keys share a scale and zero over `group` tokens of a channel, values over `group` channels of a token, as in KIVI;
    with key_axis="token" both over channels. The newest tokens stay exact, fewer where the budget says so.
    """

    key = "kvtuner"
    title = "KVTuner"
    paper = Paper(
        "KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization for Efficient and Nearly "
        "Lossless LLM Inference", "Li et al. 2025", "2502.04420",
    )  # fmt: skip
    claim = "nearly lossless at 3.25 bits where each layer has its own, found offline"
    fidelity = Fidelity(
        "deviates", "pairs by each layer's own divergence on the prompt's end, not by a search on examples beforehand"
    )
    presets = (
        Preset(
            "kivi", "cmd2001/KVTuner, helper_scripts/sh_gen_presets.py, babe775",
            group=32, residual=32, key_axis="channel",
        ),
        Preset("per token", "the same", residual=0, key_axis="token"),
    )  # fmt: skip
    default_budget = 0.25

    bits: str = param(
        "auto", help='bits of keys and values, layer by layer ("8/4 4/4"), or what the budget allows', own=_OFFLINE
    )
    key_axis: Literal["channel", "token"] = param("channel", help="whose numbers of a key share a scale and a zero")
    group: int = param(32, ge=4, le=256, unit="numbers", help="how many numbers share a scale and a zero")
    residual: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens that stay exact")
    window: int = param(
        32, ge=1, le=1024, unit="tokens", help='tokens at the end by which "auto" compares layers', own=_OFFLINE
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.residual % self.group:
            nearest = max(round(self.residual / self.group), 1) * self.group
            raise BadParameter(
                f"{self.key}: residual={self.residual} is not a multiple of group={self.group}, in which keys are "
                f"quantised; use residual={nearest}"
            )
        _ = self.pairs

    @property
    def pairs(self) -> tuple[tuple[int, int], ...] | None:
        """The bits of keys and values of each layer; None: "auto"."""
        if self.bits == "auto":
            return None
        found = [_WRITTEN.fullmatch(word) for word in self.bits.split()]
        pairs = tuple((int(each[1]), int(each[2])) for each in found if each)
        if not pairs or len(pairs) != len(found):
            raise BadParameter(
                f'{self.key}: bits={self.bits!r}: write "auto", or for each layer the bits of its keys and values out '
                'of 2, 4, 8 and 16, as in "8/4 4/4 2/2"'
            )
        return pairs

    @property
    def effective_budget(self) -> Budget | None:
        return super().effective_budget if self.budget is not None or self.pairs is None else None

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if self.pairs is not None:
            return self._within(dtype, shapes, limit, self.pairs)
        if limit is None:
            limit = int((self.default_budget or 1) * sum(shape.full_nbytes for shape in shapes))
        for residual in self._residuals():
            chosen = self.shortened(residual)
            if int(chosen.sizes(dtype, shapes)[:, 0].sum()) <= limit:
                break
        levels = cheapest(self.losses(study, dtype), chosen.sizes(dtype, shapes), limit)
        return chosen.at_levels(levels.tolist()).layout(study, dtype, shapes, None)

    def shortened(self, residual: int) -> Self:
        """The same method with another number of exact tokens."""
        return type(self)(**{**dict(self), "residual": residual})

    @property
    def levels(self) -> int:
        return len(PAIRS)

    def losses(self, study: Study, dtype: torch.dtype) -> Tensor:
        """What each layer alone loses at each of `PAIRS`, float64 [l, v], nats a token; measured once for a prompt."""

        def measure() -> Tensor:
            layers = len(study.trace.compressible)
            if study.trace.tokens < 2:  # nothing could be read again: all layers alike, more bits being better
                return torch.tensor([[-keys - values for keys, values in PAIRS]]).double().expand(layers, -1)
            formats = [self._pair(dtype, pair, 0) for pair in PAIRS[:-1]]
            losses = isolated_losses(study, self.key, formats, self.window)
            return torch.cat([losses, losses.new_zeros(len(losses), 1)], dim=1)  # the last is not rounded

        key = ("isolated losses", self.key_axis, self.group, self.window, dtype)
        return study.trace.once(key, measure)

    def sizes(self, dtype: torch.dtype, shapes: Sequence[Shape]) -> Tensor:
        formats = [self._pair(dtype, pair, self.residual) for pair in PAIRS]
        return torch.tensor([[_size(form, shape) for form in formats] for shape in shapes])

    def at_levels(self, levels: Sequence[int]) -> Self:
        values = {**dict(self), "bits": written([PAIRS[level] for level in levels]), "budget": None}
        return type(self)(**values)

    def _within(
        self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None, pairs: Sequence[tuple[int, int]]
    ) -> Format:
        if len(pairs) != len(shapes):
            raise BadParameter(
                f"{self.key}: bits has {len(pairs)} pairs, but {len(shapes)} layers of this model may be compressed"
            )
        for residual in self._residuals():
            form = self._format(dtype, shapes, pairs, residual)
            if limit is None or sum(_size(form, shape) for shape in shapes) <= limit:
                break
        return form

    def _residuals(self) -> range:
        """How many of the newest tokens may stay exact, most first."""
        return range(self.residual, -1, -self.group)

    def _format(
        self, dtype: torch.dtype, shapes: Sequence[Shape], pairs: Sequence[tuple[int, int]], residual: int
    ) -> LayeredFormat:
        made = zip(shapes, pairs, strict=True)
        return LayeredFormat.of({shape.layer: self._pair(dtype, pair, residual) for shape, pair in made})

    def _pair(self, dtype: torch.dtype, pair: tuple[int, int], residual: int) -> Format:
        keys, values = pair
        if keys == values == WHOLE:
            return DenseFormat(dtype)
        return PackedFormat(dtype, keys, self.group, residual, key_axis=self.key_axis, value_bits=values)


def _size(form: Format, shape: Shape) -> int:
    """Bytes of a layer in a format, every token kept."""
    return form.nbytes(shape, torch.full((1, shape.kv_heads), shape.tokens))


def written(pairs: Sequence[tuple[int, int]]) -> str:
    """Pairs of bits as the parameter `bits` has them."""
    return " ".join(f"{keys}/{values}" for keys, values in pairs)
