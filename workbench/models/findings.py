"""What an audit of a model says, as values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

Standing = Literal["compressible", "exact", "refused", "unchecked"]


@dataclass(frozen=True)
class Finding:
    """What an audit says of one layer's attention, or of the weights of one name in all layers.

    part: "attention" or "weights". layers: numbers of the decoder's layers; none for weights outside of them. module:
    the weights' name inside a layer, or in the model. kind: what a layer attends to or keeps, what holds the weights.
    heads, kv_heads, key_size, value_size: of a layer's attention, in elements; numbers: how many the weights are; None
    where there are none or nothing is known. standing: "compressible", methods may change it; "exact", it stays as it
    is; "refused", it is not run; "unchecked", there were no weights to try. why: for the last three.
    """

    part: Literal["attention", "weights"]
    layers: tuple[int, ...]
    module: str
    kind: str
    standing: Standing
    why: str = ""
    heads: int | None = None
    kv_heads: int | None = None
    key_size: int | None = None
    value_size: int | None = None
    numbers: int | None = None

    def row(self) -> dict[str, Any]:
        """The same for a table: layers as "0-3, 5"."""
        return {**asdict(self), "layers": ranges(self.layers)}


@dataclass(frozen=True)
class Audit:
    """What each layer of a model is, and what becomes of it here.

    source: what was audited. exact: whether reading and decoding equal the model by itself; None: there were no weights
    to try it with. why: what speaks against it. weights: the key of the weight method that was asked. findings: one a
    layer for attention, then one for each name and fate of weights.
    """

    source: str
    model_type: str
    exact: bool | None
    why: str
    weights: str
    findings: tuple[Finding, ...]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def of(self, part: Literal["attention", "weights"]) -> tuple[Finding, ...]:
        """The findings on attention, or on weights."""
        return tuple(finding for finding in self.findings if finding.part == part)

    def folded(self) -> list[Finding]:
        """The findings with layers that are alike in one."""
        same: dict[Finding, list[int]] = {}
        for finding in self.findings:
            same.setdefault(replace(finding, layers=()), []).extend(finding.layers)
        return [replace(finding, layers=tuple(layers)) for finding, layers in same.items()]

    def frame(self) -> pd.DataFrame:
        """One row a finding: its fields, with layers as "0-3, 5"."""
        import pandas as pd

        frame = pd.DataFrame([finding.row() for finding in self.findings])
        return frame.astype(dict.fromkeys(("heads", "kv_heads", "key_size", "value_size", "numbers"), "Int64"))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        said = {True: "exact", False: f"refused: {self.why}", None: f"not tried: {self.why}"}[self.exact]
        return f"{self.source} ({self.model_type}): {said}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in words: those that follow each other as "first-last"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
