"""Lightning Attention-2."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from workbench.attention.operators.base import Operator, check, hide_later, per_head
from workbench.attention.operators.linear import decay, linear_attention
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class Lightning(Operator):
    """Linear attention that fades with distance, computed in full within blocks and as one state between them.

    The weight of key j for query i is scale * (f(q_i) . f(k_j)) * exp(-s * (i - j)). Within a chunk the products are
    computed as they stand, from the chunks before comes f(q_i) times a state of d * dv numbers (the paper's intra- and
    inter-block parts), so the time for a token does not depend on how many came before. The slopes s are those of the
    authors' code, 2^(-8 (head + 1) / heads), which models lower from layer to layer: `strength`.

    There is no softmax and no row sum to divide by: such models normalise the output instead, so a study's error after
    the best factor says more than its plain error. The paper's models apply SiLU to queries, keys and values; here
    `feature` applies to queries and keys, and values stay as they were recorded.

    On CUDA by the kernel of flash-linear-attention where that package is installed (see `linear_attention`).
    """

    key = "lightning"
    title = "Lightning Attention-2"
    paper = Paper(
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
        "Qin et al. 2024",
        "2401.04658",
    )
    claim = "constant speed whatever the length"
    fidelity = Fidelity(
        "untrained part of a trained method", "the output's norm and gate and the values' activation are absent"
    )
    presets = (Preset("paper", "its models: SiLU, slopes of the authors' code", feature="silu", strength=1.0),)

    feature: Literal["silu", "none"] = param("silu", help="what queries and keys go through")
    strength: float = param(1.0, ge=0, le=10, help="what each head's own slope is multiplied by; 0: nothing fades")
    slope: float = param(
        0.0,
        ge=0,
        le=10,
        unit="1/token",
        help="one slope for all heads; 0: each head its own",
        own="not in the paper; off, so that each head has its own slope, as there",
    )

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        query, key = self._features(q[:, first:stop], scale), self._features(per_head(k[:, :stop], len(q)))
        at = torch.arange(stop, device=q.device)
        weights = query @ key.transpose(1, 2) * decay(self.slopes(len(q)).to(q.device), at[first:], at)
        return hide_later(weights, first)

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        check(q, k, v)
        query, key, value = self._features(q, scale), self._features(per_head(k, len(q))), per_head(v, len(q)).float()
        return linear_attention(query, key, value, self.chunk, self.slopes(len(q)).to(q.device)).to(q.dtype)

    def for_head(self, head: int, heads: int) -> Lightning:
        slope = float(self.slopes(heads)[head])
        return type(self)(**{**dict(self), "slope": slope, "strength": 0.0})  # where the slope is 0, nothing fades

    def slopes(self, heads: int) -> Tensor:
        """How fast each head forgets, [heads] float32: its weights fall by exp(-slope) from token to token."""
        return torch.full((heads,), self.slope) if self.slope else torch.tensor(_slopes(heads)) * self.strength

    def _features(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x.float()
        return (silu(x) if self.feature == "silu" else x) * scale


def _slopes(heads: int) -> list[float]:
    """2^(-8 / heads), its square, and so on; between the powers of two, every other one of the next is put in."""
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes if power == heads else slopes + _slopes(2 * power)[::2][: heads - power]
