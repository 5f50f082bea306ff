"""Requests on their way through a server, and what one iteration does for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from workbench.cost.serving.step_times import Times
from workbench.cost.serving.workload import Request


@dataclass
class Job:
    """A request that has arrived. read: tokens in the cache that came from the prompt (or are read again); made: tokens
    answered; layers: the share of the model's layers that the prompt has gone through, of who reads by layers.

    on_device: whether its cache lies there; copied: tokens of it of which host memory has a copy.
    """

    request: Request
    arrived: float
    read: int = 0
    made: int = 0
    layers: float = 0.0
    on_device: bool = False
    copied: int = 0
    encoded: bool = False
    restarts: int = 0
    first: float | None = None
    last: float | None = None
    done: float | None = None
    started: float | None = None

    @property
    def to_read(self) -> int:
        """Tokens that must be in the cache before the next one can be made: after a restart, answers too."""
        return self.request.prompt + max(self.made - 1, 0)

    @property
    def ready(self) -> bool:
        """Whether the next iteration can make a token."""
        return self.made > 0 and self.read >= self.to_read

    @property
    def held(self) -> int:
        """Tokens in its cache."""
        return self.read

    @property
    def left(self) -> int:
        """Tokens still to be made."""
        return self.request.output - self.made


@dataclass
class Plan:
    """What the next iteration does: jobs that make a token, parts of prompts that are read (job, tokens), and more.

    layered: (job, share of the layers) of prompts that go through some layers only. stall: seconds before it begins,
    for instance of swaps; extra: seconds on top.
    """

    decode: list[Job] = field(default_factory=list)
    read: list[tuple[Job, int]] = field(default_factory=list)
    layered: list[tuple[Job, float]] = field(default_factory=list)
    stall: float = 0.0
    extra: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.decode or self.read or self.layered)


class Serving(Protocol):
    """What a policy sees of a server: how long things take there, and the jobs that are with it."""

    times: Times
    jobs: list[Job]
