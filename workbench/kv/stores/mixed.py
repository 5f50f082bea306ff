"""Mixed precision that stays mixed while decoding: important entries exact, all others at few bits."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store
from workbench_kernels import Scoring

_ROWS_BYTES = 1 << 25  # attention rows held at once


class MixedStore(SplitStore):
    """An exact part that new tokens enter and a low one that takes what leaves it, so that their shares stay.

    The exact part remembers the attention that each of its entries received, and adds to it at every pass. Of t new
    tokens it may grow by share * t; beyond that its entries with the least attention are quantised after the pass, in
    each head its own, but never the newest `recent` part of them. All heads demote equally many, by the share of the
    whole layer, also where one began with more exact entries than another.
    """

    moves_by_attention = True

    def __init__(self, high: DenseStore, low: PackedStore, *, share: float, recent: float, entered: int = 0) -> None:
        """entered: how many tokens have come since the store was built."""
        super().__init__((high, low))
        self.high, self.low = high, low
        self.share, self.recent, self.entered = share, recent, entered
        self._begun = high.longest - self._allowed(entered)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().append(keys, values, positions)
        self.entered += keys.shape[1]

    def reserve(self, tokens: int) -> None:
        grown = self._allowed(self.entered + tokens) - self._allowed(self.entered)
        self.high.reserve(grown + 1)  # a token enters before another leaves
        self.low.reserve_taken(tokens - grown)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        slots, exact = self.high.longest + self.low.keys.codes.longest, self.high.longest
        received = torch.zeros(self.high.keys.heads, exact, device=query.device)
        block = max(1, _ROWS_BYTES // (4 * query.shape[0] * slots))
        outs, rows = [], []
        for part, at in zip(query.split(block, dim=1), query_positions.split(block), strict=True):
            out, probs = Store.attend(self, part, at, scoring, weights=True)
            assert probs is not None
            received += probs[..., :exact].sum(dim=(1, 2))
            outs.append(out)
            if weights:
                rows.append(probs)
        before = self.high.eviction_state
        assert before is not None
        self.high.replace_state(before + received)
        self._demote(exact - self._begun - self._allowed(self.entered))
        return torch.cat(outs, dim=1), torch.cat(rows, dim=2) if weights else None

    def _allowed(self, entered: int) -> int:
        """By how many entries of each head the exact part may have grown after so many tokens."""
        return int(self.share * entered + 1e-6)

    def _demote(self, count: int) -> None:
        if count <= 0:
            return
        received, positions = self.high.eviction_state, self.high.slot_positions
        assert received is not None
        valid = self.high.keys.valid()
        if valid is not None:  # slots beyond a head's length hold nothing
            received, positions = received.masked_fill(~valid, torch.inf), positions.masked_fill(~valid, -1)
        slots = weakest(received, positions, count, self.recent)
        self.low.take(self.high.keys.at(slots), self.high.values.at(slots), positions.gather(1, slots))
        self.high.evict(slots)

    def clone(self) -> Self:
        high, low = self.high.clone(), self.low.clone()
        return type(self)(high, low, share=self.share, recent=self.recent, entered=self.entered)


def weakest(received: Tensor, positions: Tensor, count: int, recent: float) -> Tensor:
    """The slots [k, count] with the least attention, the newest `recent` part of each head's entries set aside.

    received float32 [k, m], inf in slots that hold nothing, and positions int [k, m], -1 there. Fewer are set aside
    where that many would not be left.
    """
    counts = (positions >= 0).sum(dim=1)  # [k]
    safe = torch.minimum((recent * counts + 1e-6).long(), counts - count)
    oldest = positions.sort(dim=1, descending=True).values.gather(1, (safe - 1).clamp_min(0)[:, None])
    aside = (positions >= oldest) & (positions >= 0) & (safe > 0)[:, None]
    return received.masked_fill(aside, torch.finfo(torch.float32).max).topk(count, dim=1, largest=False).indices
