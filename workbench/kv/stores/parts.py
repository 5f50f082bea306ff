"""Stores that hold their entries in several parts: each is attended to where it lies, and partial softmaxes are merged.

What such a store says is where new tokens enter (`growing`) and what attends to each part (`attentions`). A token that
comes alone is then attended to by kernels, and steps are captured, with that same list.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Part, Pin, Place
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Store, for_kernel
from workbench.measure.memory import tensor_bytes
from workbench_kernels import Scoring
from workbench_kernels.rows import Ragged
from workbench_kernels.softmax import merge_states


def states_of(parts: Sequence[Part], query: Tensor, scoring: Scoring) -> list[tuple[Tensor, Tensor]]:
    """The state of each part; sinks are one key more of the first."""
    rest = scoring.without_sinks()
    return [part(query, rest if later else scoring) for later, part in enumerate(parts)]


class PartedStore(Store):
    """Base of stores that attend part by part."""

    @property
    @abstractmethod
    def growing(self) -> tuple[Rows, Rows]:
        """The rows that a new token's key and value join."""

    @abstractmethod
    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        """What attends to each part, with `growing` at keys and values, while so many tokens come; other rows lie where
        `pin` says. There is at least one part, and none is left out that is empty now and will not be then.
        """

    def attended_in_parts(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> CapturedAttention:
        """Attention over all parts."""
        parts = self.attentions(keys, values, steps, pin)
        return lambda query, scoring: merge_states(states_of(parts, query, scoring))

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        keys, values = self.growing
        fits, asked = for_kernel(query, keys.data, query_positions, scoring)
        if not fits or asked is not None or self.capturable is None:
            return None
        return self.attended_in_parts(keys.ragged(), values.ragged(), 0, here)(query, scoring)

    # -- captured decode steps

    @property
    def capturable(self) -> Capturable | None:
        return self

    @property
    def period(self) -> int | None:
        """How many tokens are compressed together; None where none ever is."""
        return None

    @property
    def steps_until_settled(self) -> int | None:
        """How many tokens may come before entries have to be compressed, at least one; None: any number."""
        return None

    def settle(self) -> None:
        """Compress what has waited for long enough, in place."""

    @property
    def placed(self) -> tuple[Rows, ...]:
        """The rows of positions of new tokens; none where everything is held."""
        return ()

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        """All rows that grow, and how many more each head needs for so many tokens."""
        return [(rows, steps) for rows in (*self.growing, *self.placed)]

    def most_rows(self, steps: int) -> tuple[int, int]:
        """How many rows a head of `growing` will have at most while so many tokens come, for keys and for values."""
        until = self.steps_until_settled
        more = steps if until is None else until
        keys, values = (rows.longest + more for rows in self.growing)
        return keys, values

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of what does not grow."""
        return self.nbytes - sum(tensor_bytes(rows.tensors()) for rows, _ in self.room_for(0))

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        """Attention over everything held, with `growing` at the places keys and values, for so many steps."""
        return self.attended_in_parts(keys, values, steps, pin)

    @abstractmethod
    def advance(self, positions: Tensor) -> None:
        """Take up tokens at positions int [q] whose keys and values a step has written behind those of every head."""


def here(rows: Rows, _: int) -> Ragged:
    """Rows where they lie now."""
    return rows.ragged()
