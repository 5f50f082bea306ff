"""What is asked of a server: requests with their arrivals and lengths, drawn by a seed or given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from workbench import arguments
from workbench.errors import BadParameter


class Request(BaseModel):
    """One request. arrival: in seconds; prompt, output: in tokens; images: that are encoded before it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    arrival: float
    prompt: int
    output: int
    images: int = 0


class Lengths(BaseModel):
    """Numbers of tokens with this mean. spread: standard deviation over mean, of a log-normal law; 0: all alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    spread: float = 0.0

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """So many numbers, each at least one."""
        if not self.spread:
            return [max(round(self.mean), 1)] * count
        variance = math.log1p(self.spread**2)
        drawn = generator.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return [max(round(float(value)), 1) for value in drawn]


class Workload(BaseModel):
    """Requests in the order of their arrivals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: tuple[Request, ...]

    @classmethod
    def poisson(
        cls, rate: float, count: int, prompt: Lengths | int, output: Lengths | int, *, seed: int = 0, images: int = 0
    ) -> Self:
        """`count` requests that arrive by chance, `rate` a second on average."""
        arguments.number("rate", rate, 0, above=True)
        arguments.whole("count", count, 1)
        generator = np.random.default_rng(arguments.whole("seed", seed, 0))
        arrivals = generator.exponential(1 / rate, count).cumsum()
        prompts, outputs = (
            (lengths if isinstance(lengths, Lengths) else Lengths(mean=lengths)).draw(generator, count)
            for lengths in (prompt, output)
        )
        rows = zip(arrivals, prompts, outputs, strict=True)
        return cls(
            requests=tuple(
                Request(number=number, arrival=float(at), prompt=read, output=made, images=images)
                for number, (at, read, made) in enumerate(rows)
            )
        )

    @classmethod
    def of(cls, rows: Iterable[tuple[float, int, int]]) -> Self:
        """Of (arrival, prompt, output), for instance a trace that was recorded. Raises BadParameter."""
        made = []
        for number, (arrival, prompt, output) in enumerate(sorted(rows)):
            made.append(
                Request(
                    number=number,
                    arrival=arguments.number("arrival", arrival, 0),
                    prompt=arguments.whole("prompt", prompt, 1),
                    output=arguments.whole("output", output, 1),
                )
            )
        if not made:
            raise BadParameter("a workload needs a request: there is none")
        return cls(requests=tuple(made))

    @property
    def tokens(self) -> int:
        """That are to be made."""
        return sum(request.output for request in self.requests)
