"""What stands in for a part of a module while a pass lasts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, Protocol

from torch import Tensor, nn


class Attend(Protocol):
    """Our attention function, called as transformers' interface calls it; the output is [1, n, h, dv]."""

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,  # [1, h, n, d]
        key: Tensor,  # [1, k, n, d]
        value: Tensor,  # [1, k, n, dv]
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        slopes: Tensor | None = None,  # [h]: what is added to a score for each position that a key stands further on
        rounded: bool = False,  # whether that is rounded to bfloat16
        layer_idx: int | None = None,  # where the module does not say it
    ) -> tuple[Tensor, Tensor | None]: ...


Positions = Callable[[], Tensor]
"""Where the tokens of the pass stand, int64 [n], on any device."""


@dataclass(frozen=True)
class Adapter:
    """An attribute of a module's instances, and what takes its place.

    parts: the attributes that `function` reads, with dots where they lie deeper. function: (module, attend, *arguments
    of the method whose place it takes); for another attribute `value` takes its place. positions: the function is given
    those in the place of `attend`, and its model may use transformers' attention interface.
    """

    name: str
    parts: tuple[str, ...] = ()
    function: Callable[..., Any] | None = None
    value: object = None
    positions: bool = False

    def made(self, module: nn.Module, attend: Attend, positions: Positions) -> object:
        """What is to stand on this instance."""
        if self.function is None:
            return self.value
        return partial(self.function, module, positions if self.positions else attend)

    def changed(self, module: nn.Module) -> Iterator[str]:
        """What this module lacks of what is read of it, or takes besides what is understood: nothing, if it fits."""
        for part in (self.name, *self.parts):
            try:
                attrgetter(part)(module)
            except AttributeError:
                yield f"no {part}"
                return
        if self.function is not None:
            yield from _differences(getattr(type(module), self.name), self.function)


@cache
def _differences(method: Callable[..., Any], function: Callable[..., Any]) -> tuple[str, ...]:
    """Which arguments of a method a function in its place does not know, or awaits in vain."""
    theirs = list(inspect.signature(method).parameters.values())[1:]  # without self
    ours = list(inspect.signature(function).parameters.values())[2:]  # without the module and what it is given
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    given, known = ({p.name for p in each if p.kind not in kinds} for each in (theirs, ours))
    new = [] if any(p.kind in kinds for p in ours) else sorted(given - known)
    return (*(f"no argument {name}" for name in sorted(known - given)), *(f"a new argument {name}" for name in new))
