"""Times, errors and limits of work on a CUDA device, and nothing that depends on which work it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

_COPIED = 4 << 30  # bytes copied to measure the memory's bandwidth: many times what the L2 cache holds
_SIDE = 8192  # rows and columns of the matrices whose product measures the arithmetic


class TimeUp(BaseException):
    """The time given to a measurement is over. Not an Exception: whoever records a failed case must let this pass."""


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches where nothing but one resource is used.

    copy: bytes read and written a second by a large copy in device memory or a kernel that reads and writes as many,
    whichever moves more; matmul: operations a second of a large bfloat16 matrix product on random data; launch_us: the
    time of a kernel that does nothing worth mentioning.
    """

    copy: float
    matmul: float
    launch_us: float

    @classmethod
    def measure(cls) -> Ceilings:
        """Measured on the current device."""
        source = torch.randint(256, (_COPIED,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        words, copies = source.view(torch.int64), target.view(torch.int64)
        copied = min(
            time_us(partial(target.copy_, source)),  # by the copy engines, which are not always the faster
            time_us(partial(torch.bitwise_not, words, out=copies)),
        )
        del source, target, words, copies
        left, right = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        multiplied = time_us(partial(torch.matmul, left, right))
        small = torch.zeros(1, device="cuda")
        return cls(2 * _COPIED / copied * 1e6, 2 * _SIDE**3 / multiplied * 1e6, time_us(small.zero_))

    def limit_us(self, nbytes: float, flops: float = 0) -> float:
        """The roofline: no less time than this for moving `nbytes` and doing `flops` operations, in microseconds."""
        return max(nbytes / self.copy, flops / self.matmul) * 1e6

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def shares(row: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """The row with what follows from its `us`, `bytes` and `flops`: GB/s, TFLOP/s, and `limit`, the share of the limit.

    That is the roofline's time over the measured one: 1 is as fast as the device can be. A row without a time, or
    without bytes and operations, stays as it is.
    """
    us, nbytes, flops = row.get("us"), row.get("bytes") or 0, row.get("flops") or 0
    derived: dict[str, Any] = {}
    if us and (nbytes or flops):
        if nbytes:
            derived["GB/s"] = nbytes / us / 1e3
        if flops:
            derived["TFLOP/s"] = flops / us / 1e6
        derived["limit"] = ceilings.limit_us(nbytes, flops) / us
    return {**row, **derived}


def time_us(work: Callable[[], Any], *, graph: bool = True, milliseconds: float = 60) -> float:
    """The median time of `work()` in microseconds, from events on the device, with an L2 cache that holds other data.

    With `graph` the work is captured once and replayed, so that the host's time to launch its kernels does not count;
    work that cannot be captured (it waits for the device, or launches on the legacy stream) needs graph=False.
    Each repetition begins with a write over 256 MB, during which the host prepares what follows. milliseconds: how long
    to repeat, apart from as much again for the writes.
    """
    from triton.testing import do_bench

    timed = captured(work) if graph else work
    return 1e3 * float(do_bench(timed, warmup=10, rep=milliseconds, return_mode="median"))


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """What replays `work()` as a CUDA graph, without the host's part. Warms up first: kernels compile while it does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = work()

    def replay(_kept: Any = kept) -> None:  # the outputs live as long as the graph that writes them
        graph.replay()

    return replay


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm of `wanted`, in float64; infinite if anything got is not finite."""
    if got.shape != wanted.shape:
        raise ValueError(f"an output of shape {tuple(got.shape)} where {tuple(wanted.shape)} was expected")
    if not bool(got.isfinite().all()):
        return float("inf")
    exact = wanted.double()
    return float((got.double() - exact).norm() / exact.norm())


def poison(*nbytes: int, blocks: int = 4) -> None:
    """Fill memory that the next allocations will be given with 255s: NaN in every floating-point type, -1 in integers.

    nbytes: sizes of allocations to come. The allocator serves a request from the free block that fits best, so some
    blocks of each size, and of powers of two for what lies between, are allocated, filled and freed.
    """
    full = []
    for size in (*nbytes, *(1 << power for power in range(9, 26))):
        full += [torch.full((max(size, 1),), 255, dtype=torch.uint8, device="cuda") for _ in range(blocks)]
    torch.cuda.synchronize()
    del full


def run_poisoned(work: Callable[[], Any]) -> Any:
    """What `work()` returns when its outputs are allocated in memory full of NaN: an element never written shows.

    Runs the work twice, the first time to learn how large its outputs are.
    """
    sizes = [tensor.untyped_storage().nbytes() for tensor in _tensors(work())]
    torch.cuda.synchronize()
    poison(*sizes)
    return work()


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for each in result.values():
            yield from _tensors(each)
    elif isinstance(result, (tuple, list)):
        for each in result:
            yield from _tensors(each)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that `work()` had allocated at once on the device beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def failures(row: dict[str, Any]) -> Iterator[None]:
    """Write what fails inside the block down as the row's `failed`, its type and first line, and go on.

    Libraries are not installed, work does not fit into the device: each is one result among others.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        row["failed"] = f"not installed: {problem.name}"
    except Exception as problem:  # noqa: BLE001  # whatever it is
        first = next(iter(str(problem).strip().splitlines()), "")
        row["failed"] = f"{type(problem).__name__}: {first}"[:300]


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeUp inside the block once `seconds` are over; None: never. For the main thread of a Unix process."""
    import signal

    def stop(*_: Any) -> None:
        raise TimeUp(f"stopped after {perf_counter() - began:.0f} s")

    began = perf_counter()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
