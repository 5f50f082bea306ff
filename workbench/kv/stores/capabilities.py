"""What some stores can do besides holding and attending: let entries go, and take part in a captured decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from workbench.kv.stores.rows import Rows
from workbench_kernels import Scoring
from workbench_kernels.rows import Ragged


class Droppable(Protocol):
    """A store from which single entries can leave."""

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""

    @property
    def shortest(self) -> int:
        """Entries of the head that has fewest."""

    def slots(self) -> tuple[Tensor, Tensor | None]:
        """The position in each slot, int [k or 1, m], and which slots are real, bool [k, m]; None: all."""

    def evict(self, slots: Tensor) -> None:
        """Drop the entries in slots [k, e] of each head."""

    @property
    def placed(self) -> tuple[Rows, ...]:
        """The rows of positions, beside which there is nothing but keys, values and states."""


class Evictable(Droppable, Protocol):
    """One whose entries leave by an eviction state that it keeps beside them."""

    @property
    def eviction_state(self) -> Tensor:
        """The state of the entry in each slot, float32 [k, m], or [k, m, w] where it is w > 1 numbers."""

    def replace_state(self, state: Tensor) -> None:
        """Replace the eviction state, laid out as `eviction_state` shows it."""


class Rescored(Protocol):
    """One that scores its entries anew when room is needed, and lets the lowest leave."""

    def schedule(self, steps: int) -> Iterator[tuple[int, int]] | None:
        """For each of so many tokens the row that it comes to in every head, and how many rows there are then; None
        where it takes scores to tell, or heads differ.
        """

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""

    @property
    def shortest(self) -> int:
        """Entries of the head that has fewest."""

    def make_room(self, room: int) -> None:
        """Let entries leave so that each head has room for so many more; below zero: so many could still come."""


class Rewritable(Protocol):
    """A store whose entries can be changed, as a merge changes them."""

    def rewrite(self, keys: Tensor, values: Tensor) -> None:
        """Replace keys [k, m, d] and values [k, m, dv], laid out as `contents` shows them."""


StateAttention = Callable[[Tensor, Scoring, bool], tuple[Tensor, Tensor | None]]
"""From a query [h, 1, d], and whether that is wanted too, to its attention and its log-sum-exp float32 [h, 1]."""


class Replaceable(Evictable, Protocol):
    """An evictable store with rows for each entry, so that a captured step can put a new entry in the place of one."""

    @property
    def growing(self) -> tuple[Rows, Rows]:
        """The rows of keys and values."""

    @property
    def beside(self) -> tuple[Rows, Rows]:
        """Those of positions int32 and of eviction states float32."""

    def captured_state(self, keys: Ragged, values: Ragged, pin: Pin, gone: Tensor | None) -> StateAttention:
        """Attention over everything held, with `growing` at the places keys and values. gone: positions that leave, one
        in each step, int64 [steps, k] in host memory, where that is known. Raises NotApplicable where it has to be.
        """

    def advance(self, positions: Tensor) -> None:
        """Take up tokens at positions int [q] whose keys and values a step has written behind those of every head."""


Place = Callable[[Rows, int], Ragged]
"""From rows, and the most that any head of them will have, to where kernels find them."""

AHEAD = 32  # steps that are begun before it is known whether they count, at most


class Pin(Protocol):
    """What a captured step gives its stores: places that stay, for all steps to come.

    position: int64 [1], where the token stands that a step reads, on the device; it advances there. A step may be tried
    before it counts, and up to `AHEAD` may be taken back: what an attention writes beside the rows has to allow that.
    """

    position: Tensor

    def __call__(self, rows: Rows, longest: int) -> Ragged:
        """Where kernels find rows, of which no head will have more than `longest`."""


CapturedAttention = Callable[[Tensor, Scoring], Tensor]
"""From a query [h, 1, d] to its attention [h, 1, dv] over everything held."""


Part = Callable[[Tensor, Scoring], tuple[Tensor, Tensor]]
"""From a query [h, 1, d] to its state over some entries: the output [h, 1, dv] and the log-sum-exp float32 [h, 1]."""


class Capturable(Protocol):
    """A store into which a captured decode step can write: of a new token a row for each head, and nothing else.

    The step writes keys and values on the device; the store follows with `advance` when steps are over.
    """

    @property
    def growing(self) -> tuple[Rows, Rows]:
        """The rows that a new token's key and value join."""

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        """All rows that grow, and how many more each head needs for so many tokens."""

    def most_rows(self, steps: int) -> tuple[int, int]:
        """How many rows a head of `growing` will have at most while so many tokens come, for keys and for values."""

    @property
    def fixed_nbytes(self) -> int:
        """Bytes of what does not grow."""

    @property
    def period(self) -> int | None:
        """How many tokens are compressed together; None where none ever is."""

    @property
    def steps_until_settled(self) -> int | None:
        """How many tokens may come before entries have to be compressed, at least one; None: any number."""

    def settle(self) -> None:
        """Quantise or prune what has waited for long enough, in place."""

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        """Attention over everything held, with `growing` at the places keys and values, for so many steps."""

    def advance(self, positions: Tensor) -> None:
        """Take up tokens at positions int [q] whose keys and values a step has written behind those of every head."""


class Scheduled(Capturable, Protocol):
    """One of which it is known beforehand to which row a token comes, so that a step writes there."""

    @property
    def longest(self) -> int:
        """Entries of each head."""

    @property
    def placed(self) -> tuple[Rows, ...]:
        """The rows of positions."""

    def follow(self, last: int, more: int) -> None:
        """Know of tokens up to position `last`, whose rows, `more` than there were, are all written."""
