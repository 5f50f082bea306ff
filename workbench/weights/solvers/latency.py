"""How long products with weights of some shape take: as data that is given, or as many multiply-adds as there are."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping

import torch
from torch.nn.functional import linear

from workbench.core.memo import Memo
from workbench.errors import BadParameter, NotApplicable
from workbench.files.strict_json import loads
from workbench.formatting import quoted

_REPEATS, _SECONDS = 15, 0.02  # each shape is tried so often, and not much longer than this
_LONGEST = 1 << 20  # characters of a table


class ProductTimes:
    """The time of one product with a weight [o, i].

    recorded: seconds by (o, i), as `parsed` reads and `recorded` measures them. Between two recorded shapes that differ
    in one size alone the time is interpolated. Without any, the time of a product is its number of multiply-adds for
    one token, so that the figures of any machine are the same.
    """

    def __init__(self, recorded: Mapping[tuple[int, int], float] | None = None) -> None:
        self._recorded = dict(recorded or {})
        self._memo = Memo()

    def of(self, outputs: int, inputs: int) -> float:
        """Raises NotApplicable where no recorded shapes have this one between them."""
        if not self._recorded:
            return float(outputs * inputs)
        return self._memo.once((outputs, inputs), lambda: self._interpolated(outputs, inputs))

    def _interpolated(self, outputs: int, inputs: int) -> float:
        rows = {o: seconds for (o, i), seconds in self._recorded.items() if i == inputs}
        columns = {i: seconds for (o, i), seconds in self._recorded.items() if o == outputs}
        for known, size in ((rows, outputs), (columns, inputs)):
            below = max((other for other in known if other <= size), default=None)
            above = min((other for other in known if other >= size), default=None)
            if below is not None and above is not None:
                part = (size - below) / (above - below) if above > below else 0.0
                return known[below] + part * (known[above] - known[below])
        raise NotApplicable(
            f"the table of times has no shapes between which a weight of {outputs} x {inputs} lies; record one for "
            "this model (workbench.weights.recorded_times)"
        )


def parsed(text: str) -> dict[tuple[int, int], float]:
    """The seconds by (outputs, inputs) of a table in JSON, {"1536x576": 0.00012}; nothing of an empty text.

    Raises BadParameter, naming the entry, where it is none.
    """
    if not text.strip():
        return {}
    if len(text) > _LONGEST:
        raise BadParameter(f"a table of times has at most {_LONGEST:,} characters, not {len(text):,}")
    try:
        entries = loads(text)
    except ValueError as problem:
        raise BadParameter(f'a table of times is JSON, {{"1536x576": 0.00012}}: {problem}') from problem
    return {_shape(name): _time(name, value) for name, value in entries.items()}


def _shape(name: str) -> tuple[int, int]:
    sizes = name.split("x")
    if len(sizes) != 2 or not all(size.isascii() and size.isdigit() and 0 < int(size) < 1 << 31 for size in sizes):
        raise BadParameter(f"{quoted(name)} is no shape: a table of times has outputs and inputs, as in 1536x576")
    return int(sizes[0]), int(sizes[1])


def _time(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise BadParameter(f"{quoted(name)}: a product takes some seconds, not {quoted(str(value))}")
    return float(value)


def recorded(shapes: Iterable[tuple[int, int]], tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """A table in JSON of how long products of inputs [tokens, i] with weights of these shapes (o, i) take here."""
    seconds = {f"{o}x{i}": product_seconds(o, i, tokens, device, dtype) for o, i in sorted(set(shapes))}
    return json.dumps({name: float(f"{value:.4g}") for name, value in seconds.items()})


def product_seconds(outputs: int, inputs: int, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one product of inputs [tokens, inputs] with a weight [outputs, inputs], measured now.

    The median of several tries after one that is not counted, on the threads that torch has.
    """
    weight = torch.zeros(outputs, inputs, device=device, dtype=dtype)
    x = torch.zeros(tokens, inputs, device=device, dtype=dtype)
    seconds: list[float] = []
    began = time.perf_counter()
    with torch.inference_mode():
        while len(seconds) <= _REPEATS and (len(seconds) < 4 or time.perf_counter() - began < _SECONDS):
            start = time.perf_counter()
            linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[len(seconds[1:]) // 2]
