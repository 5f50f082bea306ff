"""Systems whose point is a bound or a size: what a step takes at least, and what must be held or sent."""

from __future__ import annotations

from workbench.cost.estimating import cost
from workbench.cost.hardware import hardware
from workbench.cost.literature.base import Outcome, System, ratio
from workbench.cost.literature.models import LLAMA2_7B, LLAMA2_13B, LLAMA_8B, QWEN3_30B_A3B, YI_34B
from workbench.parameters import param
from workbench.registry import Paper

_LAUNCH = 5e-6  # seconds of a launch outside a CUDA graph, as kernels/bench measures on an H100
_SMALL = 8  # launches of a layer beside its products and attention: norms, rotation, sums, activation


class LongContext(System):
    """Four costs that all follow from the size of the cache: reading, users at once, a step, and a switch of users."""

    key = "long-context-challenges"
    title = "Challenges of long context"
    paper = Paper(
        "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis",
        "Fu 2024",
        "2405.08944",
    )
    claim = "four costs of long contexts all follow from the size of the cache (a 34B model, 50K tokens, an A100)"

    context: int = param(50000, ge=1, unit="tokens", help="of each user")
    recipe: str = param("kivi", help="a KV method beside the uncompressed cache")
    devices: int = param(2, ge=1, help="that share the model: one does not hold it at 16 bits")

    def run(self) -> Outcome:
        rows = []
        for recipe in ("full", self.recipe):
            told = cost(YI_34B, recipe, "A100", self.context, devices=self.devices, chunk=8192)
            rows.append(
                {
                    "recipe": recipe, "reading (s)": told.prefill_s, "users": told.concurrency,
                    "step (s)": told.decode_s, "switch (s)": told.switch_s, "KV (GB)": told.memory.kv / 1e9,
                }
            )  # fmt: skip
        return self.outcome(*rows, note=f"Yi 34B on {self.devices} A100 of 80 GB, at the shares that kernels reach")


class FlashFormer(System):
    """What one kernel for a whole model could gain at batch one: launches as they come, our CUDA graph, bytes alone."""

    key = "flashformer"
    title = "FlashFormer"
    paper = Paper("FlashFormer: Whole-Model Kernels for Efficient Low-Batch Inference", "Nrusimha 2025", "2505.22758")
    claim = "nontrivial speed-ups over existing kernels, at several sizes and precisions"

    hardware: str = param("H100", help="the device")
    context: int = param(1024, ge=1, unit="tokens", help="in the cache")

    def run(self) -> Outcome:
        told = cost(LLAMA_8B, hardware=self.hardware, context=self.context)
        layers = told.architecture.facts.layers
        launches = sum(term.count for term in told.decode) + _SMALL * layers
        bound = (told.memory.weights + told.memory.kv) / told.machine.bandwidth
        steps = (
            ("eager: a launch for each operation", told.decode_s + _LAUNCH * launches),
            ("a CUDA graph", told.decode_s),
            ("bytes at the peak of the memory", bound),
        )
        rows = [{"way": way, "step (ms)": 1e3 * step, "over the bound": step / bound} for way, step in steps]
        return self.outcome(*rows, note="the kernel itself is not built: a bound, no claim")


class FlightLLM(System):
    """A model on an FPGA beside a GPU of 2018, from their memories' bandwidths and power: a profile, not a design."""

    key = "flightllm"
    title = "FlightLLM"
    paper = Paper(
        "FlightLLM: Efficient Large Language Model Inference with a Complete Mapping Flow on FPGAs",
        "Zeng 2024",
        "2401.03868",
    )
    claim = "6.0 times the energy efficiency and 1.8 times the cost efficiency of a V100S (U280)"

    context: int = param(512, ge=1, unit="tokens", help="in the cache")
    bits: float = param(3.5, gt=0, le=16, help="of a weight on the FPGA, on average: an assumption")
    reached: float = param(0.66, gt=0, le=1, help="share of the FPGA's bandwidth that is reached: assumed")
    gpu_watts: float = param(250.0, gt=0, unit="W", help="of the V100S")
    gpu_bandwidth: float = param(1134.0, gt=0, unit="GB/s", help="of the V100S")
    gpu_reached: float = param(0.425, gt=0, le=1, help="share of the GPU's bandwidth that is reached: assumed")

    def run(self) -> Outcome:
        told, card = cost(LLAMA2_7B, hardware="H100", context=self.context), hardware("U280")
        watts = card.power.plain if card.power else 0.0
        whole = told.memory.weights + told.memory.kv
        small = told.memory.weights * self.bits / 16 + told.memory.kv / 2
        steps = {
            "U280": (small / (self.reached * card.bandwidth.plain), watts),
            "V100S": (whole / (self.gpu_reached * self.gpu_bandwidth * 1e9), self.gpu_watts),
        }
        rows = [
            {"device": name, "tokens/s": 1 / step, "joules a token": step * power}
            for name, (step, power) in steps.items()
        ]
        (step, power), (other, watts) = steps.values()
        times = other * watts / (step * power)
        return self.outcome(*rows, note=f"{times:.1f} times less energy a token, at each device's full power")


class InstInfer(System):
    """Attention inside a drive beside a drive that sends its caches to the GPU: bytes over one link or the other."""

    key = "instinfer"
    title = "InstInfer"
    paper = Paper(
        "InstInfer: In-Storage Attention Offloading for Cost-Effective Long-Context LLM Inference",
        "Pan 2024",
        "2409.04992",
    )
    claim = "11.1 times the throughput of offloading to drives (13B)"

    context: int = param(8192, ge=1, unit="tokens", help="of each sequence")
    batch: int = param(32, ge=1, help="sequences, too many for the GPU")
    drives: int = param(4, ge=1, help="that share the caches")

    def run(self) -> Outcome:
        told = cost(LLAMA2_13B, hardware="L40S", context=self.context, batch=self.batch)
        plain, inside = hardware("NVMe"), hardware("CSD")
        attention = sum(term.seconds for term in told.decode if term.what.startswith("attention"))
        rest = told.decode_s - attention
        shared = told.machine.hardware.host_link
        over = max(
            told.memory.kv / (self.drives * plain.bandwidth.plain), told.memory.kv / (shared.plain if shared else 1.0)
        )
        within = told.memory.kv / (self.drives * inside.bandwidth.plain)
        row = ratio("step (s)", rest + over, rest + within)
        return self.outcome(row, note="drives are profiles; their arithmetic is taken to keep up with their flash")


class ExpertWeave(System):
    """Fine-tuned experts of many tasks beside one base model in virtual memory, and not as many whole models."""

    key = "expertweave"
    title = "ExpertWeave"
    paper = Paper(
        "ExpertWeave: Efficiently Serving Expert-Specialized Fine-Tuned Adapters at Scale", "Shi 2025", "2508.17624"
    )
    claim = "94 times the room for caches, and up to 18 % more throughput, than merged models"

    adapters: int = param(2, ge=1, help="fine-tuned sets of experts")
    tuned: float = param(0.1, gt=0, le=1, help="share of the experts that a task tunes")
    devices: int = param(2, ge=1, help="that share the model")

    def run(self) -> Outcome:
        told = cost(QWEN3_30B_A3B, hardware="H100", context=4096, devices=self.devices, chunk=2048)
        experts, held = told.architecture.expert_nbytes, told.memory.weights
        merged, woven = held * (1 + self.adapters), held + self.adapters * self.tuned * experts
        beside = told.memory.activations
        rooms = [max(told.capacity - weights - beside, 0) / 1e9 for weights in (merged, woven)]
        return self.outcome(
            {"way": "merged models", "weights (GB)": merged / 1e9, "room for caches (GB)": rooms[0]},
            {"way": "one base and adapters", "weights (GB)": woven / 1e9, "room for caches (GB)": rooms[1]},
            note=f"Qwen3 30B-A3B, {self.adapters} adapters on {self.devices} H100",
        )


class TopLoc(System):
    """What proves which model and precision answered: bytes of a locality-sensitive hash, beside the activations."""

    key = "toploc"
    title = "TOPLOC"
    paper = Paper(
        "TOPLOC: A Locality Sensitive Hashing Scheme for Trustless Verifiable Inference", "Ong 2025", "2501.16007"
    )
    claim = "which model and precision answered is proved by 258 bytes for every 32 tokens"

    tokens: int = param(1024, ge=1, help="answered")
    every: int = param(32, ge=1, unit="tokens", help="of one proof")
    top: int = param(128, ge=1, help="activations that a proof encodes, in two bytes each, with two for its modulus")

    def run(self) -> Outcome:
        hidden = int(LLAMA_8B["hidden_size"])
        raw, proof = 2 * hidden * self.tokens, -(-self.tokens // self.every) * (2 * self.top + 2)
        told = cost(LLAMA_8B, hardware="H100", context=self.tokens)
        checked = {"figure": "checking over making (s)", "without": told.decode_s * self.tokens, "with": told.prefill_s}
        return self.outcome(ratio("bytes", raw, proof), checked, note="checking reads the answer at once; sizes only")
