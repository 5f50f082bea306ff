"""MASFormer."""

from __future__ import annotations

from typing import ClassVar, Literal

from workbench.attention.base import AttentionMethod, visible_entries
from workbench.core.bisection import largest
from workbench.registry import Fidelity, Paper, param, register


@register
class MASFormer(AttentionMethod):
    """Let a few layers see everything, and all others only the last tokens.

    Full attention in a share of the layers carries what is far away; the other layers look at a sliding window, and
    their cache holds no more than that. The paper trains its models with such mixed spans; here they are imposed on a
    model as it is, where full attention in the middle layers served best (default model). With a budget, the widest
    window that meets it is taken in place of `window`.
    """

    key = "masformer"
    title = "MASFormer"
    paper = Paper(
        "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
        "Zhang et al. 2023",
        "2310.12442",
    )
    claim = "up to 75 % less attention cost on 8k tokens"
    fidelity = Fidelity(
        "untrained part of a trained method", "mixed spans are imposed on a model that was trained without them"
    )
    softmax_weights: ClassVar[bool] = True

    window: int = param(
        512,
        ge=1,
        le=1_048_576,
        unit="tokens",
        help="how far back the other layers look",
        own="the paper trains at 8,192 tokens; with a budget it is as wide as that allows",
    )
    full_layers: float = param(
        0.25,
        ge=0,
        le=1,
        unit="share",
        help="share of the layers that see everything",
        own="the paper says a small number; how many was not read",
    )
    where: Literal["bottom", "middle", "top", "spread"] = param(
        "middle", help="which layers those are", own="untrained, those in the middle serve best (smollm2-135m)"
    )

    def sees_all(self, layer: int, layers: int) -> bool:
        """Whether the layer has full attention."""
        count = self._full(layers)
        if self.where == "spread":  # evenly, the last of each stretch
            return (layer + 1) * count // layers > layer * count // layers
        first = {"bottom": 0, "middle": (layers - count) // 2, "top": layers - count}[self.where]
        return first <= layer < first + count

    def span(self, layer: int, layers: int, tokens: int) -> int | None:
        if self.sees_all(layer, layers):
            return None
        if self.budget is None:
            return self.window
        widest = self._widest(layers, tokens)
        return None if widest == tokens else widest

    def _full(self, layers: int) -> int:
        """How many layers see everything."""
        return int(self.full_layers * layers + 0.5)

    def _widest(self, layers: int, tokens: int) -> int:
        """The widest window with which the entries of all layers stay within the budget."""
        assert self.budget is not None
        full, everything = self._full(layers), visible_entries(tokens)
        allowed = (self.budget.amount * layers - full) * everything / (layers - full)  # entries in each of the others
        widest = largest(lambda width: visible_entries(tokens, width) <= allowed, 0, tokens + 1)
        if widest < 1:
            raise self.too_small((full * everything + (layers - full) * tokens) / (layers * everything))
        return widest
