"""What an attention method changes: how a prompt's scores are computed, and how far a layer looks back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from workbench.attention.exact import causal_attention
from workbench.errors import BadBudget, BudgetTooSmall
from workbench.registry import Family, Method

if TYPE_CHECKING:
    from workbench.kv.stores import Contents


@dataclass
class Pass:
    """One pass of a model over some tokens, as the attention method in it sees it.

    layers: how many the model has; layer: the one that attends now. tokens: how many are read with this pass, those
    before them included. computed: score entries that were really computed at each layer, summed over the query heads.
    left: what a layer leaves for later ones of the same pass.
    """

    layers: int
    tokens: int
    layer: int = 0
    computed: list[int] = field(default_factory=list)
    left: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.computed = self.computed or [0] * self.layers

    def count(self, entries: int) -> None:
        """Note that so many more score entries were computed at this layer, over all its query heads."""
        self.computed[self.layer] += entries


class AttentionMethod(Method):
    """Base of all methods that change how attention is computed.

    Budget: the share of the full causal score entries, over all layers, that are computed while the prompt is read.
    A method that takes no budget computes all of them, in its own way.
    """

    family: ClassVar[Family] = "attention"
    decodes: ClassVar[bool] = False  # attends in its own way while decoding too
    looks_ahead: ClassVar[bool] = False  # what a query sees depends on later tokens of the prompt

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None and self.budget.kind != "share":
            raise BadBudget(
                f"{self.key}: the budget of an attention method is the share of score entries computed (0.25), "
                f"not {self.budget}"
            )

    def span(self, layer: int, layers: int, tokens: int) -> int | None:
        """How many positions a query of this layer sees, itself included; None: all.

        tokens: the length of the prompt. What holds when it is read also holds for the tokens decoded after it.
        """
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        at: Pass,
    ) -> Tensor:
        """The attention output [h, n, dv] of a whole prompt: query [h, n, d], key [k, n, d], value [k, n, dv].

        window: what the model's own sliding window or `span` leaves visible. Tells `at` how many entries it computed.
        """
        at.count(query.shape[0] * visible_entries(query.shape[1], window))
        return causal_attention(query, key, value, scale=scale, window=window, softcap=softcap)

    def decode(
        self, query: Tensor, held: Contents, visible: Tensor, *, scale: float, softcap: float | None, at: Pass
    ) -> Tensor:
        """The output [h, q, dv] of new tokens' query [h, q, d] over what a store holds, where visible [k, q, m] allows.

        Only asked of methods that say `decodes`.
        """
        raise NotImplementedError

    def entries(self, tokens: int, layers: int) -> int:
        """Score entries that each query head computes over all layers while `tokens` are read."""
        return sum(visible_entries(tokens, self.span(layer, layers, tokens)) for layer in range(layers))

    def check(self, tokens: int, layers: int) -> None:
        """Raise BudgetTooSmall, naming the smallest budget, if more entries than allowed would be computed."""
        full = layers * visible_entries(tokens)
        entries = self.entries(tokens, layers)
        if self.budget is not None and entries > self.budget.amount * full:
            raise self.too_small(entries / full)

    def too_small(self, share: float) -> BudgetTooSmall:
        """The error that says that `share` of the entries is the least."""
        smallest = math.ceil(share * 1e4) / 1e4
        return BudgetTooSmall(
            f"{self.key}: the budget {self.budget} of the attention scores cannot be met on this prompt; "
            f"the smallest possible is {smallest:.4g}",
            smallest,
        )


def visible_entries(tokens: int, window: int | None = None) -> int:
    """Pairs of query and key that causal attention over `tokens` computes, each query seeing `window` positions."""
    width = tokens if window is None else min(window, tokens)
    return width * tokens - width * (width - 1) // 2
