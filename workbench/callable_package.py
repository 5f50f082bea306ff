"""Packages that are called: `wb.tasks()` gives the catalogue, and `workbench.tasks` holds what makes it.

Python sets a package as an attribute of its parent whenever it is imported, in place of a function of that name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def callable_as(package: str, function: Callable[..., Any]) -> None:
    """Make calling the package `package`, which is being imported, call `function`."""

    class CallablePackage(ModuleType):
        __call__ = staticmethod(function)

    sys.modules[package].__class__ = CallablePackage
