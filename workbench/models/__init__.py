"""Models: finding, fetching and loading them, and the few facts the workbench needs of one.

Importing this package is cheap: torch and transformers are imported by the functions that need them.
"""

from workbench.models.audit import audit
from workbench.models.catalog import CatalogEntry, ShippedEntry, WheelEntry, catalogue
from workbench.models.facts import UNLIMITED, Facts, facts, max_positions
from workbench.models.fetch import cache_dir, cached, damage, fetch
from workbench.models.findings import Audit, Finding
from workbench.models.load import LoadedModel, load
from workbench.models.rotary import Rotations, rotary, rotation_of
from workbench.models.tiny import TINY_ARCHITECTURES, tiny

__all__ = [
    "TINY_ARCHITECTURES",
    "UNLIMITED",
    "Audit",
    "CatalogEntry",
    "Facts",
    "Finding",
    "LoadedModel",
    "Rotations",
    "ShippedEntry",
    "WheelEntry",
    "audit",
    "cache_dir",
    "cached",
    "catalogue",
    "damage",
    "facts",
    "fetch",
    "load",
    "max_positions",
    "rotary",
    "rotation_of",
    "tiny",
]
