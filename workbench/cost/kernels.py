"""Times of single kernels as they were measured: a latency, and the share of the device's bandwidth that they reach."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict


class Kernel(BaseModel):
    """A kernel's time: latency_us + bytes / (bandwidth share x peak), or operations / (compute share x peak) if longer.

    Of a least-squares fit to `rows` measurements, none of which it misses by more than `worst`. on: the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    on: str
    latency_us: float
    bandwidth: float
    compute: float
    rows: int
    worst: float
    source: str

    def seconds(self, nbytes: float, operations: float, bandwidth: float, compute: float) -> float:
        """Of one launch that moves so many bytes and does so many operations on a device of these peaks."""
        moving, computing = nbytes / (self.bandwidth * bandwidth), operations / (self.compute * compute)
        return self.latency_us * 1e-6 + max(moving, computing)


class Step(BaseModel):
    """A whole decode step as it was measured: `us` for one token of one sequence, `tokens` in the cache.

    model: the sizes of its config; recipe: its methods as JSON, as `Recipe.to_dict` has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    on: str
    what: str
    tokens: int
    us: float
    model: dict[str, int]
    recipe: tuple[dict[str, Any], ...]
    source: str


class Fit(NamedTuple):
    """latency in us, bytes a us, and the largest relative error."""

    latency: float
    rate: float
    worst: float


def fit(nbytes: Sequence[float], us: Sequence[float]) -> Fit:
    """The line us = latency + bytes / rate through measurements, each weighed by its inverse so that all count alike.

    A latency below zero is none: the line then goes through the origin.
    """
    x, y = np.asarray(nbytes, dtype=float), np.asarray(us, dtype=float)
    lines = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (latency, slope), *_ = np.linalg.lstsq(lines, np.ones_like(y), rcond=None)
    if latency < 0:
        latency, slope = 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    worst = float(np.abs((latency + slope * x) / y - 1).max())
    return Fit(float(latency), 1 / float(slope), worst)


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return tomllib.loads((files("workbench.cost") / "data" / "kernels.toml").read_text(encoding="utf-8"))


def kernel(name: str) -> Kernel:
    """A kernel that was measured, by its name in data/kernels.toml. Raises KeyError."""
    return Kernel(**next(row for row in _data()["kernel"] if row["name"] == name))


def kernels() -> tuple[Kernel, ...]:
    """All that were measured."""
    return tuple(Kernel(**row) for row in _data()["kernel"])


def steps() -> tuple[Step, ...]:
    """Whole decode steps that were measured."""
    return tuple(Step(**row) for row in _data()["step"])
