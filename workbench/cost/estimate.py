"""What running a model would cost: bytes, times, and how many sequences fit, each with its formula."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from workbench.cost.architecture import Architecture
from workbench.cost.cache import Cache
from workbench.cost.memory import Memory
from workbench.cost.times import Machine, Term, seconds
from workbench.cost.weights import Weights
from workbench.display import Shown
from workbench.formatting import mib
from workbench.recipe import Recipe


@dataclass(frozen=True)
class Beside:
    """A measured decode step of the same model, recipe, device and length, and how far the estimate is from it."""

    us: float
    error: float
    source: str


@dataclass(frozen=True, repr=False)
class Cost(Shown):
    """An estimate. Bytes are those that the methods, caches and shapes foretell; times are a model's, and say so.

    memory: bytes of all devices together. prefill_s: from the first token of all prompts to their first answers'.
    decode_s: a step, which makes a token of each sequence. concurrency: how many sequences of this length fit, one of
    them being read. switch_s: to bring one sequence's cache out to host memory and another's in; None without a link.
    measured: where the same step was timed.
    """

    architecture: Architecture
    recipe: Recipe
    machine: Machine
    context: int
    batch: int
    chunk: int
    usable: float
    memory: Memory
    sequence_nbytes: int
    prefill: tuple[Term, ...]
    decode: tuple[Term, ...]
    weights: Weights
    cache: Cache
    notes: tuple[str, ...] = ()
    measured: Beside | None = None

    @property
    def prefill_s(self) -> float:
        """Seconds until all prompts are read."""
        return seconds(self.prefill)

    @property
    def decode_s(self) -> float:
        """Seconds of one step."""
        return seconds(self.decode)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all sequences together, at this length."""
        return self.batch / self.decode_s

    @property
    def capacity(self) -> int:
        """Bytes of all devices that may be used."""
        return int(self.usable * self.machine.hardware.memory.plain * self.machine.devices)

    @property
    def fits(self) -> bool:
        """Whether the batch fits at its peak."""
        return self.memory.peak <= self.capacity

    @property
    def concurrency(self) -> int:
        """Sequences of this length that fit together, one of them being read; 0: not even one."""
        memory = self.memory
        reading = (memory.reading_kv + memory.activations - memory.kv) / self.batch
        room = self.capacity - memory.weights - max(reading, memory.step_activations / self.batch)
        return max(int(room // self.sequence_nbytes), 0) if self.sequence_nbytes else 0

    @property
    def switch_s(self) -> float | None:
        """Seconds of a context switch: one sequence's cache out, another's in, over the link to host memory."""
        link = self.machine.hardware.host_link
        return None if link is None else 2 * self.sequence_nbytes / (link.plain * self.machine.devices)

    def explain(self) -> str:
        """Every figure with the formula that it comes from."""
        return "\n".join([*_bytes(self), "", *_times(self)])

    def summary(self) -> str:
        """The figures in a few lines."""
        memory = self.memory
        switch = "" if self.switch_s is None else f", a switch between two {_time(self.switch_s)}"
        lines = [
            self.title,
            f"  weights  {mib(memory.weights)} of {mib(memory.full_weights)}",
            f"  KV       {mib(memory.kv)} of {mib(memory.full_kv)}",
            *([f"  states   {mib(memory.states)}"] if memory.states else []),
            f"  peak     {mib(memory.peak)} of {mib(self.capacity)}{'' if self.fits else ': does not fit'}",
            f"  prefill  {_time(self.prefill_s)}",
            f"  decode   {_time(self.decode_s)} a step, {self.tokens_per_s:,.1f} tokens/s",
            f"  fits     {self.concurrency:,} sequences{switch}",
            *([self._beside(self.measured)] if self.measured else []),
            *(f"  note     {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    @property
    def title(self) -> str:
        """What was estimated, in one line."""
        devices = f"{self.machine.devices} x " if self.machine.devices > 1 else ""
        return (
            f"Cost of {self.architecture.name} under {self.recipe.label} on {devices}{self.machine.hardware.name}: "
            f"{self.batch} x {self.context:,} tokens (a model, not a measurement)"
        )

    def _beside(self, measured: Beside) -> str:
        return (
            f"  measured {measured.us / 1e3:.3f} ms a step ({measured.source}): the model is {measured.error:+.1%} off"
        )

    def numbers(self) -> dict[str, Any]:
        """The same for programs, JSON-able."""
        return {
            "model": self.architecture.name,
            "recipe": self.recipe.to_dict(),
            "hardware": self.machine.hardware.name,
            "devices": self.machine.devices,
            "dtype": self.machine.dtype,
            "context": self.context,
            "batch": self.batch,
            "memory": {**asdict(self.memory), "peak": self.memory.peak, "capacity": self.capacity},
            "fits": self.fits,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
            "concurrency": self.concurrency,
            "switch_s": self.switch_s,
            "prefill": [asdict(term) for term in self.prefill],
            "decode": [asdict(term) for term in self.decode],
            "measured": None if self.measured is None else asdict(self.measured),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"<{self.title}>"


def _bytes(cost: Cost) -> list[str]:
    memory, facts = cost.memory, cost.architecture.facts
    kinds: dict[str, list[int]] = {}
    for layer in cost.architecture.layers:
        size = ""
        if layer.kv_heads:
            size = f": {layer.entry:,} numbers x {layer.held(cost.context):,} tokens"
        kinds.setdefault(f"{layer.kind(facts.heads)}{size}", []).append(layer.layer)
    usable = f"{cost.usable:.0%} of {cost.machine.devices} x {cost.machine.hardware.memory}"
    reading = f"weights + KV while reading ({memory.reading_kv:,}) + states + activations"
    room = f"{cost.capacity:,} ({usable}) - weights - what reading one takes more than holding it"
    return [
        cost.title,
        f"weights {memory.weights:,} bytes: all parameters ({memory.full_weights:,}), less what the recipe saves",
        f"KV {memory.kv:,} bytes: {cost.batch} x what the recipe holds; uncompressed {memory.full_kv:,}:",
        *(f"  {len(layers)} layers, {kind}" for kind, layers in kinds.items()),
        f"states {memory.states:,} bytes: {cost.batch} x what layers keep beside keys and values",
        f"activations {memory.activations:,} bytes, reading {cost.chunk:,} at once; {memory.step_activations:,} a step",
        f"peak {memory.peak:,} bytes = max({reading}, weights + KV + states + activations of a step)",
        f"concurrency {cost.concurrency:,} = ({room}) / {cost.sequence_nbytes:,} bytes a sequence",
    ]


def _times(cost: Cost) -> list[str]:
    lines = []
    for name, terms in (("prefill", cost.prefill), ("decode step", cost.decode)):
        lines.append(f"{name} {_time(seconds(terms))} = the sum of")
        for term in terms:
            mark = "measured kernel" if term.measured else "estimated from another kernel or device"
            each = term.seconds / max(term.count, 1)
            lines.append(f"  {term.count:>6} x {each * 1e6:>12,.1f} us  {term.what}: {term.formula} ({mark})")
    if cost.switch_s is not None:
        link = cost.machine.hardware.host_link
        lines.append(f"context switch {_time(cost.switch_s)} = 2 x {cost.sequence_nbytes:,} bytes / {link}")
    if cost.measured is not None:
        lines.append(cost._beside(cost.measured).strip())  # noqa: SLF001  one module
    return [*lines, *(f"note: {note}" for note in cost.notes)]


def _time(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.3f} ms"
