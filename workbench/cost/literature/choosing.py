"""Systems that choose for each question: which acceleration, or which of two models."""

from __future__ import annotations

from itertools import product
from math import log
from statistics import mean

from workbench.cost.estimating import cost
from workbench.cost.literature.base import Outcome, System, ratio
from workbench.cost.literature.models import LLAMA_1B, LLAMA_8B, LLAMA_70B
from workbench.parameters import param
from workbench.recipe import Spec
from workbench.registry import Paper

_WAYS: dict[str, Spec] = {"none": "full", "KIVI": "kivi", "4-bit weights": "rtn", "both": ["rtn", "kivi"]}
_ANSWERS = (4, 32, 256, 2048)  # tokens
_BATCHES = (1, 16)

Features = tuple[int, int, int]
"""Tokens of a prompt, sequences, tokens of an answer."""


class MetaAccel(System):
    """An acceleration for each task by the one that was fastest on the known task whose features are nearest, beside
    one for all tasks, chance, and trying all. Each task is held out in turn.

    Times are estimates. Left out: learned embeddings of models, devices and data; features are three lengths here.
    """

    key = "meta-accel"
    title = "Meta-learned acceleration"
    paper = Paper(
        "Meta-Learning for Speeding Up Large Model Inference in Decentralized Environments", "Du 2025", "2508.09194"
    )
    claim = "the acceleration that is chosen by a task's features is better than one chosen at random or by experts"

    hardware: str = param("H100", help="the device")
    short: int = param(512, ge=1, unit="tokens", help="of the shorter prompts")
    long: int = param(16384, ge=1, unit="tokens", help="of the longer prompts")

    def run(self) -> Outcome:
        seconds: dict[Features, dict[str, float]] = {}
        for context, batch in product((self.short, self.long), _BATCHES):
            told = {
                way: cost(LLAMA_8B, recipe, self.hardware, context, batch, chunk=2048) for way, recipe in _WAYS.items()
            }
            for answer in _ANSWERS:
                seconds[context, batch, answer] = {
                    way: each.prefill_s + answer * each.decode_s for way, each in told.items()
                }
        over = {
            task: {way: value / min(times.values()) for way, value in times.items()} for task, times in seconds.items()
        }
        chosen: dict[str, list[float]] = {"trying all": [], "the nearest known task": [], "one for all tasks": []}
        chosen["chance"] = []
        for task, times in over.items():
            known = {each: found for each, found in over.items() if each != task}
            nearest = min(known, key=lambda each: _apart(each, task))
            one = min(_WAYS, key=lambda way: mean(found[way] for found in known.values()))
            chosen["trying all"].append(min(times.values()))
            chosen["the nearest known task"].append(times[min(known[nearest], key=known[nearest].__getitem__)])
            chosen["one for all tasks"].append(times[one])
            chosen["chance"].append(mean(times.values()))
        rows = [{"chosen by": by, "times the fastest": mean(found)} for by, found in chosen.items()]
        said = f"{len(over)} tasks on Llama 3.1 8B and {self.hardware}; {', '.join(_WAYS)}; means over tasks"
        return self.outcome(*rows, note=said)


def _apart(one: Features, two: Features) -> float:
    """How unlike two tasks are: the squared distance of their features' logarithms."""
    return sum(log(a / b) ** 2 for a, b in zip(one, two, strict=True))


class Crayon(System):
    """A small model on a device, with an adapter blended from a pool, beside a large one on a server that takes a share
    of the questions. What is held, and what an answer takes.

    A blend is a sum of adapters: it is made once for a user, without training, and the server holds nothing of a user.
    Left out: which questions are hard, and so how right answers are.
    """

    key = "crayon"
    title = "Crayon"
    paper = Paper(
        "Crayon: Customized On-Device LLM via Instant Adapter Blending and Edge-Server Hybrid Inference",
        "Bang 2024",
        "2406.07007",
    )
    claim = (
        "a device's model is fitted to a user at once by blending adapters; a server answers what is too hard for it"
    )

    device: str = param("M4-Max", help="on which the small model runs")
    server: str = param("H100", help="on which the large model runs")
    devices: int = param(4, ge=1, help="that share the large model")
    prompt: int = param(512, ge=1, unit="tokens", help="of a question")
    answer: int = param(64, ge=1, help="tokens of an answer")
    rank: int = param(8, ge=1, help="of an adapter, on queries and values")
    pool: int = param(20, ge=1, help="adapters that are blended")

    def run(self) -> Outcome:
        small = cost(LLAMA_1B, hardware=self.device, context=self.prompt)
        large = cost(LLAMA_70B, hardware=self.server, context=self.prompt, devices=self.devices)
        here, there = (each.prefill_s + self.answer * each.decode_s for each in (small, large))
        rows = [
            {
                "to the server": share,
                "seconds an answer": (1 - share) * here + share * there,
                "server seconds an answer": share * there,
            }
            for share in (0.0, 0.1, 0.3, 1.0)
        ]
        facts = small.architecture.facts
        hidden, rows_of_values = int(LLAMA_1B["hidden_size"]), facts.kv_heads * facts.head_dim
        sizes = (hidden + facts.heads * facts.head_dim) + (hidden + rows_of_values)
        adapter = 2 * facts.layers * self.rank * sizes
        return self.outcome(
            *rows,
            ratio("adapters on the device (MB)", self.pool * adapter / 1e6, adapter / 1e6),
            {"figure": "a user's own weights on a server (MB)", "without": small.memory.weights / 1e6, "with": 0.0},
            note=f"Llama 3.2 1B on {self.device}, Llama 3.1 70B on {self.devices} {self.server}, one question at a "
            "time; without: all of the pool, and a model for each user",
        )
