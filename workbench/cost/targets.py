"""What tokens cost where a time between them is promised: on each device the largest batch that keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench import arguments
from workbench.core.bisection import largest
from workbench.cost.estimating import cost
from workbench.cost.serving import Modelled
from workbench.errors import BadParameter
from workbench.recipe import Spec

if TYPE_CHECKING:
    import pandas as pd


def targets(
    model: Any,
    hardware: Mapping[str, float | None] | Sequence[str],
    promised: Sequence[float] = (0.02, 0.05, 0.1, 0.2),
    recipe: Spec = "full",
    context: int = 8192,
    **options: Any,
) -> pd.DataFrame:
    """One row a device and promise: the largest batch that keeps it, tokens a second, and what a million of them takes.

    hardware: devices, with their prices an hour where they have one. promised: seconds between tokens of a sequence.
    options: as `wb.cost` takes them. Seconds are a device's for a million tokens; dollars where a price is known. A
    promise that no batch keeps has none.
    """
    import pandas as pd

    prices = dict(hardware) if isinstance(hardware, Mapping) else dict.fromkeys(hardware)
    if not prices:
        raise BadParameter("hardware is empty: name a device")
    limits = [arguments.number("promised", limit, 0, above=True) for limit in promised]
    rows = []
    for name, given in prices.items():
        told = cost(model, recipe, name, context, **options)
        machine, most = Modelled(told), told.concurrency
        stated = told.machine.hardware.price
        price = given if given is not None else None if stated is None else stated.plain
        for limit in limits:
            batch = _largest(machine, context, most, limit)
            rate = batch / machine.iteration(batch, batch * context) if batch else 0.0
            seconds = 1e6 / rate * told.machine.devices if rate else None
            rows.append(
                {
                    "hardware": told.machine.hardware.name,
                    "promised_s": limit,
                    "batch": batch,
                    "tokens_per_s": rate,
                    "seconds_per_million": seconds,
                    "dollars_per_million": None if price is None or seconds is None else seconds / 3600 * price,
                }
            )
    return pd.DataFrame(rows)


def _largest(machine: Modelled, context: int, most: int, limit: float) -> int:
    """The largest batch whose step is within the limit; 0 where not even one is."""

    def keeps(batch: int) -> bool:
        return machine.iteration(batch, batch * context) <= limit

    if not most or not keeps(1):
        return 0
    return most if keeps(most) else largest(keeps, 1, most)
