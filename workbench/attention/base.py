"""What an attention method changes: how a prompt's scores are computed, and how far a layer looks back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from workbench.core.causal_attention import causal_attention
from workbench.errors import BadBudget, BadParameter, BudgetTooSmall, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.registry import Family, Method
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised
    from workbench.trace import LayerTrace


@dataclass
class PassContext:
    """One pass of a model over some tokens, as the attention method in it sees it.

    layers: how many the model has; layer: the one that attends now. tokens: the length of the prompt. computed: score
    entries that were really computed at each layer, summed over the query heads. state: what a layer leaves for later
    ones, and while decoding for later tokens. positions: where the new tokens [q] stand while decoding, ascending.

    While decoding one context goes on from the first token after the prompt to the last. A copy of the run shares what
    `state` holds: replace it, never write into it. Its tensors are counted as memory that attention takes.
    """

    layers: int
    tokens: int
    layer: int = 0
    computed: list[int] = field(default_factory=list)
    state: dict[Any, Any] = field(default_factory=dict)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __post_init__(self) -> None:
        self.computed = self.computed or [0] * self.layers

    def count(self, entries: int) -> None:
        """Note that so many more score entries were computed at this layer, over all its query heads."""
        self.computed[self.layer] += entries

    def count_seen(self, heads: int, seen: Tensor) -> None:
        """Note that `heads` query heads computed the entries where seen [k, q, m] is True for their KV head."""
        self.count(heads // len(seen) * int(seen.sum()))

    @property
    def state_nbytes(self) -> int:
        """Bytes of the tensors in `state`."""
        return tensor_bytes(_tensors(self.state))


class AttentionMethod(Method):
    """Base of all methods that change how attention is computed.

    Budget: the share of the full causal score entries, over all layers, that are computed while the prompt is read.
    A method that takes no budget computes all of them, in its own way.
    """

    family: ClassVar[Family] = "attention"
    decodes: ClassVar[bool] = False  # attends in its own way while decoding too, not exactly
    looks_ahead: ClassVar[bool] = False  # what a query sees depends on later tokens of the prompt
    changes_prefill: ClassVar[bool] = True  # what the queries of a prompt see, and not only how tokens are decoded
    softmax_weights: ClassVar[bool] = False  # a prompt's weights are the softmax over all that `span` leaves visible
    follows_slopes: ClassVar[bool] = True  # attends with ALiBi's slopes; else such models are refused
    goes_by_earlier: ClassVar[bool] = False  # what a layer's queries see was chosen in the layers before it
    calibration: ClassVar[int] = 0  # tokens of another text on which it learns of the model before it reads; 0: none
    all_scores: ClassVar[str] = ""  # how all of them are computed, where none can be left out: there is no budget

    @classmethod
    def takes_budget(cls) -> bool:
        return not cls.all_scores

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None and not self.takes_budget():
            raise BadParameter(f"{self.key}: all scores are computed, {self.all_scores}; it takes no budget")
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

    def source_layer(self, layer: int, layers: int) -> int:
        """The layer whose queries and keys make the attention weights of this one; by default the layer itself."""
        return layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        """The attention output [h, n, dv] of a whole prompt: query [h, n, d], key [k, n, d], value [k, n, dv].

        scoring: with what the model's own sliding window or `span` leaves visible. Tells the context how many
        entries it computed.
        """
        context.count(query.shape[0] * visible_entries(query.shape[1], scoring.window))
        return causal_attention(query, key, value, scoring)

    def learns_from(self, layer: int, layers: int) -> bool:
        """Whether the exact output of this layer teaches it something, where there is a `calibration`."""
        return False

    def learn(
        self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext, exact: Tensor
    ) -> Tensor:
        """`attend` over the text for calibration in a layer that it learns from: exact [h, n, dv] is what came out
        there under exact attention. All that then lies in `context.state` lies in the state of readings and decoding.
        """
        return self.attend(query, key, value, scoring, context)

    def begin(self, layer: LayerTrace, context: PassContext) -> None:
        """Leave in `context.state` what decoding needs of the prompt besides what the store will hold, and what reading
        chose by looking at the whole of it; nothing by default.

        Asked before the first token after the prompt, of methods that say `decodes`, and before maps of a recording.
        What reading has computed may be computed again from its recording, as stores are filled from it, and is not
        counted a second time.
        """

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        """The output [h, q, dv] of new tokens' query [h, q, d] over what a store holds, where visible [k, q, m] allows.

        The tokens stand at `context.positions` and are held already, each the last that it sees. Tells the context
        how many entries it computed. Only asked of methods that say `decodes`, not for layers with a sliding window:
        these attend to it exactly. A budget is met by reading; what that leaves visible, fixed by the length of the
        prompt, holds here.
        """
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """Whether the budget allows everything, so that nothing may be left out."""
        return self.effective_budget is not None and self.effective_budget.amount >= 1

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


def within_a_chunk(key: str, scoring: Scoring, tokens: int) -> Scoring:
    """A layer's scoring as an attention method may take it for so many tokens: without chunks, for all are in one.

    Raises NotApplicable, in the name of the method, where they are not.
    """
    if scoring.chunk is not None and tokens > scoring.chunk:
        raise NotApplicable(
            f"{key}: this model attends in chunks of {scoring.chunk} tokens, within which alone attention methods "
            f"work, and {tokens} are read"
        )
    return replace(scoring, chunk=None)


def visible_entries(tokens: int, window: int | None = None) -> int:
    """Pairs of query and key that causal attention over `tokens` computes, each query seeing `window` positions."""
    width = tokens if window is None else min(window, tokens)
    return width * tokens - width * (width - 1) // 2


def _tensors(thing: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from _tensors(item)
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
