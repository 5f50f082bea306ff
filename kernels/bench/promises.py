"""What the kernels have to reach on a data centre's GPU, and whether the recorded figures do.

Each promise finds its figure in the results of one device; where rows are missing there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Any]]  # what the JSON files hold, by name

LONGEST, MOST = 128 << 10, 8  # tokens, batch: where a full cache is as fast as the memory
LLAMA = [32, 8, 128]
WHOLE_CACHE = ("SDPA", "FlexAttention", "xFormers", "flash-attn", "FlashInfer")


@dataclass(frozen=True)
class Promise:
    """A line with a bound, at most or at least. `figure` finds what was reached; None: nothing was measured."""

    says: str
    bound: float
    figure: Callable[[Results], float | None]
    at_most: bool = False
    percent: bool = False

    def kept(self, results: Results) -> bool | None:
        """Whether it is kept; None where it was not measured."""
        reached = self.figure(results)
        if reached is None:
            return None
        return reached <= self.bound if self.at_most else reached >= self.bound

    def shown(self, value: float) -> str:
        """A figure in the promise's own unit."""
        if self.percent:
            return f"{value:.0%}" if abs(value) >= 0.1 else f"{value:.2%}"
        return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:,.2f}".rstrip("0").rstrip(".")


def table(results: Results) -> list[list[str]]:
    """Promise, bound, what was reached, and whether that is enough, of what was measured; with a head."""
    lines = [["must hold", "bound", "reached", "holds"]]
    for promise in PROMISES:
        reached, kept = promise.figure(results), promise.kept(results)
        if reached is None:
            continue
        said = "≤ " if promise.at_most else "≥ "
        lines.append(
            [
                promise.says,
                said + promise.shown(promise.bound),
                promise.shown(reached),
                "yes" if kept else "**no**",
            ]
        )
    return lines


# ------------------------------------------------------------------------------------------------------ finding figures


def _rows(results: Results, module: str, what: str = "", **case: Any) -> Iterator[Row]:
    """Rows of a module, all of whose files begin with its name, whose `what` begins so and that agree with the case."""
    for name, result in results.items():
        for row in result.get("rows", []) if name.startswith(module) else ():
            if str(row.get("what", "")).startswith(what) and all(row.get(key) == value for key, value in case.items()):
                yield row


def _figures(rows: Iterator[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _decode(what: str, key: str, **case: Any) -> Callable[[Results], float | None]:
    """The worst of what was measured in the longest cache at the largest batch."""
    case = {"heads": LLAMA, "n": LONGEST, "batch": MOST, **case}
    return lambda results: min(_figures(_rows(results, "decode", what, **case), key), default=None)


def _errors(names: Sequence[str]) -> Callable[[Results], float | None]:
    def worst(results: Results) -> float | None:
        errors = [each for name in names for each in _figures(_rows(results, "decode", name), "error")]
        return max(errors, default=None)

    return worst


def _whole_cache(results: Results, batch: int, n: int) -> float | None:
    """The least time that anything took over the full cache, in µs."""
    times = _figures(_rows(results, "decode", "full cache", heads=LLAMA, batch=batch, n=n), "us")
    for name in WHOLE_CACHE:
        times += _figures(_rows(results, "baselines", name, batch=batch, n=n), "us")
    return min(times, default=None)


def _times_as_fast(what: str, **case: Any) -> Callable[[Results], float | None]:
    """Over the fastest full cache, in the longest cache at the largest batch."""

    def ratio(results: Results) -> float | None:
        base = _whole_cache(results, MOST, LONGEST)
        mine = _figures(_rows(results, "decode", what, heads=LLAMA, n=LONGEST, batch=MOST, **case), "us")
        return base / max(mine) if base and mine else None

    return ratio


def _over_dense(what: str) -> Callable[[Results], float | None]:
    def ratio(results: Results) -> float | None:
        base, mine = _decode("dense", "us")(results), _decode(what, "us")(results)
        return base / mine if base and mine else None

    return ratio


def _slowest_of_less(results: Results) -> float | None:
    """The full cache's time over that of half of it or less, where that is the least."""
    ratios = []
    for row in _rows(results, "decode", heads=LLAMA):
        less = row.get("kept", 1.0) <= 0.5
        base = _whole_cache(results, row["batch"], row["n"]) if less and row.get("us") else None
        if base:
            ratios.append(base / float(row["us"]))
    return min(ratios, default=None)


def _reading(results: Results) -> float | None:
    """Column sums with a map over the fastest attention of the layer, for the slower kind of map."""
    base = _figures(_rows(results, "reading", "attention itself", n=LONGEST), "us")
    mine = _figures(_rows(results, "reading", "column sums + map", n=LONGEST), "us")
    return max(mine) / min(base) if base and mine else None


def _reading_memory(results: Results) -> float | None:
    peaks = _figures(_rows(results, "reading", "column sums + map", n=LONGEST), "peak")
    return max(peaks) / 2**20 if peaks else None


def _step(what: str, key: str) -> Callable[[Results], float | None]:
    return lambda results: min(
        (float(row[key]) for row in _rows(results, "end_to_end", n=LONGEST) if row.get("what") == what), default=None
    )


def _off(results: Results) -> float | None:
    return max((abs(off) for off in _figures(_rows(results, "end_to_end", n=LONGEST), "off")), default=None)


PROMISES = (
    Promise("error of dense and ragged", 5e-3, _errors(("dense", "ragged")), at_most=True),
    Promise("error of quantised rows", 5e-3, _errors(("8 bit", "4 bit", "2 bit")), at_most=True),
    Promise("error of bitmaps", 5e-3, _errors(("bitmap",)), at_most=True),
    Promise("dense, of copy bandwidth", 0.9, _decode("dense", "limit"), percent=True),
    Promise("ragged, 50 % kept, of copy bandwidth", 0.9, _decode("ragged", "limit", kept=0.5), percent=True),
    Promise("ragged, 25 % kept, of copy bandwidth", 0.9, _decode("ragged", "limit", kept=0.25), percent=True),
    Promise("8 bit, of copy bandwidth", 0.75, _decode("8 bit", "limit"), percent=True),
    Promise("4 bit, of copy bandwidth", 0.75, _decode("4 bit", "limit"), percent=True),
    Promise("2 bit, of copy bandwidth", 0.6, _decode("2 bit", "limit"), percent=True),
    Promise("bitmap, 70 % pruned, times as fast as dense", 1.6, _over_dense("bitmap")),
    Promise("4 bit, times as fast as the fastest full cache", 2.6, _times_as_fast("4 bit")),
    Promise("2 bit, times as fast as the fastest full cache", 4.0, _times_as_fast("2 bit")),
    Promise("ragged, 25 % kept, times as fast as the fastest full cache", 3.5, _times_as_fast("ragged", kept=0.25)),
    Promise("half the cache or less, any length and batch, times as fast", 1.0, _slowest_of_less),
    Promise("column sums + map of 512 × 512, over the layer's attention", 0.6, _reading, at_most=True),
    Promise("column sums + map, extra MiB", 64.0, _reading_memory, at_most=True),
    Promise("full, tokens a second", 0.7 * 90, _step("full", "tokens/s")),
    *(
        Promise(f"{what}, of its own limit", 0.7, _step(what, "limit"), percent=True)
        for what in (
            "full", "SnapKV 25 %", "KIVI 4 bit", "KIVI 2 bit", "SnapKV 25 % + KIVI 4 bit", "SnapKV 25 % + KIVI 2 bit",
        )
    ),
    Promise("peak memory, off from what was predicted", 0.03, _off, at_most=True, percent=True),
)  # fmt: skip
