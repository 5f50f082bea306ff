"""Times of reading and of a decode step: for each kind of product a kernel's latency, and bytes or operations over
what share of the device's peak that kernel was seen to reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workbench.attention.base import visible_entries
from workbench.cost.architecture import Architecture
from workbench.cost.cache import Cache, HeldLayer
from workbench.cost.hardware import Hardware
from workbench.cost.kernels import Kernel, kernel
from workbench.cost.weights import HeldMatrix, Weights
from workbench.errors import NotApplicable

LINK_LATENCY = 10e-6  # seconds that an exchange between devices takes at least; not measured


@dataclass(frozen=True)
class Term:
    """A part of a time: what takes it, how often, seconds of all together, and by which formula.

    measured: whether the kernel's times are a measurement's on this device; else those of another stand for it.
    """

    what: str
    count: int
    seconds: float
    formula: str
    measured: bool = False


@dataclass(frozen=True)
class Machine:
    """Devices that share a model's matrices and heads evenly (tensor parallel), computing with `dtype`."""

    hardware: Hardware
    devices: int
    dtype: str

    @property
    def bandwidth(self) -> float:
        """Bytes a second of all devices' memory."""
        return self.hardware.bandwidth.plain * self.devices

    @property
    def compute(self) -> float:
        """Operations a second of all devices."""
        return self.hardware.peak(self.dtype).plain * self.devices

    def exchange(self, nbytes: float) -> float:
        """Seconds until sums of so many bytes, one part on each device, are on all (a ring's all-reduce)."""
        if self.devices == 1:
            return 0.0
        link = self.hardware.device_link or self.hardware.host_link
        if link is None:
            raise NotApplicable(f"{self.hardware.name} states no link to another device: estimate one of them")
        return 2 * LINK_LATENCY + 2 * (self.devices - 1) / self.devices * nbytes / link.plain

    def term(self, what: str, count: int, name: str, nbytes: float, operations: float, *, known: bool = True) -> Term:
        """`count` launches of the kernel of this name. known: whether it was timed on what it is used for."""
        timed = kernel(name)
        seconds = count * timed.seconds(nbytes, operations, self.bandwidth, self.compute)
        return Term(what, count, seconds, _formula(timed, nbytes, operations, self), known and self._is(timed))

    def _is(self, timed: Kernel) -> bool:
        return timed.on == self.hardware.name and self.devices == 1 and self.dtype in ("bfloat16", "float16")


def _formula(timed: Kernel, nbytes: float, operations: float, machine: Machine) -> str:
    moving, computing = nbytes / (timed.bandwidth * machine.bandwidth), operations / (timed.compute * machine.compute)
    if computing > moving:
        part = f"{operations / 1e9:,.2f} GFLOP / ({timed.compute:.0%} of {machine.compute / 1e12:,.0f} TFLOP/s)"
    else:
        part = f"{nbytes / 1e6:,.2f} MB / ({timed.bandwidth:.0%} of {machine.bandwidth / 1e9:,.0f} GB/s)"
    return f"{timed.latency_us:g} us + {part}"


def decode_terms(
    architecture: Architecture, weights: Weights, cache: Cache, states: int, machine: Machine, batch: int
) -> tuple[Term, ...]:
    """A step that makes a token of each of `batch` sequences. states: bytes of one sequence's."""
    terms = list(_products(weights.matrices, machine, batch, batch))
    widths = architecture.facts.heads * (architecture.query_width + architecture.value_width)
    for layer, count in Counter(cache.layers).items():
        operations = 2.0 * batch * widths * layer.entries
        what = f"attention over {layer.entries:,} entries a head"
        terms.append(machine.term(what, count, layer.kernel, layer.nbytes * batch, operations, known=layer.measured))
    if states:
        terms.append(machine.term("states, read and written", 1, "attention", 2.0 * states * batch, 0, known=False))
    terms += _exchanges(architecture, machine, batch)
    return tuple(terms)


def prefill_terms(
    architecture: Architecture, weights: Weights, machine: Machine, batch: int, tokens: int, chunk: int
) -> tuple[Term, ...]:
    """Reading `batch` prompts of so many tokens, `chunk` of each at once; the last position's logits."""
    passes = -(-tokens // chunk)
    terms = list(
        _products(
            weights.matrices, machine, batch * min(chunk, tokens), batch, passes, tokens / passes / min(chunk, tokens)
        )
    )
    kinds = Counter(
        (layer.window, layer.chunk, layer.key_width or architecture.query_width)
        for layer in architecture.layers
        if layer.attends
    )
    for (window, alone, _), count in kinds.items():
        pairs = sum(
            visible_entries(min(alone or tokens, tokens - start), window) for start in range(0, tokens, alone or tokens)
        )
        operations = (
            2.0 * pairs * architecture.facts.heads * (architecture.query_width + architecture.value_width) * batch
        )
        span = "all before" if window is None and alone is None else f"{window or alone:,}"
        terms.append(machine.term(f"attention, a token sees {span}", count, "attention", 0.0, operations))
    terms += _exchanges(architecture, machine, batch * tokens)
    return tuple(terms)


def _products(
    matrices: Sequence[HeldMatrix], machine: Machine, tokens: int, sequences: int, passes: int = 1, filled: float = 1.0
) -> Iterator[Term]:
    """Products of `passes` passes over so many tokens, each `filled` on average; the head sees one token a sequence."""
    *inside, head = matrices
    alike = Counter(
        (each.matrix.rows, each.matrix.columns, each.matrix.experts, each.matrix.share, round(each.nbytes), each.kernel)
        for each in inside
    )
    names: dict[tuple[object, ...], str] = {}
    for each in inside:
        key = (
            each.matrix.rows,
            each.matrix.columns,
            each.matrix.experts,
            each.matrix.share,
            round(each.nbytes),
            each.kernel,
        )
        names.setdefault(key, each.matrix.name)
    for key, count in alike.items():
        rows, columns, experts, share, nbytes, name = key
        read = nbytes * (1 - (1 - share) ** tokens)
        operations = 2.0 * rows * columns * experts * share * tokens * filled
        what = f"{names[key]} and alike [{rows:,} x {columns:,}]" + (f", {experts} experts" if experts > 1 else "")
        yield machine.term(what, count * passes, name, read, operations)
    operations = 2.0 * head.matrix.rows * head.matrix.columns * sequences
    yield machine.term("output head", 1, head.kernel, head.nbytes, operations)


def _exchanges(architecture: Architecture, machine: Machine, tokens: int) -> list[Term]:
    if machine.devices == 1:
        return []
    nbytes = tokens * architecture.facts.hidden_size * architecture.dtype.itemsize
    seconds, count = machine.exchange(nbytes), 2 * architecture.facts.layers
    formula = f"2 x {LINK_LATENCY * 1e6:g} us + 2 (n - 1) / n x {nbytes / 1e6:,.2f} MB / link"
    return [Term(f"sums over {machine.devices} devices", count, count * seconds, formula)]


def seconds(terms: Sequence[Term]) -> float:
    """Of all together, one after another."""
    return sum(term.seconds for term in terms)


def kept(layers: Sequence[HeldLayer]) -> int:
    """Entries of the longest layer."""
    return max((layer.entries for layer in layers), default=0)
