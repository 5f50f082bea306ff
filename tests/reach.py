"""The smallest budgets of methods that cannot save more than a part of every entry."""

from __future__ import annotations

# ThinK prunes keys alone, KCache moves values alone: the other half, positions and exact layers stay.
LEAST = {"think": 0.7, "kcache": 0.7}


def within_reach(key: str, budget: float) -> float:
    """`budget`, or the smallest that this method can meet on the tiny models if that is larger."""
    return max(budget, LEAST.get(key, 0.0))
