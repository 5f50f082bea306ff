"""Sparse patterns of MInference, one for each head, found as a prompt is read."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.entry_budget import allowed_entries, windowed_attention
from workbench.attention.lines import Lines, a_shape, heaviest, heaviest_of_both, probed, widest_probe
from workbench.attention.pattern_search import Judged, fill_heads, judge, judges, judging_entries
from workbench.attention.token_blocks import block_attention, blocks_seen, blocks_within
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench_kernels import Scoring

_PROBING, _JUDGING = 0.25, 0.0625  # of the entries at most that go into the probing and into the judging queries
# Columns and diagonals of the patterns searched, of prompts of some 30,000 tokens: here they are shares of the lines.
_A_SHAPE = (100, 800)
_VERTICAL_SLASH = ((30, 800), (100, 750), (500, 700), (3500, 100))


@register
class BlockSparse(AttentionMethod):
    """Find the sparse pattern of each head, guess what of it will matter, and compute only that.

    MInference has three patterns. A-shape: the first columns and last diagonals. "vertical-slash": the prompt's last
    `probe` queries attend exactly; the columns and diagonals that got most weight from them are computed for all
    queries before, the `first` columns and `last` diagonals in any case. "block": queries and keys are averaged over
    blocks, and each block of queries sees its own block and those whose products with it are largest. "search" gives
    each head the one, of all that compute as much, whose scores hold most of its attention: the A-shape, vertical-slash
    in the four proportions that the authors' code tries, and blocks.

    The authors search once for a model, on one long text; here on the prompt, by 16 of its queries, evenly spread. How
    much each pattern computes, the budget says; of the authors' numbers, which are for long prompts, it takes the
    proportions. `mixture` adds one pattern of our own: columns and diagonals in one order by weight, so that each head
    finds its proportion. Rows of probing and judging queries are exact, since they have been computed. The authors'
    code runs the first and the last pattern as vertical-slash; here each stays what it is.

    Means hide an attention sink among its neighbours, so the first block of keys is always one of those seen, unless
    `sinks` is off, as published: with pattern "block" on the default model, at half of the entries, the divergence from
    exact attention falls from 3.3 to 0.06 nats.

    With a small budget there are fewer probing queries, so that they take at most a quarter, and blocks are smaller on
    short prompts. All that is computed counts: probes and judges, averaged blocks, and twice an entry where a chosen
    column and diagonal cross; of a block on the main diagonal the visible half, as elsewhere.

    Only reading is changed, as published: MInference is for the time before the first token, and decodes over the whole
    cache. Its patterns need many queries at once: the last of a prompt choose columns and diagonals for all before
    them, and blocks of queries share a choice; a single query has nobody to share with. (Choosing blocks of keys for
    each new token is another family of methods; KV methods with an index do it.)
    """

    key = "block-sparse"
    title = "Block-sparse (MInference)"
    paper = Paper(
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        "Jiang et al. 2024",
        "2407.02490",
    )
    claim = "up to 10 times faster reading of 1M tokens"
    fidelity = Fidelity("deviates", "the pattern of each head is searched on the prompt itself, under a budget")
    presets = (
        Preset(
            "code",
            "microsoft/MInference, minference/modules/minference_forward.py, fb56c91",
            probe=64,
            first=30,
            last=100,
            block=64,
        ),
        Preset("paper", "section 3.2: one of three patterns for each head", pattern="search"),
    )
    default_budget = 0.25
    looks_ahead: ClassVar[bool] = True

    pattern: Literal["search", "a-shape", "vertical-slash", "block"] = param(
        "search", help="what is computed of the scores: the same pattern for all heads, or the best for each"
    )
    probe: int = param(64, ge=1, le=4096, unit="tokens", help="last queries that choose columns and diagonals")
    first: int = param(30, ge=0, le=4096, unit="columns", help="first columns that come before all others")
    last: int = param(100, ge=1, le=4096, unit="diagonals", help="last diagonals that come before all others")
    block: Literal[16, 32, 64, 128] = param(64, unit="tokens", help="size of the blocks, at most")
    mixture: bool = param(
        False,
        help="search also the columns and diagonals of most weight in any proportion",
        own="not in the paper; at a quarter of the entries it lowers the error of heads' outputs from 0.24 to 0.22 on "
        "workbench-tiny (874 tokens), from 0.27 to 0.23 on smollm2-135m (698)",
    )
    sinks: bool = param(
        True,
        help="whether all see the first block, in the block pattern",
        own="as published blocks lose 3.3 nats, with it 0.06 (smollm2-135m, half of the entries)",
    )

    def entries(self, tokens: int, layers: int) -> int:
        allowed, full = self._allowed(tokens), visible_entries(tokens)
        if allowed >= full:
            return layers * full
        if self.pattern == "block":
            return layers * blocks_within(tokens, allowed, self.block).entries
        return layers * max(allowed, 2 * tokens - 1)  # no less than one probing query and the main diagonal

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        tokens = query.shape[1]
        allowed = self._allowed(tokens)
        if scoring.window is not None or allowed >= visible_entries(tokens):
            most = self.entries(tokens, layers=1)
            return windowed_attention(query, key, value, scoring, context, most)
        if self.pattern == "block":
            plan = blocks_within(tokens, allowed, self.block)
            context.count(query.shape[0] * plan.entries)
            return block_attention(query, key, value, plan, scoring, sinks=self.sinks)
        # What there has to be at least: on short prompts a budget allows less than every query's own token.
        return self._attend_by_head(query, key, value, self.entries(tokens, layers=1), scoring, context)

    def _attend_by_head(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: int, scoring: Scoring, context: PassContext
    ) -> Tensor:
        heads, tokens, _ = query.shape
        first = tokens - min(self.probe, widest_probe(tokens, max(int(_PROBING * allowed), tokens)))
        probes = probed(query, key, value, first, scoring)
        left = allowed - visible_entries(tokens) + visible_entries(first)
        at = [] if self.pattern == "a-shape" else judges(first, min(int(_JUDGING * allowed), left - first))
        left -= judging_entries(at)
        context.count(heads * (allowed - left))
        if not first:  # every query is one of the last
            return probes.out.to(query.dtype)
        lines = self._lines(probes.columns[:, :first], probes.diagonals[:, :first], left)
        plan = blocks_within(first, left, self.block)

        out = torch.empty(heads, tokens, value.shape[-1], dtype=query.dtype, device=query.device)
        best = [0] * heads
        judged: Judged | None = None
        if at:
            rows = torch.tensor(at, device=query.device)
            seen = [each.seen(rows, first) for each in lines]
            if self.pattern == "search" and plan.entries <= left:
                seen.append(blocks_seen(query[:, :first], key[:, :first], plan, rows, first, sinks=self.sinks))
            judged = judge(query, key, value, rows, seen, scoring)
            best = judged.best.tolist()
        computed = fill_heads(out[:, :first], query, key, value, best, lines, plan, scoring, sinks=self.sinks)
        context.count(computed)
        if judged is not None:
            out[:, rows] = judged.out
        out[:, first:] = probes.out
        return out

    def _lines(self, columns: Tensor, diagonals: Tensor, allowed: int) -> list[Lines]:
        """The patterns of columns and diagonals that there are, by the weight [h, n] of each."""
        heads, rows = columns.shape
        found = []
        if self.pattern != "vertical-slash":
            found.append(a_shape(heads, rows, allowed, _share(_A_SHAPE), columns.device))
        if self.pattern != "a-shape":
            found += [
                heaviest(columns, diagonals, allowed, _share(shape), first=self.first, last=self.last)
                for shape in _VERTICAL_SLASH
            ]
        if self.pattern != "a-shape" and self.mixture:
            found.append(heaviest_of_both(columns, diagonals, allowed))
        return found

    def _allowed(self, tokens: int) -> int:
        budget = self.effective_budget
        assert budget is not None
        return allowed_entries(budget, tokens)


def _share(shape: tuple[int, int]) -> float:
    """Columns among the lines of a pattern."""
    return shape[0] / sum(shape)
