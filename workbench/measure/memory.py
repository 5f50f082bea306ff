"""Memory: what is alive now, what was alive at the peak, and how it went over a run."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self, cast, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from workbench import arguments
from workbench.errors import BadParameter, InputError, NotApplicable
from workbench.formatting import mib

Phase = Literal["read", "plan", "question", "decode"]
HOST = "host "  # categories that begin so lie in host memory, wherever the model computes


@dataclass(frozen=True)
class Sample:
    """Live bytes at one moment of a run."""

    time: float
    """seconds since the timeline began"""
    phase: Phase
    step: int
    """what the phase counts: layers or chunks when reading, tokens when decoding"""
    categories: Mapping[str, int]
    """bytes by category, for instance {"weights": ..., "kv bf16": ..., "kv 4-bit": ..., "activations": ...}"""
    kv_layers: tuple[int, ...] = ()
    """bytes of the KV cache, layer by layer of those that have one; empty where not taken"""
    numbers: tuple[int, ...] = ()
    """what the model calls these layers; empty: as they are counted, from 0"""
    run: str = ""
    """which run this belongs to, where several were put together"""

    @property
    def total(self) -> int:
        """Bytes over all categories."""
        return sum(self.categories.values())

    @property
    def host(self) -> int:
        """Bytes of the categories in host memory: what stores keep there, never the device's own."""
        return sum(nbytes for name, nbytes in self.categories.items() if name.startswith(HOST))

    @property
    def device(self) -> int:
        """Bytes of all other categories."""
        return self.total - self.host


class Timeline:
    """An append-only record of live bytes by category."""

    def __init__(self, run: str = "") -> None:
        """run: a name that all samples carry; the clock starts now."""
        self.run = run
        self._began = time.perf_counter()
        self._samples: list[Sample] = []

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(self._samples)

    def __repr__(self) -> str:
        peaks = ", ".join(f"{kind} {mib(nbytes)}" for kind, nbytes in self.peaks.items())
        return f"<Timeline of {len(self)} samples; at most {peaks or 'nothing'}>"

    def __len__(self) -> int:
        return len(self._samples)

    def add(
        self,
        phase: Phase,
        step: int,
        categories: Mapping[str, int],
        kv_layers: Sequence[int] = (),
        *,
        numbers: Sequence[int] = (),
        time_s: float | None = None,
    ) -> Sample:
        """Append what is alive now; time_s: seconds since the timeline began, by default taken from the clock. numbers:
        those of the layers of `kv_layers` in the model, where it has others too.
        """
        arguments.choice("phase", phase, get_args(Phase))
        arguments.whole("step", step, low=0)
        if any(nbytes < 0 for nbytes in (*categories.values(), *kv_layers)):
            raise BadParameter(f"bytes must not be negative (phase {phase!r}, step {step})")
        at = time.perf_counter() - self._began if time_s is None else arguments.number("time_s", time_s, low=0)
        if self._samples and at < self._samples[-1].time:
            raise BadParameter(
                f"a timeline goes forward: {at} s comes before the last sample's {self._samples[-1].time} s"
            )
        sample = Sample(
            at,
            phase,
            step,
            {k: int(v) for k, v in categories.items()},
            tuple(map(int, kv_layers)),
            tuple(map(int, numbers)),
            self.run,
        )
        self._samples.append(sample)
        return sample

    @property
    def categories(self) -> tuple[str, ...]:
        """All categories, in the order in which they first appeared."""
        return tuple(dict.fromkeys(name for sample in self._samples for name in sample.categories))

    @property
    def peak(self) -> int:
        """The largest total, in bytes; 0 for an empty timeline."""
        return max((sample.total for sample in self._samples), default=0)

    @property
    def device_peak(self) -> int:
        """The largest number of bytes on the device; 0 for an empty timeline."""
        return max((sample.device for sample in self._samples), default=0)

    @property
    def host_peak(self) -> int:
        """The largest number of bytes in host memory; 0 for an empty timeline."""
        return max((sample.host for sample in self._samples), default=0)

    @property
    def peaks(self) -> dict[str, int]:
        """The largest value of each category, in bytes; they need not fall on the same moment."""
        return {name: max(s.categories.get(name, 0) for s in self._samples) for name in self.categories}

    def to_frame(self) -> pd.DataFrame:
        """One row a sample: run, time (s), phase, step, then one column of bytes a category (0 where a sample lacks
        it).
        """
        names = self.categories
        rows = [(s.run, s.time, s.phase, s.step, *(s.categories.get(name, 0) for name in names)) for s in self._samples]
        return pd.DataFrame(rows, columns=["run", "time", "phase", "step", *names])

    def by_layer(self) -> pd.DataFrame:
        """One row a sample and layer: run, time (s), phase, step, layer, bytes of its KV cache."""
        rows = [
            (s.run, s.time, s.phase, s.step, layer, nbytes)
            for s in self._samples
            for layer, nbytes in zip(s.numbers or range(len(s.kv_layers)), s.kv_layers, strict=True)
        ]
        return pd.DataFrame(rows, columns=["run", "time", "phase", "step", "layer", "bytes"])

    def to_trace_events(self) -> dict[str, Any]:
        """JSON-able, as Perfetto and Chrome's tracing read it: counters of bytes by category and by layer of the cache,
        and an instant for each phase of each run.
        """
        events: list[dict[str, Any]] = []
        begun: tuple[str, str] | None = None
        for sample in self._samples:
            at: dict[str, Any] = {"pid": 1, "tid": 1, "ts": round(sample.time * 1e6)}
            if (sample.run, sample.phase) != begun:
                begun = (sample.run, sample.phase)
                events.append({**at, "name": f"{sample.run} {sample.phase}".strip(), "ph": "i", "s": "g"})
            events.append({**at, "name": "live bytes", "ph": "C", "args": dict(sample.categories)})
            if sample.kv_layers:
                names = sample.numbers or range(len(sample.kv_layers))
                layers = {f"layer {name}": nbytes for name, nbytes in zip(names, sample.kv_layers, strict=True)}
                events.append({**at, "name": "KV cache by layer", "ph": "C", "args": layers})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` reads it back."""
        return {
            "run": self.run,
            "samples": [
                {
                    "time": s.time,
                    "phase": s.phase,
                    "step": s.step,
                    "categories": dict(s.categories),
                    "kv_layers": list(s.kv_layers),
                    "numbers": list(s.numbers),
                    "run": s.run,
                }
                for s in self._samples
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timeline:
        """The timeline that `to_dict` wrote."""
        try:
            timeline = cls(str(data["run"]))
            timeline._samples = [
                Sample(
                    time=float(s["time"]),
                    phase=s["phase"],
                    step=int(s["step"]),
                    categories={str(k): int(v) for k, v in s["categories"].items()},
                    kv_layers=tuple(map(int, s["kv_layers"])),
                    numbers=tuple(map(int, s.get("numbers", ()))),
                    run=str(s["run"]),
                )
                for s in data["samples"]
            ]
        except (KeyError, TypeError, ValueError) as cause:
            raise InputError(f"this is not a saved timeline: {cause!r}") from cause
        timeline._resume()
        return timeline

    @classmethod
    def concat(cls, timelines: Iterable[Timeline], run: str = "") -> Timeline:
        """Several timelines one after another, each beginning when the one before it ended; samples keep the names of
        their runs.
        """
        joined = cls(run)
        for timeline in timelines:
            offset = joined._samples[-1].time if joined._samples else 0.0
            joined._samples.extend(
                Sample(offset + s.time, s.phase, s.step, s.categories, s.kv_layers, s.numbers, s.run)
                for s in timeline._samples  # noqa: SLF001  # another of this class
            )
        joined._resume()
        return joined

    def without(self, phase: Phase) -> Timeline:
        """The same timeline without the samples of one phase."""
        arguments.choice("phase", phase, get_args(Phase))
        left = Timeline(self.run)
        left._samples = [sample for sample in self._samples if sample.phase != phase]
        left._resume()
        return left

    def _resume(self) -> None:
        """Let the clock go on from the last sample."""
        self._began = time.perf_counter() - (self._samples[-1].time if self._samples else 0.0)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages behind these tensors.

    A storage counts once and whole, however many views share it and however little of it they show: that is what stays
    allocated. Subclasses that wrap several tensors (packed weights) count for what they hold. Meta tensors hold
    nothing.
    """
    distinct = {_identity(s): s for tensor in tensors for s in _storages(tensor)}
    return sum(s.nbytes() for s in distinct.values())


def _identity(storage: torch.UntypedStorage) -> int:
    """What tells one storage from another while both live."""
    identity: int = storage._cdata  # noqa: SLF001  # torch has no public name for it
    return identity


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created inside the block for as long as they live.

        with LiveBytes() as live:
            model(ids)
        live.peak, live.current

    Exact for every storage that an operation hands out: counted once when it appears, taken off when it is freed (also
    after the block). What existed before is not counted, nor what one operation allocates and frees within itself.
    Bytes are those asked for; allocators round up. Only the thread that entered the block is watched. Costs about 10
    microseconds an operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._sizes: dict[int, int] = {}
        # Storages may die in any thread and in the middle of anything, so what watches them only leaves a note here.
        self._freed: deque[_Watch] = deque()
        self._watches: set[_Watch] = set()
        self._current = 0
        self._peak = 0

    @property
    def current(self) -> int:
        """Bytes alive now."""
        self._settle()
        return self._current

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once since the block began or `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """Forget the peak; it starts again from what is alive now."""
        self._peak = self.current

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would wrap what follows so that it is never compiled, which takes longer than all it does."""
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        gives = _gives(func)
        if gives == "view":  # half of all operations, and none of them allocates
            return result
        if self._freed:
            self._settle()
        inputs: set[int] | None = None
        for storage in _storages_in(result):
            key, nbytes = _identity(storage), storage.nbytes()
            if key in self._sizes:  # known: it may have been resized
                self._current += nbytes - self._sizes[key]
                self._sizes[key] = nbytes
                continue
            if gives == "input":  # older than the block
                continue
            if gives == "any":
                if inputs is None:
                    inputs = {_identity(given) for given in _storages_in((args, kwargs))}
                if key in inputs:
                    continue
            self._sizes[key] = nbytes
            self._current += nbytes
            self._watches.add(_Watch(storage, self._freed, key))
        self._peak = max(self._peak, self._current)
        return result

    def _settle(self) -> None:
        while self._freed:
            watch = self._freed.popleft()
            self._watches.discard(watch)
            self._current -= self._sizes.pop(watch.key)


class _Watch(weakref.ref):  # type: ignore[type-arg]
    """Notes when a storage is freed: the watch itself, which knows the storage's key."""

    __slots__ = ("key",)
    key: int

    def __new__(cls, storage: torch.UntypedStorage, freed: deque[_Watch], key: int) -> Self:  # noqa: ARG004  # __init__'s
        return super().__new__(cls, storage, freed.append)

    def __init__(self, storage: torch.UntypedStorage, freed: deque[_Watch], key: int) -> None:
        self.key = key

    __hash__ = object.__hash__  # that of a storage is gone with it


_Gives = Literal["view", "input", "new", "any"]


@cache  # asked of every operation that runs
def _gives(func: Callable[..., object]) -> _Gives:
    """What an operation returns: views of inputs, inputs that it wrote to, tensors of its own, or any of these."""
    # `torch.tensor([...])` makes its storage unseen and shows it first as this operation's input.
    if func is torch.ops.aten.lift_fresh.default:
        return "new"
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":  # noqa: SLF001  # no public name
        return "any"
    if func.is_view:
        return "view"
    shared = [output.alias_info for output in func._schema.returns]  # noqa: SLF001  # no public name
    if shared and all(alias is not None and alias.is_write for alias in shared):
        return "input"
    # What is made of other operations may return an input without saying so (`dropout`, `einsum`).
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001  # no public name
    composite = has_kernel(func.name(), "CompositeImplicitAutograd")
    return "any" if composite or any(alias is not None for alias in shared) else "new"


class CudaBytes:
    """The same readings as `LiveBytes`, from the CUDA allocator's own statistics.

    Counts what the allocator handed out to the whole process, other threads too, above what was there when the block
    began. The allocator keeps one peak a device, so blocks must not be nested or overlap on one device.
    """

    def __init__(self, device: torch.device) -> None:
        """device: a CUDA device. Raises NotApplicable for any other."""
        if device.type != "cuda":
            raise NotApplicable(f"{device} is not a CUDA device: measure with LiveBytes instead")
        self._device = device
        self._before = 0
        self._peak: int | None = None

    def __enter__(self) -> Self:
        # The allocator counts when memory is handed out, not when kernels run: no synchronisation is needed.
        self._before = torch.cuda.memory_allocated(self._device)
        self.reset_peak()
        return self

    def __exit__(self, *error: object) -> None:
        self._peak = self.peak

    @property
    def current(self) -> int:
        """Bytes alive now, above those before the block."""
        return torch.cuda.memory_allocated(self._device) - self._before

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once in the block since it began or `reset_peak`."""
        if self._peak is not None:
            return self._peak
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def reset_peak(self) -> None:
        """Forget the peak; it starts again from what is alive now."""
        torch.cuda.reset_peak_memory_stats(self._device)


def live_bytes(device: torch.device) -> LiveBytes | CudaBytes:
    """What watches the live bytes of a block of work on `device`."""
    return CudaBytes(device) if device.type == "cuda" else LiveBytes()


# Asking whether a tensor is a wrapper is slow, and these never are.
_PLAIN = (Tensor, torch.nn.Parameter)


def _storages_in(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in a nest of tuples, lists and dicts."""
    # By hand: torch's own tree functions take longer than many of the operations that are watched here.
    if isinstance(tree, Tensor):
        if type(tree) in _PLAIN and tree.layout is torch.strided and not tree.is_meta:
            yield tree.untyped_storage()
        else:
            yield from _storages(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _storages_in(item)
    elif isinstance(tree, dict):
        yield from _storages_in(tuple(tree.values()))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages that really hold a tensor's data."""
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _storages(cast("Tensor", getattr(tensor, name)))
    elif tensor.layout is torch.strided:
        if tensor.device.type != "meta":
            yield tensor.untyped_storage()
    else:  # sparse tensors keep their indices and values in tensors of their own
        yield from (s for part in _sparse_parts(tensor) for s in _storages(part))


def _sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()  # noqa: SLF001  # the public names want it coalesced
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    raise NotApplicable(f"bytes of {tensor.layout} tensors cannot be counted")
