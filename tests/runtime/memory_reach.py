"""The budgets that methods are tried at: what they can reach, and what is worth its time."""

from __future__ import annotations

from workbench.kv.base import KVMethod
from workbench.registry import registered

# The less room these have, the smaller the pieces in which they read: at a tenth, a hundred passes for a short prompt.
READING = {cls.key for cls in registered("kv") if issubclass(cls, KVMethod) and cls().supplies("read")}
# ThinK prunes keys alone, KCache moves values alone: the other half, positions and exact layers stay. MiniCache merges
# two of the three layers.
LEAST = {"think": 0.7, "kcache": 0.7, "minicache": 0.8}


def within_reach(key: str, budget: float) -> float:
    """`budget`, or the smallest that this method can meet on the tiny models if that is larger."""
    return max(budget, LEAST.get(key, 0.0))


def budgets_of(key: str) -> tuple[float, ...]:
    """Large and small ones; not the smallest where each of them reads the prompt again."""
    return (0.75, 0.4) if key in READING else (0.75, 0.5, 0.25, 0.1)
