"""The queries by which heads are judged: those that see their own token again, and those that probe."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench import arguments


def earlier(own: Tensor, at: Tensor, before: Tensor, held: Tensor, begin: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which queries see an earlier key that followed their token, and whose own key did so: bool [k or 1, nq] each.

    own [nq]: the queries' tokens, at positions at [nq], which see those from begin [nq] on (None: all); before [k or 1,
    nk]: the tokens before the keys held [k or 1, nk].
    """
    beyond = int(max(at[-1], held.max())) + 1
    mine = own * beyond + at  # tokens and positions as one number, by token first
    sees, itself = torch.zeros(2, len(held), len(at), dtype=torch.bool, device=own.device)
    for kv in range(len(held)):
        known = (before[kv] * beyond + held[kv]).sort().values
        place = torch.searchsorted(known, mine)  # the first that is not earlier
        last = known[(place - 1).clamp(min=0)]  # the most recent one that is
        nearest = last - own * beyond
        sees[kv] = (place > 0) & (nearest >= 0) & (nearest < beyond)
        if begin is not None:
            sees[kv] &= nearest >= begin
        itself[kv] = known[place.clamp(max=len(known) - 1)] == mine
    return sees, itself


def probe_positions(tokens: int, count: int) -> Tensor:
    """At most `count` of `tokens` queries, spread evenly over the second half, the last one included: int64, ascending.

    By them HACK judges heads.
    """
    arguments.whole("tokens", tokens, low=1)
    arguments.whole("count", count, low=1)
    half = tokens // 2
    at = torch.linspace(half, tokens - 1, min(count, tokens - half)).round().long()
    at[-1] = tokens - 1
    return at
