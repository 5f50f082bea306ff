"""Systems about what a machine holds or draws: stages of their own, residency of experts, power, settings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from workbench.cost.estimating import cost
from workbench.cost.literature.base import Outcome, System, ratio
from workbench.cost.literature.models import LLAMA2_7B, LLAMA2_13B, LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B
from workbench.cost.serving import Lengths, Modelled, Policy, Server, Simulation, Workload, simulate
from workbench.parameters import param
from workbench.registry import Paper


class EPD(System):
    """Images are encoded, prompts read and tokens made on devices of their own, beside devices that do all three.

    What is encoded takes no room on the other devices. Left out: devices that change their role.
    """

    key = "epd"
    title = "EPD disaggregation"
    paper = Paper("Efficiently Serving Large Multimodal Models Using EPD Disaggregation", "Singh 2025", "2501.05460")
    claim = "15 times less peak memory, 22 times larger batches, first tokens 71 % sooner"

    rate: float = param(8.0, gt=0, unit="requests/s", help="arrivals")
    requests: int = param(60, ge=2, help="how many")
    images: int = param(4, ge=1, help="of a request")
    encoding: float = param(0.05, gt=0, unit="s", help="that an image takes: an assumption")
    devices: int = param(6, ge=3, multiple_of=3, help="a third for each stage")

    def run(self) -> Outcome:
        machine = Modelled(cost(LLAMA_8B, hardware="A100", context=4096, chunk=2048))
        lengths = Lengths(mean=2500, spread=0.3), Lengths(mean=60, spread=0.5)
        workload = Workload.poisson(self.rate, self.requests, *lengths, images=self.images)
        every = frozenset({"encode", "read", "decode"})
        mixed = [
            Server(f"device {number}", machine, Policy(), every, encoding=self.encoding)
            for number in range(self.devices)
        ]
        link = machine.cost.machine.hardware.device_link
        split = [
            Server(
                f"{stage} {number}", machine, Policy(), frozenset({stage}), encoding=self.encoding,
                send=lambda nbytes: nbytes / (link.plain if link else 1e9),
            )
            for stage in ("encode", "read", "decode")
            for number in range(self.devices // 3)
        ]  # fmt: skip
        one, two = (simulate(servers, workload).numbers() for servers in (mixed, split))
        rows = [
            ratio(f"{name} {which}", one[name][which], two[name][which])
            for name, which in (("first_token_s", "mean"), ("first_token_s", "p99"), ("gap_s", "p99"))
        ]
        return self.outcome(*rows, note=f"Llama 3.1 8B on {self.devices} A100; encoders are a time, not a model")


class EMoE(System):
    """Some experts lie on the device, the others are fetched when a token draws them: bytes held against time a step.

    hit: how often a drawn expert is there, which its predictor decides; the chance without one is the share that lies
    there.
    """

    key = "emoe"
    title = "eMoE"
    paper = Paper(
        "eMoE: Task-aware Memory Efficient Mixture-of-Experts-Based (MoE) Model Inference", "Tairin 2025", "2503.06823"
    )
    claim = "80 % less memory, 17 % less latency than fetching experts without prediction"

    resident: float = param(0.2, gt=0, le=1, help="share of the experts on the device")
    hit: float = param(0.9, ge=0, le=1, help="how often the predictor is right: measure it on your model's routing")

    def run(self) -> Outcome:
        told = cost(QWEN3_30B_A3B, hardware="H100", context=4096)
        shape, link = told.architecture, told.machine.hardware.host_link
        experts = [matrix for matrix in shape.matrices if matrix.share < 1]
        drawn = sum(matrix.read_nbytes(1) for matrix in experts)
        rows = []
        for way, resident, hit in (
            ("all on the device", 1.0, 1.0),
            ("a part, by chance", self.resident, self.resident),
            ("a part, predicted", self.resident, self.hit),
        ):
            missed = (1 - hit) * drawn / (link.plain if link else 1.0)
            held = told.memory.weights - (1 - resident) * shape.expert_nbytes
            rows.append({"experts": way, "weights (GB)": held / 1e9, "step (ms)": 1e3 * (told.decode_s + missed)})
        return self.outcome(*rows, note="Qwen3 30B-A3B on one H100; a miss waits for the link")


class Polca(System):
    """Reading draws nearly all of a machine's power and decoding less: more servers fit under one limit than their
    peaks allow, if those that go over it are slowed down.
    """

    key = "polca"
    title = "POLCA"
    paper = Paper("POLCA: Power Oversubscription in LLM Cloud Providers", "Patel 2023", "2308.12908")
    claim = "30 % more servers in the same cluster with hardly any slowed down"

    servers: int = param(10, ge=1, help="that the limit allows at their peak")
    more: float = param(0.3, ge=0, help="share of servers that are added")
    decoding: float = param(0.6, gt=0, le=1, help="share of its peak that a decoding machine draws: an assumption")
    rate: float = param(1.0, gt=0, unit="requests/s", help="arrivals at each server")
    requests: int = param(40, ge=2, help="at each server")

    def run(self) -> Outcome:
        machine = Modelled(cost(LLAMA_8B, hardware="A100", context=2048, chunk=2048))
        rows = []
        for added in (0.0, self.more):
            count = round(self.servers * (1 + added))
            lengths = Lengths(mean=1500, spread=1), Lengths(mean=150, spread=1)
            runs = [
                simulate(machine, Workload.poisson(self.rate, self.requests, *lengths, seed=seed))
                for seed in range(count)
            ]
            shares = _power(runs, self.decoding)
            over = sum(share > self.servers for share in shares) / len(shares)
            rows.append(
                {
                    "servers": count,
                    "mean power": sum(shares) / len(shares) / self.servers,
                    "most": max(shares) / self.servers,
                    "time over the limit": over,
                }
            )
        return self.outcome(*rows, note="power over that of all servers' peaks; time over it is slowed down")


def _power(runs: Sequence[Simulation], decoding: float, steps: int = 400) -> list[float]:
    """At moments of the time in which all are busy: servers' draw, each 1 at its peak."""
    frames = [run.iterations for run in runs]
    until = min(iterations[-1].end for iterations in frames)
    found = []
    for step in range(steps):
        at, total = until * (step + 0.5) / steps, 0.0
        for iterations in frames:
            now = next((each for each in iterations if each.start <= at < each.end), None)
            total += 0.2 if now is None else 1.0 if now.reading else decoding
        found.append(total)
    return found


class ServingSettings(System):
    """Every pair of a batch and a chunk, on one workload: what tuning a server's settings can give."""

    key = "serving-hyperparameters"
    title = "Settings of a server"
    paper = Paper(
        "The Impact of Hyperparameters on Large Language Model Inference Performance: An Evaluation of vLLM and "
        "HuggingFace Pipelines",
        "Martinez 2024",
    )
    claim = "9.16 % and 13.7 % more throughput by tuning alone"

    rate: float = param(8.0, gt=0, unit="requests/s", help="arrivals")
    requests: int = param(60, ge=2, help="how many")

    def run(self) -> Outcome:
        machine = Modelled(cost(LLAMA_8B, hardware="L40S", context=2048, chunk=2048))
        lengths = Lengths(mean=1000, spread=1), Lengths(mean=150, spread=1)
        workload = Workload.poisson(self.rate, self.requests, *lengths)
        rows = []
        for batch, chunk in product((8, 32, 128), (256, 1024, None)):
            done = simulate(machine, workload, Policy(batch=batch, chunk=chunk)).numbers()
            rows.append(
                {
                    "batch": batch,
                    "chunk": chunk or "whole prompts",
                    "tokens/s": done["tokens_per_s"],
                    "first token, 99 % (s)": done["first_token_s"]["p99"],
                    "gap, 99 % (s)": done["gap_s"]["p99"],
                }
            )
        return self.outcome(*rows, note="Llama 3.1 8B on one L40S")


class RuntimeDissection(System):
    """Steps and reading of 7 to 70 billion weights on three kinds of eight devices."""

    key = "runtime-dissection"
    title = "Dissection of runtimes"
    paper = Paper(
        "Dissecting the Runtime Performance of the Training, Fine-tuning, and Inference of Large Language Models",
        "Zhang 2023",
        "2311.03687",
    )
    claim = "a study: 7 to 70B on three platforms of eight GPUs"

    context: int = param(1024, ge=1, unit="tokens", help="of each sequence")
    batch: int = param(32, ge=1, help="sequences")

    def run(self) -> Outcome:
        rows = []
        for (name, sizes), device in product(
            (("7B", LLAMA2_7B), ("13B", LLAMA2_13B), ("70B", LLAMA_70B)), ("A100", "L40S", "RTX-4090")
        ):
            told = cost(sizes, hardware=device, context=self.context, batch=self.batch, devices=8)
            rows.append(
                {
                    "model": name,
                    "eight of": device,
                    "fits": told.fits,
                    "reading (s)": told.prefill_s,
                    "tokens/s": told.tokens_per_s,
                }
            )
        return self.outcome(*rows, note="devices without a link of their own exchange sums over PCIe")


class IdealizedRuntime(System):
    """How long a request takes alone on uniform hardware, beside what it takes where others wait with it."""

    key = "idealized-runtime"
    title = "Idealised runtime"
    paper = Paper(
        "Cheaply Evaluating Inference Efficiency Metrics for Autoregressive Transformer APIs",
        "Narayanan 2023",
        "2305.02440",
    )
    claim = "runtimes of services are compared on equal hardware, without contention"

    rate: float = param(3.0, gt=0, unit="requests/s", help="arrivals")
    requests: int = param(60, ge=2, help="how many")

    def run(self) -> Outcome:
        machine = Modelled(cost(LLAMA_8B, hardware="A100", context=2048, chunk=2048))
        lengths = Lengths(mean=1000, spread=1), Lengths(mean=150, spread=1)
        workload = Workload.poisson(self.rate, self.requests, *lengths)
        shared = simulate(machine, workload).requests()["done_s"]
        alone = [
            machine.iteration(0, 0, [(each.prompt, 0)])
            + sum(machine.iteration(1, each.prompt + made) for made in range(1, each.output))
            for each in workload.requests
        ]
        times = [with_others / by_itself for with_others, by_itself in zip(shared, alone, strict=True)]
        return self.outcome(
            {"figure": "until done, mean (s)", "alone": sum(alone) / len(alone), "with others": float(shared.mean())},
            {"figure": "with others over alone", "mean": sum(times) / len(times), "most": max(times)},
            note="Llama 3.1 8B on one A100",
        )
