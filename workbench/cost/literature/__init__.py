"""Systems from the literature, each a small model over estimates and the simulator, beside its paper's claim."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workbench.cost.literature.apex import Apex
from workbench.cost.literature.base import Outcome, System, found
from workbench.cost.literature.bounds import ExpertWeave, FlashFormer, FlightLLM, InstInfer, LongContext, TopLoc
from workbench.cost.literature.choices import Crayon, MetaInf
from workbench.cost.literature.melange import Melange
from workbench.cost.literature.policies import AliseStudy, FastSwitchStudy, FlexLLMStudy, LayeredPrefillStudy
from workbench.cost.literature.pools import EPD, EMoE, IdealizedRuntime, Polca, RuntimeDissection, ServingSettings
from workbench.cost.literature.sharded import BurstAttention, TreeAttention
from workbench.cost.literature.splitwise import Splitwise

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SYSTEMS", "Outcome", "System", "system", "systems"]

SYSTEMS: Mapping[str, type[System]] = MappingProxyType(
    {
        each.key: each
        for each in (
            LongContext, Apex, LayeredPrefillStudy, AliseStudy, FastSwitchStudy, Splitwise, EMoE, FlexLLMStudy,
            FlightLLM, EPD, Melange, InstInfer, FlashFormer, ExpertWeave, Polca, IdealizedRuntime, ServingSettings,
            RuntimeDissection, TopLoc, TreeAttention, BurstAttention, MetaInf, Crayon,
        )
    }
)  # fmt: skip


def system(key: str, **parameters: Any) -> Outcome:
    """What a system's model gives, with these parameters. Raises BadParameter for a key or parameter that is not known.

    >>> system("toploc").frame()
    """
    return found(key, SYSTEMS)(**parameters).run()


def systems() -> pd.DataFrame:
    """All systems: one row each, with key, name, what is modelled, paper, the paper's claim, and parameters."""
    import pandas as pd

    rows = [
        {
            "key": each.key,
            "name": each.title,
            "model": each.summary(),
            "paper": str(each.paper or ""),
            "claim": each.claim,
            "parameters": ", ".join(f"{parameter.name}={parameter.default}" for parameter in each.parameters()),
        }
        for each in SYSTEMS.values()
    ]
    return pd.DataFrame(rows)
