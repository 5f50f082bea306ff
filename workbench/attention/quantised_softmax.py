"""Softmax weights that are rounded to a few levels before they meet the values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.core.attention_rows import row_blocks
from workbench.core.partial_softmax import scaled_scores, weighted_sum
from workbench.registry import param
from workbench_kernels import Scoring
from workbench_kernels.softmax import normalised

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised
    from workbench.trace import LayerTrace

_PROBES = 16  # queries of a prompt that are looked at when a rounding is chosen ...
_ENTRIES = 2**22  # ... and no more weights than these
_WIDTH = 3  # candidates whose neighbours are tried next


class QuantisedSoftmax(AttentionMethod):
    """Base of methods that round softmax weights to 2 ** bits levels, of which one is zero and one is 1.

    Levels lie differently for each layer: `candidates` says how they may, `rounded` rounds to them. As post-training
    quantisers do, the one is taken whose attention output over some calibration queries is nearest to the exact one.
    Calibration is the prompt itself: up to 16 of its queries, evenly spread and the last among them, all heads
    together. So what a query sees depends on later ones of the prompt; what was chosen holds for the tokens decoded
    after it. Scores and softmax stay exact, weights are not made to sum to 1 again, and values stay as they are.

    All scores are computed, so there is no budget. What gets smaller is one operand of the second product, `bits`
    instead of 16 for each weight, for processors that use it; here weights are rounded and multiplied as floating
    point, which takes longer. Layers with a sliding window are decoded exactly.
    """

    decodes: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    all_scores: ClassVar[str] = "and the weights rounded"

    bits: Literal[3, 4, 6, 8] = param(
        4,
        help="bits of each softmax weight",
        own="papers on such rounding give figures for 3, 4 and 6 bits; 4 is the one between",
    )

    @abstractmethod
    def candidates(self) -> Sequence[Sequence[Any]]:
        """Ways in which the levels may lie: families, in each of which neighbours are alike."""

    @abstractmethod
    def rounded(self, weights: Tensor, candidate: Any) -> Tensor:
        """Softmax weights of any shape, float32, at the levels of this candidate."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        heads, tokens, _ = query.shape
        context.count(heads * visible_entries(tokens, scoring.window))
        place = self.key, context.layer
        if place not in context.state:
            context.state[place] = self._chosen(query, key, value, scoring)
        out = torch.empty(heads, tokens, value.shape[-1], dtype=query.dtype, device=query.device)
        for block in row_blocks(query, key, scoring):
            weights = self.rounded(block.probs, context.state[place])
            out[:, block.rows] = weighted_sum(weights, value[:, block.keys].float()).to(out.dtype)
        return out

    def begin(self, layer: LayerTrace, context: PassContext) -> None:
        context.state[self.key, context.layer] = self._chosen(layer.queries, layer.keys, layer.values, layer.scoring)

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        context.count_seen(len(query), visible)
        offsets = scoring.offsets(context.positions, contents.positions)
        scores = scaled_scores(query.float() * scoring.scale, contents.keys, scoring, offsets)  # [h, q, m]
        unseen = ~visible.repeat_interleave(len(query) // len(contents.keys), dim=0)
        weights = normalised(scores.masked_fill_(unseen, -torch.inf), scoring)
        values, place = contents.values.float(), (self.key, context.layer)
        if place not in context.state:  # no prompt was recorded: the first tokens after it stand for it
            context.state[place] = self.choose([weights], [values])
        return weighted_sum(self.rounded(weights, context.state[place]), values).to(query.dtype)

    def choose(self, weights: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
        """The candidate whose rounding changes the outputs of some weights [h, r, c] over values [k, c, dv] least."""

        def cost(candidate: Any) -> float:
            changes = (
                weighted_sum(self.rounded(w, candidate).sub_(w), v) for w, v in zip(weights, values, strict=True)
            )
            return sum(float(change.square().sum()) for change in changes)

        return least(self.candidates(), cost)

    def _chosen(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Any:
        """The candidate for a prompt's query [h, n, d], key [k, n, d] and value [k, n, dv]."""
        heads, tokens, _ = query.shape
        probes = min(_PROBES, max(_ENTRIES // (heads * tokens), 1))
        which = torch.linspace(tokens - 1, 0, probes + 1).round().long()[:-1].unique()
        blocks = list(row_blocks(query[:, which.to(query.device)], key, scoring, query_positions=which))
        return self.choose([block.probs for block in blocks], [value[:, block.keys].float() for block in blocks])


def least(families: Sequence[Sequence[Any]], cost: Callable[[Any], float]) -> Any:
    """The candidate with the smallest cost found by a search from coarse to fine, the first of equal ones.

    families: candidates in an order in which neighbours cost alike. At first every eighth part of the longest is tried
    in all of them; then, at half the distance each time, the neighbours of the three best so far (as the fast
    progressive combining search of Wu et al. 2024, arXiv:2407.12951, section 3.4, does for pairs of parameters).
    """
    step = 1 << max((max(map(len, families)) // 8).bit_length() - 1, 0)
    costs: dict[tuple[int, int], float] = {}
    wanted = {
        (family, place) for family, candidates in enumerate(families) for place in range(0, len(candidates), step)
    }
    while True:
        for family, place in sorted(wanted - costs.keys()):
            costs[family, place] = cost(families[family][place])
        best = sorted(costs, key=lambda where: (costs[where], where))
        if step == 1:
            return families[best[0][0]][best[0][1]]
        step //= 2
        wanted = {
            (family, near)
            for family, place in best[:_WIDTH]
            for near in (place - step, place + step)
            if 0 <= near < len(families[family])
        }
