"""Budgets: a share of the uncompressed bytes, or an absolute size."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from workbench.errors import BadBudget
from workbench.formatting import quoted

_UNITS = {
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_Kind = Literal["share", "bytes", "tokens"]
_LONGEST = 64  # characters of a budget as text
_WRITTEN = re.compile(r"((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z%]*)")
_HELP = (
    'use a share above 0 and up to 1 (0.25), a percentage ("25%"), a size ("64MiB"), or a number of tokens '
    '("512 tokens")'
)


@dataclass(frozen=True)
class Budget:
    """How much a method may use.

    `kind` is "share" (of the uncompressed bytes, 0 < amount <= 1), "bytes", or "tokens" (positions kept per KV head on
    average). Write it as a number or as text: `0.25`, `"25%"`, `"64MiB"`, `"512 tokens"`.
    """

    kind: _Kind
    amount: float

    def __post_init__(self) -> None:
        least, most = (0.0, 1.0) if self.kind == "share" else (1.0, math.inf)
        sized = isinstance(self.amount, int | float) and math.isfinite(self.amount) and least <= self.amount <= most
        if self.kind not in get_args(_Kind) or not sized or not self.amount:
            raise BadBudget(f"budget {quoted(self.amount)} {quoted(self.kind)}: {_HELP}")

    @classmethod
    def parse(cls, value: BudgetLike) -> Budget:
        """Read a budget from a number, a text or another budget. Raises BadBudget with the accepted forms."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls._from_text(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BadBudget(f"budget {quoted(value)} is not a number or a text: {_HELP}")
        try:
            share = float(value)
        except OverflowError:
            share = math.inf
        if not 0 < share <= 1:  # not a number is neither
            raise BadBudget(f"budget {quoted(value)} is not a share above 0 and up to 1: {_HELP}")
        return cls("share", share)

    @classmethod
    def _from_text(cls, text: str) -> Budget:
        written = text.strip()
        if len(written) > _LONGEST:
            raise BadBudget(f"budget {quoted(written)} is longer than {_LONGEST} characters: {_HELP}")
        parts = _WRITTEN.fullmatch(written)
        if not parts:
            raise BadBudget(f"budget {quoted(text)} cannot be read: {_HELP}")
        number, unit = float(parts[1]), parts[2].lower()
        if unit in ("", "%"):
            if not 0 < (share := number / 100 if unit else number) <= 1:
                raise BadBudget(f"budget {share:g} is not a share above 0 and up to 1: {_HELP}")
            return cls("share", share)
        if unit in ("token", "tokens"):
            if not math.isfinite(number) or number < 1 or number != int(number):
                raise BadBudget(f"budget {quoted(text)} is not a whole number of tokens: {_HELP}")
            return cls("tokens", number)
        if unit in _UNITS:
            size = number * _UNITS[unit]
            if not math.isfinite(size) or size < 1:
                raise BadBudget(f"budget {quoted(text)} is not a size of at least one byte: {_HELP}")
            return cls("bytes", float(int(size)))  # whole bytes, so that what is written reads back the same
        raise BadBudget(f"budget {quoted(text)} has the unknown unit {parts[2]!r}: {_HELP}")

    def nbytes(self, full_nbytes: int) -> int | None:
        """The bytes allowed when the uncompressed size is `full_nbytes`; None for a budget in tokens."""
        if self.kind == "share":
            return int(self.amount * full_nbytes)
        return int(self.amount) if self.kind == "bytes" else None

    def to_json(self) -> float | str:
        """The form it was written in: a number for a share, text for a size."""
        if self.kind == "share":
            return self.amount
        return f"{self._written()} {self.kind}"

    def _written(self) -> str:
        """A whole amount with every digit that it has, and never longer than what is read back."""
        return str(int(self.amount)) if self.amount < 2**53 else repr(self.amount)

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.amount:g}"
        if self.kind == "tokens":
            return f"{self._written()} tokens"
        return f"{self.amount / 2**20:g} MiB"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Budget], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda budget: budget.to_json())
        )


BudgetLike = Budget | float | str
"""What `Budget.parse` reads."""
