"""The prompt in groups of tokens: which of them lie so far behind a query that it sees them coarsely."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from workbench.attention.base import visible_entries


def groups_behind(positions: Tensor, group: int, window: int, sinks: int = 0) -> Tensor:
    """How many whole groups of tokens lie behind the window of the query at each position.

    The groups follow each other after the first `sinks` tokens. What is in none of them a query sees exactly: the last
    `window` positions, its own included, up to group - 1 before them, and the first `sinks`.
    """
    return (positions + 1 - window - sinks).clamp_min(0) // group


class Split(NamedTuple):
    """What one head sees, over all queries of a prompt: pairs of a query and an old group, pairs of a query and a token
    seen exactly; and how many groups the last query sees.
    """

    coarse: int
    exact: int
    groups: int


def split(tokens: int, group: int, window: int, sinks: int = 0) -> Split:
    """The pairs when `tokens` are read with a window of at least 1."""
    groups, rest = divmod(max(tokens - window - sinks, 0), group)
    # From query to query one token more lies behind: 0, 1, 2 .. groups are seen by `group` queries each, and the last
    # number by rest + 1.
    coarse = group * groups * (groups - 1) // 2 + (rest + 1) * groups
    return Split(coarse, visible_entries(tokens) - group * coarse, groups)
