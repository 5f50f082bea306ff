"""DeltaLLM's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.entry_budget import allowed_entries, windowed_attention
from workbench.attention.key_differences import DeltaShape, delta_attention, fewest_zeros, over, updated
from workbench.attention.token_groups import groups_behind
from workbench.core.partial_softmax import ROWS
from workbench.registry import Fidelity, Paper, param, register
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised

_MOST_ZEROS = 0.9  # beyond it a narrower window, or shorter groups, come first


@register
class DeltaAttention(AttentionMethod):
    """Score a key by its difference to the key before it, multiplying only the channels that moved.

    A product q k_j is q k_(j-1) plus q times what changed between the two keys. A channel counts as unchanged until it
    differs by more than a threshold from its last number, so most differences are zero and nothing is multiplied for
    them, while errors do not add up. Attention is hybrid: exact scores over the last `window` tokens, such sums before.

    As in the KV method of this paper, sums begin anew every `group` tokens with a whole key, and each such group of a
    KV head has the smallest threshold at which the share `sparsity` of its differences is zero; only whole groups are
    approximated, so that no query sees what comes after it. An entry here is d products, one for each channel of a key:
    a key of which a quarter of the channels moved counts a quarter. The values are not approximated, nor counted. With
    a budget "auto" takes the fewest zeros that meet it; beyond 90 % the window is narrowed first, and then the groups.

    Decoding goes on so, as published: groups, window and zeros are those of the prompt (a budget of 1: all is exact),
    and what a KV method has dropped or rounded is not there for either. The window and the groups count what a KV head
    holds. As soon as a group is old its differences are made and held beside the cache until what the cache holds of it
    changes: 8 bytes for each that is not zero, counted as memory of attention. The KV method `deltallm` makes the cache
    itself smaller in the same manner.
    """

    key = "deltallm-attention"
    title = "DeltaLLM (attention)"
    paper = Paper(
        "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference",
        "Qi et al. 2025",
        "2507.19608",
    )
    claim = "60 % of the products with keys skipped while reading, at about the same accuracy"
    fidelity = Fidelity(
        "reconstructed from the abstract", "where sums begin anew, and how a budget chooses the zeros, is chosen here"
    )

    decodes: ClassVar[bool] = True

    sparsity: Literal["auto", 30, 40, 50, 60, 70, 80, 90] = param(
        "auto",
        unit="%",
        help="share of key differences that are zero: 60, or as few as the budget asks for",
        own="60 % is the abstract's; which threshold gives it is chosen here",
    )
    window: int = param(
        32,
        ge=1,
        le=4096,
        unit="tokens",
        help="last tokens with exact scores, at most with a budget",
        own="the paper's window was not read",
    )
    group: Literal[16, 32, 64, 128] = param(
        64,
        unit="tokens",
        help="after how many tokens sums begin anew, at most",
        own="not in the abstract; errors must not add up over a prompt",
    )

    def entries(self, tokens: int, layers: int) -> int:
        return layers * self._shape(tokens).entries

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        shape, tokens = self._shape(query.shape[1]), query.shape[1]
        if scoring.window is not None or shape.zeros <= 0 or shape.window >= tokens:
            return windowed_attention(query, key, value, scoring, context, shape.entries)
        out, computed = delta_attention(query, key, value, shape, scoring)
        context.count(computed)
        return out

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        shape, kv_heads = self._shape(context.tokens), len(contents.keys)
        groups = len(query) // kv_heads
        out = torch.empty(*query.shape[:2], contents.values.shape[-1], dtype=query.dtype, device=query.device)
        exact = self.whole or shape.zeros <= 0
        for head, positions in enumerate(contents.positions.expand(kv_heads, -1)):
            heads = slice(head * groups, (head + 1) * groups)
            slots = visible[head].any(dim=0).nonzero()[:, 0]
            slots = slots[positions[slots].argsort()]  # what is seen, by position
            keys, values, where = contents.keys[head, slots].float(), contents.values[head, slots], positions[slots]
            seen = visible[head][:, slots]  # [q, c]
            remembered = context.state.get((self.key, context.layer, head), ())
            for start in range(0, query.shape[1], ROWS):
                visible_rows = seen[start : start + ROWS]
                numbers = torch.arange(seen.shape[1], device=seen.device)
                last_seen = (visible_rows * numbers).amax(dim=1)  # each query's own
                old = torch.zeros_like(last_seen) if exact else groups_behind(last_seen, shape.group, shape.window)
                remembered = updated(remembered, keys, where, int(old.amax()), shape)
                rows = query[heads, start : start + ROWS].float() * scoring.scale
                part, computed = over(
                    rows,
                    keys,
                    values,
                    visible_rows,
                    old,
                    remembered,
                    shape.group,
                    scoring.of(heads),
                    scoring.offsets(context.positions, where),
                )
                context.count(computed)
                out[heads, start : start + ROWS] = part.output(scoring.of(heads))
            if remembered:
                context.state[self.key, context.layer, head] = remembered
        return out

    def _shape(self, tokens: int) -> DeltaShape:
        """Groups, window and share of zeros on a prompt of this length."""
        fixed = None if self.sparsity == "auto" else self.sparsity / 100
        if self.budget is None:
            return DeltaShape.of(tokens, self.group, self.window, 0.6 if fixed is None else fixed)
        allowed = allowed_entries(self.budget, tokens)
        if allowed >= visible_entries(tokens):
            return DeltaShape.of(tokens, self.group, tokens, 0.0)
        sizes = [(group, window) for group in _halves(self.group, 4) for window in _halves(self.window, 1)]
        fitting = []
        for group, window in sizes:
            zeros = fewest_zeros(tokens, group, window, allowed) if fixed is None else fixed
            shape = DeltaShape.of(tokens, group, window, min(zeros, 1.0))
            if shape.entries <= allowed:
                fitting.append(shape)
                if fixed is not None or zeros <= _MOST_ZEROS:
                    return shape
        if fitting:
            return min(fitting, key=lambda shape: shape.zeros)
        least = 1.0 if fixed is None else fixed
        return min((DeltaShape.of(tokens, *size, least) for size in sizes), key=lambda shape: shape.entries)


def _halves(first: int, last: int) -> list[int]:
    return [first] if first <= last else [first, *_halves(first // 2, last)]
