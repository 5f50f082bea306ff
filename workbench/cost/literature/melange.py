"""The cheapest mixture of devices for a workload (Mélange)."""

from __future__ import annotations

from itertools import product
from typing import Any

from workbench.cost.estimating import cost
from workbench.cost.hardware import hardware
from workbench.cost.literature.base import Outcome, System
from workbench.cost.literature.models import LLAMA2_7B
from workbench.cost.serving import Modelled
from workbench.errors import MissingExtra, NotApplicable
from workbench.parameters import param
from workbench.registry import Paper

PRICES = {"L40S": 1.9, "A100": 3.7, "H100": 7.5}  # dollars an hour, an example: prices change every month
PROMPTS, OUTPUTS = (128, 512, 2048), (64, 256, 1024)


class Melange(System):
    """Requests are sorted into buckets by size; each device's rate in a bucket, within the time between tokens that was
    promised, comes from the step model; slices of buckets go to devices by an integer program of the least price.
    """

    key = "melange"
    title = "Mélange"
    paper = Paper(
        "Mélange: Cost Efficient Large Language Model Serving by Exploiting GPU Heterogeneity",
        "Griggs 2024",
        "2404.14527",
    )
    claim = "up to 77 % lower cost than one kind of device"

    rate: float = param(8.0, gt=0, unit="requests/s", help="of the whole workload, evenly over the buckets")
    promised: float = param(0.12, gt=0, unit="s", help="between two tokens of a request")
    slices: int = param(4, ge=1, help="of a bucket, each of which one device takes")

    def run(self) -> Outcome:
        buckets = list(product(PROMPTS, OUTPUTS))
        rates = {}
        for name in PRICES:
            machine = Modelled(cost(LLAMA2_7B, hardware=hardware(name), context=max(PROMPTS) + max(OUTPUTS)))
            rates[name] = [self._most(machine, *bucket) for bucket in buckets]
        wanted = [self.rate / len(buckets)] * len(buckets)
        best = self._cheapest(rates, wanted, list(PRICES))
        rows: list[dict[str, Any]] = [{"devices": _named(best[0]), "dollars an hour": best[1], "saved": 0.0}]
        for name in PRICES:
            try:
                count, price = self._cheapest({name: rates[name]}, wanted, [name])
            except NotApplicable:
                continue
            rows.append({"devices": _named(count), "dollars an hour": price, "saved": 1 - best[1] / price})
        return self.outcome(*rows, note="Llama 2 7B; saved: by the mixture in the first row; prices are an example")

    def _most(self, machine: Modelled, prompt: int, output: int) -> float:
        """Requests a second of this size that a device takes within what was promised."""
        length = prompt + output // 2
        batch = int(machine.room // machine.nbytes(prompt + output))
        while batch and machine.iteration(batch, batch * length) > self.promised:
            batch -= 1
        if not batch:
            return 0.0
        seconds = output * machine.iteration(batch, batch * length) + batch * machine.iteration(0, 0, [(prompt, 0)])
        return batch / seconds

    def _cheapest(
        self, rates: dict[str, list[float]], wanted: list[float], names: list[str]
    ) -> tuple[dict[str, int], float]:
        """How many devices of each kind, and their price. Raises NotApplicable where a bucket suits none."""
        try:
            import numpy as np
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError as error:
            raise MissingExtra("integer programs need SciPy: pip install 'inference-workbench[cost]'") from error
        pieces = [(bucket, rate / self.slices) for bucket, rate in enumerate(wanted) for _ in range(self.slices)]
        devices, count = len(names), len(pieces)
        size = devices + devices * count  # devices of each kind, then whether a piece goes to a kind
        load, once = np.zeros((devices, size)), np.zeros((count, size))
        upper = np.full(size, np.inf)
        for row, name in enumerate(names):
            load[row, row] = -1
            for column, (bucket, rate) in enumerate(pieces):
                place = devices + row * count + column
                most = rates[name][bucket]
                load[row, place], upper[place] = (rate / most, 1) if most else (0, 0)
                once[column, place] = 1
        price = np.concatenate([[PRICES[name] for name in names], np.zeros(devices * count)])
        limits = [LinearConstraint(load, -np.inf, 0), LinearConstraint(once, 1, 1)]
        solved = milp(
            price, constraints=limits, integrality=np.ones(size), bounds=Bounds(0, upper),
            options={"mip_rel_gap": 0.01, "time_limit": 10},
        )  # fmt: skip
        if solved.x is None:
            raise NotApplicable(f"melange: no device of {', '.join(names)} keeps what was promised in every bucket")
        return {name: round(solved.x[row]) for row, name in enumerate(names)}, float(solved.fun)


def _named(count: dict[str, int]) -> str:
    return " + ".join(f"{number} {name}" for name, number in count.items() if number) or "none"
