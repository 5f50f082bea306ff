"""Systems that are a policy on one machine: each beside the policy that its paper compares it with."""

from __future__ import annotations

from typing import ClassVar

from workbench.cost.estimating import cost
from workbench.cost.literature.base import Outcome, System, ratio
from workbench.cost.literature.models import LLAMA2_13B, LLAMA_8B, QWEN3_30B_A3B
from workbench.cost.serving import (
    Alise,
    FastSwitch,
    FlexLLM,
    LayeredPrefill,
    Lengths,
    Modelled,
    Policy,
    Simulation,
    Workload,
    simulate,
)
from workbench.parameters import param

_FIGURES = (("first_token_s", "mean"), ("first_token_s", "p99"), ("gap_s", "p99"), ("done_s", "mean"))


class PolicyStudy(System):
    """What the systems of this file share: a workload, and one policy after another on it."""

    rate: float = param(4.0, gt=0, unit="requests/s", help="arrivals")
    requests: int = param(60, ge=2, help="how many")
    seed: int = param(0, ge=0, help="of the arrivals and lengths")
    reads: ClassVar[int] = 1000  # tokens of a prompt, on average
    makes: ClassVar[int] = 150

    def workload(self) -> Workload:
        """Of lengths that vary as much as their mean."""
        prompts, outputs = Lengths(mean=self.reads, spread=1), Lengths(mean=self.makes, spread=1)
        return Workload.poisson(self.rate, self.requests, prompts, outputs, seed=self.seed)


def _compared(before: Simulation, after: Simulation) -> list[dict[str, object]]:
    one, two = before.numbers(), after.numbers()
    return [ratio(f"{name} {which}", one[name][which], two[name][which]) for name, which in _FIGURES]


class LayeredPrefillStudy(PolicyStudy):
    """Layered prefill beside chunked prefill on a mixture of experts: how often experts are read, and what it takes."""

    key = LayeredPrefill.key
    title, paper, claim = LayeredPrefill.title, LayeredPrefill.paper, LayeredPrefill.claim
    reads: ClassVar[int] = 4000

    chunk: int = param(512, ge=1, unit="tokens", help="of chunked prefill")
    groups: int = param(8, ge=1, help="of layers")
    rate: float = param(2.0, gt=0, unit="requests/s", help="arrivals")

    def run(self) -> Outcome:
        told = cost(QWEN3_30B_A3B, hardware="H100", context=8192, chunk=8192)
        machine, workload = Modelled(told), self.workload()
        before = simulate(machine, workload, Policy(chunk=self.chunk))
        after = simulate(machine, workload, LayeredPrefill(groups=self.groups))
        experts, prompts = told.architecture.expert_nbytes, [each.prompt for each in workload.requests]
        chunks = sum(-(-prompt // self.chunk) for prompt in prompts)
        moved = ratio("experts read for prompts (GB)", chunks * experts / 1e9, len(prompts) * experts / 1e9)
        return self.outcome(*_compared(before, after), moved, note="Qwen3 30B-A3B on one H100")


class AliseStudy(PolicyStudy):
    """ALISE beside first come, first served, where caches do not all fit."""

    key = Alise.key
    title, paper, claim = Alise.title, Alise.paper, Alise.claim
    rate: float = param(12.0, gt=0, unit="requests/s", help="arrivals")
    error: float = param(0.3, ge=0, help="standard deviation of the logarithm of a predicted length")

    def run(self) -> Outcome:
        machine, workload = Modelled(cost(LLAMA2_13B, hardware="A100-40", context=2048, chunk=2048)), self.workload()
        before, after = simulate(machine, workload, Policy()), simulate(machine, workload, Alise(error=self.error))
        return self.outcome(*_compared(before, after), note="Llama 2 13B on one A100 of 40 GB")


class FastSwitchStudy(PolicyStudy):
    """FastSwitch beside the same priorities swapped block by block."""

    key = FastSwitch.key
    title, paper, claim = FastSwitch.title, FastSwitch.paper, FastSwitch.claim
    rate: float = param(12.0, gt=0, unit="requests/s", help="arrivals")
    every: float = param(1.0, gt=0, unit="s", help="between two draws of priorities")

    def run(self) -> Outcome:
        machine, workload = Modelled(cost(LLAMA2_13B, hardware="A100-40", context=2048, chunk=2048)), self.workload()
        plain = FastSwitch(every=self.every, grouped=1, overlap=False, reuse=False)
        before, after = simulate(machine, workload, plain), simulate(machine, workload, FastSwitch(every=self.every))
        stalls = [sum(each.stall for each in done.iterations) for done in (before, after)]
        stalled = ratio("stalled by swaps (s)", *stalls)
        return self.outcome(*_compared(before, after), stalled, note="Llama 2 13B on one A100 of 40 GB")


class FlexLLMStudy(PolicyStudy):
    """FlexLLM: fine-tuning tokens that serving leaves time for, beside a machine that does nothing else."""

    key = FlexLLM.key
    title, paper, claim = FlexLLM.title, FlexLLM.paper, FlexLLM.claim
    requests: int = param(30, ge=2, help="how many")
    promised: float = param(0.05, gt=0, unit="s", help="between two tokens of a request")

    def run(self) -> Outcome:
        machine, policy = (
            Modelled(cost(LLAMA_8B, hardware="A100", context=2048, chunk=2048)),
            FlexLLM(promised=self.promised),
        )
        done = simulate(machine, self.workload(), policy)
        alone = policy.most / (3 * machine.iteration(0, 0, [(policy.most, 0)]))
        busy = sum(each.end - each.start for each in done.iterations)
        served = sum(
            machine.iteration(
                each.decoding, round(each.held / machine.nbytes(1)), [(each.reading, 0)] if each.reading else []
            )
            for each in done.iterations
        )
        share = max(busy - served, 0.0) / busy
        gaps = done.numbers()["gap_s"]["p99"]
        return self.outcome(
            {"figure": "fine-tuning tokens/s", "alone": alone, "beside serving": share * alone, "share": share},
            {"figure": "between tokens, 99 % (s)", "promised": self.promised, "given": gaps},
            note="Llama 3.1 8B on one A100, while there is something to serve; what is compiled away is not modelled",
        )
