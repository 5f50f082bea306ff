"""What the modules of a package hold that can change: what a method may not use to remember anything."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from types import FunctionType, ModuleType
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor

EXCEPTIONS = {
    "workbench.engine.attention_hook._LOCKS": "two sessions on one model object have no other place in common",
    "workbench.models.quiet._PROCESS": "what is silenced belongs to the process, and several loads may overlap",
    "workbench.registry._METHODS": "the registry: classes put themselves there when their module is imported",
}
"""What modules hold all the same, by dotted name, and why."""

_WEAK = (WeakKeyDictionary, WeakSet, WeakValueDictionary)
_VALUES = (int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.layout, torch.Size)
_CONSTANTS = (type, FunctionType, torch._ops.OpOverload)  # noqa: SLF001  torch offers no other name for its operations
_CACHE = type(cache(len))
_DEPTH = 5  # how far what lies inside each other is followed


@dataclass(frozen=True, eq=False)
class _Thing:
    """An object as itself: kept, so that no other one takes its place in memory, and equal to nothing else."""

    itself: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Thing) and self.itself is other.itself

    def __hash__(self) -> int:
        return id(self.itself)


def module_state(packages: Iterable[str]) -> dict[str, object]:
    """What loaded modules of these packages hold, by dotted name, in a form that is equal while nothing changes.

    Followed are containers, weak ones too, the arguments that caches of functions remember, tensors, context variables,
    instances of the packages' own classes, what classes hold, and default arguments. `EXCEPTIONS` are left out.
    """
    tops = tuple(packages)
    names = [name for name in sys.modules if name.split(".", 1)[0] in tops]
    state: dict[str, object] = {}
    for name in names:
        for attribute, value in _held(sys.modules[name], name):
            where = f"{name}.{attribute}"
            if where not in EXCEPTIONS:
                state[where] = _content(value, tops, _DEPTH)
    return state


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """The names under which something else is held now; of names that are new, those that hold what is alive."""
    gone = [name for name in before if name not in after]
    other = [name for name, content in after.items() if name in before and before[name] != content]
    new = [name for name, content in after.items() if name not in before and isinstance(content, _Alive)]
    return sorted([*gone, *other, *(name for name in new if after[name] != _Alive(()))])


@dataclass(frozen=True)
class _Alive:
    """What a weak container holds, or a cache was asked with: objects that live."""

    things: tuple[object, ...]


def _held(module: ModuleType, name: str) -> Iterator[tuple[str, object]]:
    """A module's variables, and what its own classes and functions hold."""
    for attribute, value in list(vars(module).items()):
        if attribute.startswith("__") or isinstance(value, ModuleType):
            continue
        if isinstance(value, type):
            if value.__module__ == name:
                yield from _held_by_class(attribute, value)
        elif isinstance(value, FunctionType):
            if value.__module__ == name:
                yield attribute, [value.__defaults__, value.__kwdefaults__, vars(value)]
        else:
            yield attribute, value


def _held_by_class(name: str, cls: type) -> Iterator[tuple[str, object]]:
    for attribute, value in list(vars(cls).items()):
        if not attribute.startswith(("__", "_abc_", "model_")):
            yield f"{name}.{attribute}", getattr(value, "__func__", value)


def _content(thing: object, tops: tuple[str, ...], depth: int) -> object:
    """What a thing holds, so far down; equal to another only where the very same things are held."""
    inside = partial(_content, tops=tops, depth=depth - 1)
    if isinstance(thing, _VALUES):
        return thing
    if isinstance(thing, _CACHE):
        content: object = _Alive(tuple(map(_Thing, _arguments(thing))))
    elif isinstance(thing, Tensor):
        content = _Thing(thing), None if thing.is_inference() else thing._version  # noqa: SLF001  its only name
    elif depth == 0:
        content = _Thing(thing)
    elif isinstance(thing, ContextVar):
        content = inside(thing.get(None))
    elif isinstance(thing, WeakSet):
        content = _Alive(tuple(map(_Thing, thing)))
    elif isinstance(thing, Mapping | WeakKeyDictionary | WeakValueDictionary):
        pairs = tuple((_Thing(key), inside(value)) for key, value in list(thing.items()))
        content = _Alive(pairs) if isinstance(thing, _WEAK) else pairs
    elif isinstance(thing, Sequence | AbstractSet | deque):
        content = tuple(map(inside, list(thing)))
    elif type(thing).__module__.split(".", 1)[0] in tops and hasattr(thing, "__dict__"):
        content = _Thing(thing), inside(vars(thing))
    else:
        content = _Thing(thing)
    return content


def _arguments(cached: object) -> list[object]:
    """What a cached function was asked with that lives: plain values and constants, equal by what they are, do not."""
    attributes = getattr(cached, "__dict__", None)
    tables = [table for table in gc.get_referents(cached) if isinstance(table, dict) and table is not attributes]
    return [part for table in tables for key in table for part in _parts(key) if _lives(part)]


def _parts(key: object) -> Iterator[object]:
    if isinstance(key, tuple):
        for part in key:
            yield from _parts(part)
    else:
        yield key


def _lives(part: object) -> bool:
    if isinstance(part, (*_VALUES, *_CONSTANTS)) or type(part) is object:
        return False
    if isinstance(part, Tensor) or type(part).__hash__ is object.__hash__:
        return True
    return any(map(_lives, getattr(part, "__dict__", {}).values()))  # equal by what it holds
