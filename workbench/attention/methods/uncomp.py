"""UNComp, the part that concerns reading."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.core.bisection import largest
from workbench.core.causal_attention import causal_attention
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench_kernels import Scoring, attend

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised
    from workbench.trace import LayerTrace

_BEGINS = (0, 2 / 32, 15 / 32, 26 / 32, 31 / 32)  # of the stages, as a share of the depth
_LAST = len(_BEGINS) - 1


@register
class UNCompReading(AttentionMethod):
    """Let fewer tokens go on from layer to layer: those to which the layer before paid most attention.

    Layers form stages by depth. In each stage so many of the prompt's tokens have a hidden state that goes on; they are
    chosen before a layer's attention, among those that came so far, by the attention that the last `queries` of them
    gave in the layer before, summed over all heads. Sizes fall evenly from the whole prompt in the first stage to the
    share `least` in the last. What has left is never seen again, neither by the prompt nor by later tokens.

    The cache's part is the KV method `uncomp`; together they are `wb.kv.UNComp() | wb.attention.UNCompReading()`. Saved
    here are the scores of those who left, in this layer and all later ones. Their hidden states still run through the
    layers' other parts, of which nothing comes back, and their keys and values stay where the cache's method does not
    drop them. As in the authors' code stages begin after 2, 15, 26 and 31 of 32 layers (it has another list for 40),
    here at these shares of any depth; its last stage has 1,536 tokens of 4,096, here that share of the prompt. Chosen
    here: the prompt's last token always goes on; with a budget, the least share is what it allows.
    """

    key = "uncomp-reading"
    title = "UNComp, reading"
    paper = Paper(
        "UNComp: Can Matrix Entropy Uncover Sparsity? A Compressor Design from an Uncertainty-Aware Perspective",
        "Xiong et al. 2024",
        "2410.03090",
    )
    claim = "prompts read 6 % faster"
    fidelity = Fidelity("deviates", "hidden states that have left still run through the linear layers")
    presets = (
        Preset("stages", "menik1126/UNComp, uncomp/llama_model.py, b3e9f7b", least=0.375, queries=8),  # 1,536 of 4,096
    )
    decodes: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    goes_by_earlier: ClassVar[bool] = True

    least: float = param(0.375, ge=0.0, le=1.0, unit="of the prompt", help="tokens that reach the last stage")
    queries: int = param(8, ge=1, le=1024, unit="tokens", help="whose attention chooses who goes on")

    def size(self, layer: int, layers: int, tokens: int) -> int:
        """How many of so many tokens take part in this layer."""
        return self._size(layer, layers, tokens, self._least(layers, tokens))

    def _size(self, layer: int, layers: int, tokens: int, least: int) -> int:
        stage = sum(layer >= begin * layers for begin in _BEGINS) - 1
        return max(least + (tokens - least) * (_LAST - stage) // _LAST, 1)

    def _least(self, layers: int, tokens: int) -> int:
        if self.budget is None:
            return int(self.least * tokens)
        full = layers * visible_entries(tokens)
        allowed = self.budget.amount * full
        if self._entries(tokens, layers, 0) > allowed:
            raise self.too_small(self._entries(tokens, layers, 0) / full)
        return largest(lambda least: self._entries(tokens, layers, least) <= allowed, 0, tokens + 1)

    def entries(self, tokens: int, layers: int) -> int:
        return self._entries(tokens, layers, self._least(layers, tokens))

    def _entries(self, tokens: int, layers: int, least: int) -> int:
        return sum(visible_entries(self._size(layer, layers, tokens, least)) for layer in range(layers))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        alive = self._going_on(query.shape[1], query.device, context)
        some = [x[:, alive] for x in (query, key, value)]
        if scoring.window is None and scoring.slopes is None:
            context.count(query.shape[0] * visible_entries(len(alive)))
            out = causal_attention(some[0], some[1], some[2], scoring)
        else:
            visible = seen_in(alive, scoring.window)
            context.count_seen(query.shape[0], visible)
            offsets = scoring.offsets(alive, alive[None])
            out, _ = attend(some[0], some[1], some[2], scoring, visible=visible, offsets=offsets)
        self._vote(some[0], some[1], alive, scoring, context)
        return out.new_zeros(*query.shape[:2], value.shape[-1]).index_copy_(1, alive, out)

    def begin(self, layer: LayerTrace, context: PassContext) -> None:
        alive = self._going_on(layer.tokens, layer.device, context)
        self._vote(layer.queries[:, alive], layer.keys[:, alive], alive, layer.scoring, context)
        there = torch.zeros(layer.tokens, dtype=torch.bool, device=layer.device)
        context.state = {**context.state, layer.index: there.index_fill_(0, alive, True)}

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        there, where = context.state[context.layer], contents.positions.long()  # [k or 1, m]
        later = where >= len(there)
        visible = visible & (later | there[where.clamp_max(len(there) - 1)])[:, None]
        context.count_seen(len(query), visible)
        offsets = scoring.offsets(context.positions, contents.positions)
        return attend(query, contents.keys, contents.values, scoring, visible=visible, offsets=offsets)[0]

    def _going_on(self, tokens: int, device: torch.device, context: PassContext) -> Tensor:
        """The positions that take part in this layer, ascending, int64 [m]."""
        if context.layer in context.state:  # chosen before, by all heads
            there: Tensor = context.state[context.layer]
            return there.to(device).nonzero()[:, 0]
        if context.layer == 0 or "votes" not in context.state:
            return torch.arange(tokens, device=device)
        alive, votes = (x.to(device) for x in context.state["votes"])  # left by the layer before
        size = self.size(context.layer, context.layers, tokens)
        going: Tensor = alive[votes.argsort(descending=True, stable=True)[:size].sort().values]
        return going

    def _vote(self, query: Tensor, key: Tensor, alive: Tensor, scoring: Scoring, context: PassContext) -> None:
        """Leave for the next layer what those who are here, query [h, m, d] and key [k, m, d], gave to each other."""
        visible = seen_in(alive, scoring.window)[:, -self.queries :]
        _, rows = attend(
            query[:, -self.queries :],
            key,
            key[..., :0],
            scoring,
            visible=visible,
            offsets=scoring.offsets(alive, alive[None]),
            weights=True,
        )
        assert rows is not None
        votes = rows.sum(dim=(0, 1, 2))  # [m]
        votes[-1] = torch.inf
        context.state = {**context.state, "votes": (alive, votes)}


def seen_in(positions: Tensor, window: int | None) -> Tensor:
    """Which of the positions [m] each of them sees, bool [1, m, m]."""
    behind = positions[:, None] - positions
    seen = behind >= 0
    return (seen if window is None else seen & (behind < window))[None]
