"""How long an iteration takes on one machine, from the terms of an estimate: products for all tokens of it together,
attention for each sequence by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from workbench.attention.base import visible_entries
from workbench.cost.estimate import Cost
from workbench.cost.kernels import kernel


class Times(Protocol):
    """What a simulation asks of a machine. Tokens of a part: how many are read, and how many stand before them."""

    @property
    def room(self) -> float:
        """Bytes for caches."""

    @property
    def layers(self) -> int:
        """Of the model, for what is copied layer by layer."""

    def iteration(self, decoding: int, held: int, reading: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds in which `decoding` sequences, which hold so many tokens, make one each, and parts are read."""

    def nbytes(self, tokens: int) -> float:
        """Bytes of the cache of so many tokens."""

    def transfer(self, nbytes: float, pieces: int = 1) -> float:
        """Seconds to bring so many bytes to host memory, or back, in so many pieces."""


@dataclass(frozen=True)
class Fixed:
    """A machine with given times: a request's service takes `reading` seconds and `step` a token more."""

    reading: float = 0.0
    step: float = 1.0
    room: float = float("inf")
    layers: int = 1

    def iteration(self, decoding: int, held: int, reading: Sequence[tuple[int, int]] = ()) -> float:
        return self.reading * len(reading) + (self.step if decoding else 0.0)

    def nbytes(self, tokens: int) -> float:
        return float(tokens)

    def transfer(self, nbytes: float, pieces: int = 1) -> float:
        return 0.0


PIECE_LATENCY = 10e-6  # seconds that starting a copy takes; not measured


@dataclass(frozen=True)
class Modelled:
    """A machine as an estimate (`wb.cost`) sees it; caches hold as many bytes a token as at its context.

    share: how much of the machine's bandwidth and arithmetic is there, for a part of it or one whose power is capped.
    """

    cost: Cost
    share: float = 1.0

    @cached_property
    def room(self) -> float:
        """Bytes for caches: what weights and the activations of reading leave."""
        memory = self.cost.memory
        return self.cost.capacity - memory.weights - memory.activations / self.cost.batch

    @property
    def layers(self) -> int:
        return self.cost.architecture.facts.layers

    def iteration(self, decoding: int, held: int, reading: Sequence[tuple[int, int]] = ()) -> float:
        tokens = decoding + sum(count for count, _ in reading)
        if not tokens:
            return 0.0
        time = self._products(tokens, decoding + len(reading))
        if decoding:
            time += self._attention_latency + self.nbytes(held) / self._attention_rate
        for count, before in reading:
            pairs = visible_entries(before + count) - visible_entries(before)
            time += pairs * self._pair
        return time / self.share

    def _products(self, tokens: int, sequences: int) -> float:
        """Of all matrices, as `decode_terms` has them."""
        time = 0.0
        for count, nbytes, share, flops, latency, moving, computing, head in self._matrices:
            read = nbytes if share == 1 else nbytes * (1 - (1 - share) ** tokens)
            time += count * (latency + max(read / moving, flops * (sequences if head else tokens) / computing))
        return time

    @cached_property
    def _matrices(self) -> tuple[tuple[int, float, float, float, float, float, float, bool], ...]:
        """Matrices that are alike: how many, bytes, share, operations of a token, a launch's seconds, bytes and
        operations a second, and whether it is the output head.
        """
        machine, held = self.cost.machine, self.cost.weights.matrices
        alike = Counter(
            (round(each.nbytes), each.matrix.share, each.matrix.flops, each.kernel, each is held[-1]) for each in held
        )
        return tuple(
            (
                count, nbytes, share, flops, kernel(name).latency_us * 1e-6, kernel(name).bandwidth * machine.bandwidth,
                kernel(name).compute * machine.compute, head,
            )
            for (nbytes, share, flops, name, head), count in alike.items()
        )  # fmt: skip

    @cached_property
    def _attention_latency(self) -> float:
        return sum(kernel(layer.kernel).latency_us * 1e-6 for layer in self.cost.cache.layers)

    @cached_property
    def _attention_rate(self) -> float:
        """Bytes of caches a second, over all layers."""
        layers = self.cost.cache.layers
        total = sum(layer.nbytes for layer in layers) or 1.0
        weighed = sum(layer.nbytes / kernel(layer.kernel).bandwidth for layer in layers) or 1.0
        return self.cost.machine.bandwidth * total / weighed

    @cached_property
    def _pair(self) -> float:
        """Seconds of a pair of query and key, over all heads and layers."""
        shape = self.cost.architecture
        widths = shape.facts.heads * (shape.query_width + shape.value_width)
        layers = sum(layer.attends for layer in shape.layers)
        return 2 * widths * layers / (kernel("attention").compute * self.cost.machine.compute)

    def nbytes(self, tokens: int) -> float:
        return tokens * self._each

    @cached_property
    def _each(self) -> float:
        return self.cost.sequence_nbytes / self.cost.context

    def transfer(self, nbytes: float, pieces: int = 1) -> float:
        link = self.cost.machine.hardware.host_link
        return 0.0 if link is None else pieces * PIECE_LATENCY + nbytes / link.plain
