"""UniAttn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.core.attention_rows import row_blocks
from workbench.core.causal_attention import causal_attention
from workbench.core.partial_softmax import weighted_sum
from workbench.errors import NotApplicable
from workbench.registry import Paper, param, register
from workbench_kernels import Scoring
from workbench_kernels.softmax import attention_weights

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised

_SHARED = "uniattn"


@register
class UniAttn(AttentionMethod):
    """Let layers reuse the attention weights of a layer before them.

    Neighbouring layers attend alike, most of all near the top. So the topmost layers form blocks of `size`, and in each
    block the first layer's softmax serves all: the others mix their own values with it, head by head, and compute no
    scores, neither while reading nor while decoding. As many layers reuse weights as the budget asks for, from the top
    downwards; where blocks of `size` cannot save enough they are longer.

    The paper also trains a linear projection that compensates the error; that is left out here, and without it only a
    few layers can go: on the default model a budget of 0.9 is good, and below 0.75 answers change.

    The shared weights have to be kept, for all tokens of a prompt read at once: half of heads x n x n numbers, one
    block's at a time, and prompts for which they take more than `keep` are refused. To keep the first layer's queries
    and keys instead, and make its weights again for each layer, would take little memory and be exact, but computes
    every score entry as often as without sharing: nothing would be saved, and no budget met. In a layer whose window is
    narrower, weights outside it are dropped and the others scaled up; so are those of tokens that a layer's cache no
    longer holds. The map of a layer that reuses weights is that of the layer that it takes them from.
    """

    key = "uniattn"
    title = "UniAttn"
    paper = Paper(
        "UniAttn: Reducing Inference Costs via Softmax Unification for Post-Training LLMs",
        "Xiong et al. 2025",
        "2502.00439",
    )
    claim = "lower inference costs at the quality of post-training"
    default_budget = 0.9
    decodes: ClassVar[bool] = True
    softmax_weights: ClassVar[bool] = True

    size: int = param(8, ge=2, le=256, unit="layers", help="layers that share one softmax, more where the budget asks")
    keep: int = param(2048, ge=1, le=1_048_576, unit="MiB", help="memory that the shared weights of a prompt may take")

    def source_layer(self, layer: int, layers: int) -> int:
        """The layer whose weights this one uses, itself if it computes its own."""
        reusing, size = self._reusing(layers), self._size(layers)
        top = layers - 1 - layer  # how many are above it
        whole, rest = divmod(reusing, size - 1)
        if top < whole * size:
            return layers - (top // size + 1) * size
        if rest and top < whole * size + rest + 1:
            return layers - whole * size - rest - 1
        return layer

    def entries(self, tokens: int, layers: int) -> int:
        return (layers - self._reusing(layers)) * visible_entries(tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        anchor = self.source_layer(context.layer, context.layers)
        if anchor != context.layer:
            out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
            for block in context.state[_SHARED]:
                weights = _within(block, scoring.window)
                out[:, block.rows] = weighted_sum(weights, value[:, block.keys])
            if not self._serves(anchor, context.layer + 1, context.layers):
                del context.state[_SHARED]
            return out
        context.count(query.shape[0] * visible_entries(query.shape[1], scoring.window))
        if not self._serves(anchor, anchor + 1, context.layers):
            return causal_attention(query, key, value, scoring)
        self._check_room(query, value, scoring.window)
        out, kept = torch.empty_like(query[..., :1].expand(-1, -1, value.shape[-1])), []
        for rows, keys, probs in row_blocks(query, key, scoring):
            kept.append(_Weights(rows, keys, probs.to(value.dtype)))
            out[:, rows] = weighted_sum(kept[-1].weights, value[:, keys])
        context.state[_SHARED] = kept
        return out

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        anchor = self.source_layer(context.layer, context.layers)
        groups = query.shape[0] // len(contents.keys)
        seen = visible.repeat_interleave(groups, dim=0)  # [h, q, m]
        shared = context.state.get(_SHARED)
        if anchor != context.layer and shared is not None and shared.layer == anchor:
            weights = _moved(shared, contents.positions).masked_fill(~seen, 0)
            weights /= weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        else:  # also where the layer that it would follow has a sliding window and did not leave its weights
            context.count_seen(len(query), visible)
            rows = query.float().unflatten(0, (-1, groups)).flatten(1, 2)  # [k, g * q, d]
            scores = torch.bmm(rows, contents.keys.float().transpose(1, 2)).unflatten(1, (groups, -1)).flatten(0, 1)
            weights = attention_weights(scores, scoring, seen)
            context.state[_SHARED] = _Step(context.layer, weights, contents.positions)
        return weighted_sum(weights.to(contents.values.dtype), contents.values).to(query.dtype)

    def _reusing(self, layers: int) -> int:
        """How many layers reuse weights; all but one at most."""
        budget = self.effective_budget
        assert budget is not None
        return min(math.ceil((1 - budget.amount) * layers - 1e-9), layers - 1)

    def _size(self, layers: int) -> int:
        """The layers of a block: `size`, or more if otherwise too few could reuse weights."""
        reusing, size = self._reusing(layers), self.size
        while reusing > 0 and -(-reusing // (size - 1)) + reusing > layers:
            size += 1
        return size

    def _serves(self, anchor: int, layer: int, layers: int) -> bool:
        return layer < layers and layer != anchor and self.source_layer(layer, layers) == anchor

    def _check_room(self, query: Tensor, value: Tensor, window: int | None) -> None:
        nbytes = query.shape[0] * visible_entries(query.shape[1], window) * value.dtype.itemsize
        if nbytes > self.keep * 2**20:
            raise NotApplicable(
                f"uniattn: the weights that layers share take {nbytes / 2**20:,.0f} MiB for {query.shape[1]} tokens, "
                f"and `keep` allows {self.keep:,}; raise it, or shorten the prompt"
            )


class _Weights(NamedTuple):
    """Rows of the shared weights [h, r, keys]."""

    rows: slice
    keys: slice
    weights: Tensor


class _Step(NamedTuple):
    """The weights [h, q, m] that `layer` gave to what it holds, at positions [k or 1, m]."""

    layer: int
    weights: Tensor
    positions: Tensor


def _within(block: _Weights, window: int | None) -> Tensor:
    """The weights, of which those outside a narrower window go to the others."""
    rows, keys, weights = block
    if window is None or keys.start > rows.stop - 1 - window:  # all rows see all of these keys
        return weights
    at_row = torch.arange(rows.start, rows.stop, device=weights.device)[:, None]
    outside = torch.arange(keys.start, keys.stop, device=weights.device) <= at_row - window
    weights = weights.masked_fill(outside, 0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _moved(step: _Step, positions: Tensor) -> Tensor:
    """The weights for entries at positions [k or 1, m]: what the other layer gave to the same tokens, else nothing."""
    if step.positions.shape == positions.shape and torch.equal(step.positions, positions):
        return step.weights
    heads, rows, _ = step.weights.shape

    def index(at: Tensor) -> Tensor:
        return at.long().repeat_interleave(heads // len(at), dim=0)[:, None].expand(-1, rows, -1)

    last = max(int(step.positions.max()), int(positions.max()))
    spread = step.weights.new_zeros(heads, rows, last + 1)
    return spread.scatter_add_(2, index(step.positions), step.weights).gather(2, index(positions))
