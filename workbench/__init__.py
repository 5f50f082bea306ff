"""The inference workbench: load a model, compress its inference, see at once what that saves and what it costs.

Importing this package is cheap: torch and transformers are imported when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from workbench.version import __version__

if TYPE_CHECKING:
    from workbench import attention, kv, models, search, sweep, weights
    from workbench.cost.estimating import cost
    from workbench.progress import Progress
    from workbench.recipe import Recipe
    from workbench.registry import method, methods
    from workbench.results import Results
    from workbench.session import Session
    from workbench.tasks.catalogue import task, tasks

__all__ = [
    "Progress",
    "Recipe",
    "Results",
    "Session",
    "__version__",
    "attention",
    "cost",
    "kv",
    "method",
    "methods",
    "models",
    "search",
    "sweep",
    "task",
    "tasks",
    "weights",
]

_LAZY = {
    "Session": "workbench.session",
    "Recipe": "workbench.recipe",
    "Results": "workbench.results",
    "Progress": "workbench.progress",
    "method": "workbench.registry",
    "methods": "workbench.registry",
    "task": "workbench.tasks",
    "tasks": None,
    "cost": None,
    "search": None,
    "sweep": None,
    "kv": None,
    "models": None,
    "weights": None,
    "attention": None,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    home = _LAZY[name]
    value = import_module(f"workbench.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
