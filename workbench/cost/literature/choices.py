"""Systems that choose: which acceleration a task gets, and whether a device or a server answers."""

from __future__ import annotations

from itertools import product

import numpy as np

from workbench.cost.estimate import Cost
from workbench.cost.estimating import cost
from workbench.cost.hardware import hardware
from workbench.cost.literature.base import Outcome, System
from workbench.cost.literature.models import LLAMA2_7B, LLAMA_8B
from workbench.parameters import param
from workbench.registry import Paper

_WAYS = ("full", "rtn", "kivi")
_DEVICES = ("H100", "H200", "A100-80", "L40S")
_LORA = 2 * 4 * 2 * 2  # matrices, in all four projections of attention, of two factors, bytes of a number


class MetaInf(System):
    """Pick the acceleration of each task by what was learnt from tasks on other devices, and not one for all.

    Tasks are two models at two contexts and two batches on four devices, times those of estimates. What is learnt is a
    line through the logarithms of a task's features (parameters, context, batch, bandwidth, arithmetic) to that of the
    time under each way, for each device from the three others.
    """

    key = "meta-accel"
    title = "MetaInf"
    paper = Paper(
        "Meta-Learning for Speeding Up Large Model Inference in Decentralized Environments", "Du 2024", "2410.21340"
    )
    claim = "picks the acceleration that suits a task better than one for all, at little cost"

    reply: int = param(256, ge=1, unit="tokens", help="of each answer")
    models: int = param(2, ge=1, le=2, help="Llama 3.1 8B, and Llama 2 7B")

    def run(self) -> Outcome:
        tasks = list(product((LLAMA_8B, LLAMA2_7B)[: self.models], (512, 4096), (1, 16), _DEVICES))
        told = [[cost(model, way, device, context, batch) for way in _WAYS] for model, context, batch, device in tasks]
        seconds = np.array([[self._seconds(each) for each in row] for row in told])
        features = np.array([_features(row[0]) for row in told])
        places = np.array([_DEVICES.index(task[3]) for task in tasks])
        chosen = np.empty(len(tasks), dtype=int)
        for place in range(len(_DEVICES)):
            known, asked = places != place, places == place
            weights = np.linalg.lstsq(features[known], np.log(seconds[known]), rcond=None)[0]
            chosen[asked] = (features[asked] @ weights).argmin(axis=1)
        best = seconds.min(axis=1).sum()
        one = int(seconds.sum(axis=0).argmin())
        sums = {
            "the best of each, known beforehand": best,
            "chosen by what was learnt": seconds[np.arange(len(tasks)), chosen].sum(),
            f"one for all: {_WAYS[one]}": seconds[:, one].sum(),
            "none": seconds[:, 0].sum(),
        }
        rows = [{"way": way, "all tasks (s)": float(sum_), "over the best": float(sum_ / best)}
                for way, sum_ in sums.items()]  # fmt: skip
        right = float((chosen == seconds.argmin(axis=1)).mean())
        return self.outcome(*rows, note=f"{len(tasks)} tasks, {right:.0%} chosen as the best; quality is not modelled")

    def _seconds(self, told: Cost) -> float:
        return told.prefill_s + self.reply * told.decode_s


def _features(told: Cost) -> list[float]:
    device = told.machine.hardware
    figures = (
        told.memory.full_weights,
        told.context,
        told.batch,
        device.bandwidth.plain,
        device.peak(told.machine.dtype).plain,
        told.memory.full_kv / told.memory.full_weights,
    )
    return [1.0, *np.log(np.array(figures, dtype=float))]


class Crayon(System):
    """A model on the device with adapters blended for its user, which leaves hard questions to a server.

    The device blends ready adapters by weights into one, once for each user, and asks the server for the share of
    questions that it is unsure of.
    """

    key = "crayon"
    title = "Crayon"
    paper = Paper(
        "Crayon: Customized On-Device LLM via Instant Adapter Blending and Edge-Server Hybrid Inference",
        "Bang 2024",
        "2406.07007",
    )
    claim = "an adapter of one's own without training, and the server's quality for a part of its use"

    adapters: int = param(8, ge=1, help="ready adapters that are blended")
    rank: int = param(16, ge=1, help="of an adapter")
    routed: float = param(0.3, ge=0, le=1, help="share of questions that the server answers: an assumption")
    device: str = param("M3-Max", help="what the user has")
    context: int = param(1024, ge=1, unit="tokens", help="of a question")
    reply: int = param(128, ge=1, unit="tokens", help="of an answer")
    link_s: float = param(0.1, ge=0, unit="s", help="to the server and back")

    def run(self) -> Outcome:
        here = cost(LLAMA2_7B, "rtn", self.device, self.context)
        there = cost(LLAMA_8B, hardware="H100", context=self.context)
        own = here.prefill_s + self.reply * here.decode_s
        asked = self.link_s + there.prefill_s + self.reply * there.decode_s
        facts = here.architecture.facts
        adapter = _LORA * self.rank * facts.hidden_size * facts.layers
        blending = self.adapters * adapter / hardware(self.device).bandwidth.plain
        shares = {"the device alone": 0.0, "both": self.routed, "the server alone": 1.0}
        rows = [
            {
                "who answers": who, "an answer (s)": (1 - share) * own + share * asked,
                "server's time an answer (s)": share * (asked - self.link_s),
            }
            for who, share in shares.items()
        ]  # fmt: skip
        note = (
            f"{self.adapters} adapters of {adapter / 1e6:.0f} MB are blended in {1e3 * blending:.1f} ms at the peak of "
            "the memory; which answers are better is not modelled"
        )
        return self.outcome(*rows, note=note)
