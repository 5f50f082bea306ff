"""UniAttn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.shared_layers import source_layer
from workbench.attention.shared_weights import SharedRows, SharedStep, compensation, moved, newest_values, within
from workbench.core.attention_rows import row_blocks
from workbench.core.causal_attention import causal_attention
from workbench.core.partial_softmax import by_query_head, weighted_sum
from workbench.errors import NotApplicable
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench_kernels import Scoring
from workbench_kernels.softmax import attention_weights

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised

_SHARED = "uniattn"
_COMPENSATION = "uniattn's compensation"


@register
class UniAttn(AttentionMethod):
    """Let layers reuse the attention weights of a layer before them.

    Neighbouring layers attend alike, most of all near the top. So the topmost layers form blocks of `size`, and in each
    block the first layer's softmax serves all: the others mix their own values with it, head by head, and compute no
    scores, neither while reading nor while decoding. As many layers reuse weights as the budget asks for, from the top
    downwards; where blocks of `size` cannot save enough they are longer.

    What a layer's output loses so, a linear projection of its input gives back in part (section 3.3). As in the
    authors' code it is calibrated layer by layer, by a pseudo-inverse, on a text (the ready examples "code" and
    "dialogue", in two passes before the prompt is read): so that shared weights with it come nearest to the output that
    the layer has in the model as it is. There the projection is only where fine-tuning begins, which is left out, and
    reads the block's normed input. An attention method does not see that: here it reads the layer's values, which are a
    projection of it. The scores of that text are not counted as the prompt's.

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
    fidelity = Fidelity(
        "untrained part of a trained method",
        "the compensation is calibrated in closed form on a layer's values; the fine-tuning that follows is absent",
    )
    presets = (
        Preset(
            "scripts", "Bostoncake/UniAttn, README.md and utils/calc_init_weights.py, 79a24cc", size=4, compensate=True
        ),
    )
    default_budget = 0.9
    decodes: ClassVar[bool] = True
    softmax_weights: ClassVar[bool] = True
    calibration: ClassVar[int] = 1024

    size: int = param(4, ge=2, le=256, unit="layers", help="layers that share one softmax, more where the budget asks")
    compensate: bool = param(True, help="give back by a projection of a layer's values what its output loses")
    keep: int = param(
        2048,
        ge=1,
        le=1_048_576,
        unit="MiB",
        help="memory that the shared weights of a prompt may take",
        own="a limit of this implementation",
    )

    def source_layer(self, layer: int, layers: int) -> int:
        """The layer whose weights this one uses, itself if it computes its own."""
        return source_layer(layer, layers, self._reusing(layers), self.size)

    def entries(self, tokens: int, layers: int) -> int:
        return (layers - self._reusing(layers)) * visible_entries(tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        anchor = self.source_layer(context.layer, context.layers)
        if anchor != context.layer:
            out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
            for block in context.state[_SHARED]:
                weights = within(block, scoring.window, sunk=scoring.sinks is not None)
                out[:, block.rows] = weighted_sum(weights, value[:, block.keys])
            out += self._given_back(value, context)
            if not self._serves(anchor, context.layer + 1, context.layers):
                del context.state[_SHARED]
            return out
        context.count(query.shape[0] * visible_entries(query.shape[1], scoring.window))
        if not self._serves(anchor, anchor + 1, context.layers):
            return causal_attention(query, key, value, scoring)
        self._check_room(query, value, scoring.window)
        out, kept = torch.empty_like(query[..., :1].expand(-1, -1, value.shape[-1])), []
        for rows, keys, probs in row_blocks(query, key, scoring):
            kept.append(SharedRows(rows, keys, probs.to(value.dtype)))
            out[:, rows] = weighted_sum(kept[-1].weights, value[:, keys])
        context.state[_SHARED] = kept
        return out

    def learns_from(self, layer: int, layers: int) -> bool:
        return self.compensate and self.source_layer(layer, layers) != layer

    def learn(
        self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext, exact: Tensor
    ) -> Tensor:
        lost = exact - self.attend(query, key, value, scoring, context)
        context.state[_COMPENSATION, context.layer] = compensation(value, lost)
        return exact - lost + self._given_back(value, context)

    def _given_back(self, value: Tensor, context: PassContext) -> Tensor | float:
        """The compensation [h, q, dv] of tokens' value [k, q, dv]; 0 where none was calibrated."""
        given = context.state.get((_COMPENSATION, context.layer))
        if given is None:
            return 0.0
        rows = value.float().transpose(0, 1).flatten(1) @ given
        by_head: Tensor = rows.unflatten(1, (-1, value.shape[-1])).transpose(0, 1).to(value.dtype)
        return by_head

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        anchor = self.source_layer(context.layer, context.layers)
        groups = query.shape[0] // len(contents.keys)
        seen = visible.repeat_interleave(groups, dim=0)  # [h, q, m]
        shared = context.state.get(_SHARED)
        if anchor != context.layer and shared is not None and shared.layer == anchor:
            weights = moved(shared, contents.positions).masked_fill(~seen, 0)
            kept = weights.sum(dim=-1, keepdim=True)
            if scoring.sinks is not None:
                kept = kept + (1 - shared.weights.sum(dim=-1, keepdim=True))  # what sinks got
            weights /= kept.clamp_min(torch.finfo(weights.dtype).tiny)
            given = self._given_back(newest_values(contents, context.positions), context)
        else:  # also where the layer that it would follow has a sliding window and did not leave its weights
            context.count_seen(len(query), visible)
            rows = query.float().unflatten(0, (-1, groups)).flatten(1, 2)  # [k, g * q, d]
            scores = torch.bmm(rows, contents.keys.float().transpose(1, 2)).unflatten(1, (groups, -1)).flatten(0, 1)
            offsets = by_query_head(scoring.offsets(context.positions, contents.positions), len(query))
            weights = attention_weights(scores, scoring, seen, offsets)
            context.state[_SHARED] = SharedStep(context.layer, weights, contents.positions)
            given = 0.0
        return (weighted_sum(weights.to(contents.values.dtype), contents.values) + given).to(query.dtype)

    def _reusing(self, layers: int) -> int:
        """How many layers reuse weights; all but one at most."""
        budget = self.effective_budget
        assert budget is not None
        return min(math.ceil((1 - budget.amount) * layers - 1e-9), layers - 1)

    def _serves(self, anchor: int, layer: int, layers: int) -> bool:
        return layer < layers and layer != anchor and self.source_layer(layer, layers) == anchor

    def _check_room(self, query: Tensor, value: Tensor, window: int | None) -> None:
        nbytes = query.shape[0] * visible_entries(query.shape[1], window) * value.dtype.itemsize
        if nbytes > self.keep * 2**20:
            calibrated = (
                f" (with `compensate`, a text of up to {self.calibration} tokens too)" if self.compensate else ""
            )
            raise NotApplicable(
                f"uniattn: the weights that layers share take {nbytes / 2**20:,.0f} MiB for {query.shape[1]} tokens, "
                f"and `keep` allows {self.keep:,}; raise it, or shorten the prompt{calibrated}"
            )
