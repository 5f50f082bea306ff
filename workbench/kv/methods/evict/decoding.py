"""Re-scoring while decoding."""

from __future__ import annotations

from workbench.kv.base import Holding
from workbench.kv.methods.evict.knorm import Knorm
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class Decoding(Knorm):
    """Score what the cache holds anew every so many tokens while decoding, by any scorer, and let the lowest leave.

    The prompt is compressed by the recipe's scorer as ever (by itself, by the norm of its keys). While decoding, new
    tokens come until the cache is as large as its budget; then the scorer sees what is held, layer by layer, with the
    last `queries` queries, and the `every` entries that it scores lowest leave at once, of equals the oldest. What the
    recipe's merge stage does with dropped entries it does here too. Any store takes part whose entries can leave one by
    one, and the cache never outgrows its budget: a quarter of it leaves at most, however large `every` is.

    KVPress, whose wrapper this is, lets the cache grow by `every` tokens and returns it to a number of tokens; here
    the larger of the two sizes is the budget. It keeps hidden states in place of queries, and forgets them after each
    time; queries here begin with the prompt's last ones, roll on, and are counted in the budget. Heads of unequal
    length, as AdaKV makes them, are scored one by one and lose equally many entries.
    """

    key = "decoding"
    title = "Re-scoring while decoding"
    paper = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        "Devoto et al. 2025",
        "2510.00636",
    )
    claim = "any scorer compresses while decoding too"
    default_budget = 0.5
    fidelity = Fidelity("deviates", "the budget is the most that is ever held, not what is returned to at intervals")
    presets = (Preset("kvpress", "NVIDIA/kvpress, kvpress/presses/decoding_press.py, 0dc3358", every=512, queries=256),)
    rescores = True

    every: int = param(512, ge=1, le=8192, unit="tokens", help="how many leave at once, a quarter of the cache at most")
    queries: int = param(
        32,
        ge=0,
        le=1024,
        unit="tokens",
        help="last queries that scores are made from, counted in the budget; 0 for scores of keys and values alone",
        own="KVPress keeps 256 hidden states that no budget counts; 32 are what SnapKV votes by",
    )

    @property
    def observes(self) -> int:
        return self.queries

    def leaving_at_once(self, holding: Holding) -> int:
        return max(holding.room, min(self.every, holding.entries // 4)) if holding.room > 0 else 0
