"""The uncompressed cache, as a method like any other."""

from __future__ import annotations

from typing import Any, ClassVar

from workbench.errors import BadParameter
from workbench.kv.base import KVMethod
from workbench.registry import Fidelity, Paper, register


@register
class Full(KVMethod):
    """Keep everything: the cache every other method is compared with."""

    key = "full"
    title = "Full cache"
    paper: ClassVar[Paper | None] = None
    claim = "exact"
    fidelity = Fidelity("baseline")

    @classmethod
    def takes_budget(cls) -> bool:
        return False

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None:
            raise BadParameter("full: the full cache has no budget; choose another method to save memory")
