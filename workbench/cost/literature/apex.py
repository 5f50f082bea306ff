"""Which plan of devices is fastest (APEX)."""

from __future__ import annotations

from workbench.cost.estimating import cost
from workbench.cost.literature.base import Outcome, System
from workbench.cost.literature.models import LLAMA_70B
from workbench.cost.serving import Lengths, Modelled, Policy, Server, Workload, simulate
from workbench.parameters import param
from workbench.registry import Paper


class Apex(System):
    """Every way to share devices among copies of a model (data parallel) and parts of one (tensor parallel), each run
    on the simulator with a trace; the heuristic it is compared with splits the model over all devices.

    Left out: pipelines, experts' parallelism and clocks.
    """

    key = "apex"
    title = "APEX"
    paper = Paper(
        "APEX: An Extensible and Dynamism-Aware Simulator for Automated Parallel Execution in LLM Serving",
        "Lin 2024",
        "2411.17651",
    )
    claim = "plans up to 3.37 times faster than heuristics', 45 % less energy, found on a CPU within 15 minutes"

    hardware: str = param("H100", help="the kind of device")
    devices: int = param(8, ge=1, help="how many")
    rate: float = param(4.0, gt=0, unit="requests/s", help="arrivals")
    requests: int = param(40, ge=2, help="how many")
    seed: int = param(0, ge=0, help="of the arrivals and lengths")

    def run(self) -> Outcome:
        lengths = Lengths(mean=1500, spread=0.8), Lengths(mean=150, spread=0.8)
        workload = Workload.poisson(self.rate, self.requests, *lengths, seed=self.seed)
        rows = []
        for parts in (count for count in range(self.devices, 0, -1) if self.devices % count == 0):
            told = cost(LLAMA_70B, hardware=self.hardware, context=2048, devices=parts, chunk=2048)
            machine, copies = Modelled(told), self.devices // parts
            plan = f"{copies} copies x {parts} devices"
            if machine.room < 8 * machine.nbytes(4096):
                continue  # no room for caches beside a copy's weights
            power = told.machine.hardware.power
            watts = parts * (power.plain if power else 0.0)
            servers = [Server(f"copy {number}", machine, Policy(), watts=(watts, watts)) for number in range(copies)]
            done = simulate(servers, workload).numbers()
            rows.append(
                {
                    "plan": plan,
                    "until done (s)": done["done_s"]["mean"],
                    "seconds": done["seconds"],
                    "joules": done["joules"],
                }
            )
        best = min(rows, key=lambda row: float(row["until done (s)"]))
        gain = float(rows[0]["until done (s)"]) / float(best["until done (s)"])
        told_best = f"fastest: {best['plan']}, {gain:.2f} times as fast as one copy on all; 70B on {self.hardware}"
        return self.outcome(*rows, note=told_best)
