"""Controls that the program sets, in place of a person, tell nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Quiet:
    """True within `with quiet.setting():`; watchers of controls ask it before they act."""

    def __init__(self) -> None:
        self._on = False

    def __bool__(self) -> bool:
        return self._on

    @contextmanager
    def setting(self) -> Iterator[None]:
        """While controls are set by the program."""
        self._on = True
        try:
            yield
        finally:
            self._on = False
