"""What is searched for: a limit of memory, bounds of quality, and which of two recipes serves better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench import arguments
from workbench.budget import Budget, BudgetLike
from workbench.errors import BadBudget, BadParameter
from workbench.formatting import mib, quoted

if TYPE_CHECKING:
    from workbench.results.schema import Row

Memory = Literal["total", "device", "deployed", "kv"]
"""What is counted: total: weights, cache and states, on the device and in host memory. device: those on the device.
deployed: as total, with weights that are not compressed at 16 bits. kv: the cache alone, wherever it lies."""

_BOUNDS = {"kl": "at most", "correct": "at least", "top1": "at least"}
_FAILED = (10.0, 1.0, 10.0)  # what a sampler is told of a recipe that cannot be run: worse than any that can


@dataclass(frozen=True)
class Measured:
    """A recipe over the cases it was measured on.

    memory: bytes, of the case that takes most. correct, full_correct: answers that are right under the recipe, and of
    the uncompressed model, out of `judged`. kl, top1: means over cases. error: why it cannot be run; None: it can.
    """

    cases: int
    memory: int = 0
    correct: int = 0
    full_correct: int = 0
    judged: int = 0
    kl: float = 0.0
    top1: float = 1.0
    error: str | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], memory: Memory) -> Measured:
        """From its rows of results. One that failed on a case cannot be run."""
        failed = next((row["error"] or "failed" for row in rows if row["status"] != "done"), None)
        if failed is not None or not rows:
            return cls(len(rows), error=failed or "not measured")
        judged = [row for row in rows if row.get("correct") is not None]
        return cls(
            cases=len(rows),
            memory=max(memory_of(row, memory) for row in rows),
            correct=sum(bool(row["correct"]) for row in judged),
            full_correct=sum(bool(row["full_correct"]) for row in judged),
            judged=len(judged),
            kl=sum(row["kl"] for row in rows) / len(rows),
            top1=sum(row["top1"] for row in rows) / len(rows),
        )

    @property
    def wrong_share(self) -> float:
        """The share of the answers that are not right; 0 where none are judged."""
        return 1 - self.correct / self.judged if self.judged else 0.0

    @property
    def figures(self) -> tuple[float, float, float]:
        """What a front is made of, the less the better: bytes, share of wrong answers, KL."""
        return float(self.memory), self.wrong_share, self.kl


def memory_of(row: Row, memory: Memory) -> int:
    """Bytes that a row of results counts for."""
    host = row["kv_host_nbytes"] or 0
    if memory == "kv":
        return int(row["kv_nbytes"] + host)
    if memory == "device":
        return int(row["total_nbytes"])
    return int(row["deployed_nbytes" if memory == "deployed" else "total_nbytes"] + host)


@dataclass(frozen=True)
class Goal:
    """What a search is for.

    limit: bytes of `memory` that no case may exceed; None: none. quality: bounds, of "kl" (the most), "correct" (the
    least share of the uncompressed model's right answers) and "top1" (the least). With bounds the smallest recipe
    within them is best; without, the one with most right answers, then the least KL.
    """

    limit: int | None = None
    memory: Memory = "total"
    quality: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, limit: BudgetLike | None, memory: str, quality: Mapping[str, float] | None) -> Goal:
        """Read a goal as `search` takes it. Raises BadBudget, BadParameter."""
        arguments.choice("memory", memory, get_args(Memory))
        if limit is None and not quality:
            raise BadParameter('a search needs a limit ("200 MiB"), or bounds of quality ({"kl": 0.02}), or both')
        size = None if limit is None else Budget.parse(limit)
        if size is not None and size.kind != "bytes":
            raise BadBudget(f'limit {quoted(limit)} is no size: give one as "200 MiB"')
        bounds = {} if quality is None else dict(quality)
        for name, value in bounds.items():
            if name not in _BOUNDS:
                raise BadParameter(f"quality {quoted(name)} is not one of {', '.join(_BOUNDS)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise BadParameter(f"quality {name}={quoted(value)}: give a number that is not negative")
            if _BOUNDS[name] == "at least" and value > 1:
                raise BadParameter(f"quality {name}={value:g} is a share: give 0 to 1")
        made: Any = memory
        return cls(None if size is None else int(size.amount), made, tuple(sorted(bounds.items())))

    def excess(self, measured: Measured) -> float:
        """By what share of the limit a recipe is beyond it; 0: it is within."""
        return 0.0 if self.limit is None else max(measured.memory / self.limit - 1, 0.0)

    def shortfall(self, measured: Measured) -> float:
        """How far a recipe is from the bounds of quality, in shares of each, added up; 0: it is within all."""
        missing = 0.0
        for name, bound in self.quality:
            if name == "kl":
                missing += max(measured.kl - bound, 0.0) / (bound or 1.0)
            elif name == "top1":
                missing += max(bound - measured.top1, 0.0)
            elif measured.full_correct:
                missing += max(bound - measured.correct / measured.full_correct, 0.0)
        return missing

    def serves(self, measured: Measured) -> bool:
        """Whether a recipe keeps to the limit and the bounds."""
        return measured.error is None and not self.excess(measured) and not self.shortfall(measured)

    def place(self, measured: Measured) -> tuple[float, ...]:
        """By which recipes are ordered, the first the best."""
        if measured.error is not None:
            return (2.0,)
        beyond = self.excess(measured)
        quality = (measured.wrong_share, measured.kl, float(measured.memory))
        if beyond:
            return (1.0, beyond, *quality)
        missing = self.shortfall(measured)
        if self.quality and not missing:
            return (0.0, 0.0, float(measured.memory), *quality)
        return (0.0, missing, *quality)

    def values(self, measured: Measured, full_memory: int) -> tuple[float, float, float]:
        """What a sampler minimises: memory as a share of the uncompressed model's, wrong answers, KL; none infinite."""
        if measured.error is not None:
            return _FAILED
        return measured.memory / full_memory, measured.wrong_share, min(measured.kl, _FAILED[2])

    def constraints(self, measured: Measured) -> tuple[float, float]:
        """What a sampler keeps at most 0."""
        return (1.0, 1.0) if measured.error is not None else (self.excess(measured), self.shortfall(measured))

    @property
    def words(self) -> str:
        """The goal in words."""
        parts = [] if self.limit is None else [f"{self.memory} memory of at most {mib(self.limit)}"]
        return ", ".join([*parts, *(f"{name} {_BOUNDS[name]} {bound:g}" for name, bound in self.quality)])
