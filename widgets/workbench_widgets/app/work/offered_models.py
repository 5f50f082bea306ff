"""Which models the visitors of a page may load."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import ModelNotOffered
from workbench.models.catalog import catalogue

_SHOWN = 80  # characters of a name that is refused


@dataclass(frozen=True)
class OfferedModels:
    """The models of one server.

    default: what a page begins with, chosen by whoever started the server, as `more` were. anything: also every other
    hub id and folder, for a server that only its own machine reaches.
    """

    default: str
    more: tuple[str, ...] = ()
    anything: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those that every visitor may load, each once."""
        return tuple(dict.fromkeys([self.default, *(packaged.name for packaged in catalogue()), *self.more]))

    def check(self, name: str) -> None:
        """Raises ModelNotOffered, which tells nothing of what lies on this machine."""
        if not self.anything and name not in self.names:
            raise ModelNotOffered(
                f"{name[:_SHOWN]!r} is not offered here: this workbench is served to other machines, with "
                f"{', '.join(self.names)}; whoever started it can add one with --allow-model"
            )
