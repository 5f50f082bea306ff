"""Prompts and tokens on machines of their own (Splitwise)."""

from __future__ import annotations

from workbench.cost.estimating import cost
from workbench.cost.literature.base import Outcome, System, ratio
from workbench.cost.literature.models import LLAMA_70B
from workbench.cost.serving import Lengths, Modelled, Policy, Server, Simulation, Workload, simulate
from workbench.parameters import param
from workbench.registry import Paper


class Splitwise(System):
    """Machines that read prompts send the caches to machines that make tokens: neither waits for the other's phase.

    The cache goes layer by layer while the rest is read, so that only its last layer's bytes are waited for. Token
    machines need less power: theirs is capped. Left out: the pool of machines that changes sides.
    """

    key = "splitwise"
    title = "Splitwise"
    paper = Paper("Splitwise: Efficient Generative LLM Inference Using Phase Splitting", "Patel 2023", "2311.18677")
    claim = "1.4 times the throughput at 20 % lower cost, or 2.35 times at the same cost and power"

    rate: float = param(4.0, gt=0, unit="requests/s", help="arrivals")
    requests: int = param(60, ge=2, help="how many")
    prompts: int = param(2, ge=1, unit="machines", help="that read prompts")
    tokens: int = param(2, ge=1, unit="machines", help="that make tokens")
    cap: float = param(0.7, gt=0, le=1, help="share of their power that token machines draw at most")
    seed: int = param(0, ge=0, help="of the arrivals and lengths")

    def run(self) -> Outcome:
        told = cost(LLAMA_70B, hardware="H100", context=2048, devices=8, chunk=2048)
        machine, watts = Modelled(told), 8 * (told.machine.hardware.power.plain if told.machine.hardware.power else 0.0)
        layers = told.architecture.facts.layers
        link = told.machine.hardware.device_link
        speed = 1.0 if link is None else link.plain / 9  # between machines: InfiniBand, a ninth of what is in one
        workload = Workload.poisson(
            self.rate, self.requests, Lengths(mean=1500, spread=0.8), Lengths(mean=200, spread=0.8), seed=self.seed
        )
        mixed = [
            Server(f"mixed {number}", machine, Policy(), watts=(watts, watts))
            for number in range(self.prompts + self.tokens)
        ]
        split = [
            Server(
                f"prompts {number}", machine, Policy(), frozenset({"read"}), watts=(watts, watts),
                send=lambda nbytes: nbytes / layers / speed,
            )
            for number in range(self.prompts)
        ] + [
            Server(f"tokens {number}", machine, Policy(), frozenset({"decode"}), watts=(watts, self.cap * watts))
            for number in range(self.tokens)
        ]  # fmt: skip
        before, after = simulate(mixed, workload), simulate(split, workload)
        return self.outcome(*_rows(before, after), note=f"70B on {len(mixed)} machines of eight H100, both times")


def _rows(before: Simulation, after: Simulation) -> list[dict[str, object]]:
    one, two = before.numbers(), after.numbers()
    return [
        ratio("first token, 99 % (s)", one["first_token_s"]["p99"], two["first_token_s"]["p99"]),
        ratio("between tokens, 99 % (s)", one["gap_s"]["p99"], two["gap_s"]["p99"]),
        ratio("until done, mean (s)", one["done_s"]["mean"], two["done_s"]["mean"]),
        ratio("energy (J)", one["joules"], two["joules"]),
    ]
