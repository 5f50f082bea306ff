"""Fine-tuning in what serving leaves over (FlexLLM)."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.cost.serving.jobs import Job, Plan, Serving
from workbench.cost.serving.policy import Policy
from workbench.parameters import param
from workbench.registry import Paper

_BACKWARD = 2.0  # operations of a backward pass over those of a forward one


class FlexLLM(Policy):
    """Tokens of a fine-tuning batch join each iteration, as many as the time between tokens that was promised allows.

    `tuned` counts them on the way: forward, and twice as much backward. What its compiler saves is no part of this.
    """

    key = "flexllm"
    title = "FlexLLM"
    paper = Paper(
        "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient Finetuning",
        "Miao 2024",
        "2402.18789",
    )
    claim = "over 80 % of the peak fine-tuning throughput, and 8 times less activation memory"

    promised: float = param(0.05, gt=0, unit="s", help="between two tokens of a request")
    most: int = param(2048, ge=1, unit="tokens", help="of fine-tuning in an iteration")
    chunk: int | None = param(512, help="tokens of prompts read in an iteration beside decoding")

    def fill(self, plan: Plan, chosen: Sequence[Job], server: Serving) -> None:
        super().fill(plan, chosen, server)
        plan.extra = self.tuned(plan, server) * self._each(server)

    def tuned(self, plan: Plan, server: Serving) -> int:
        """Fine-tuning tokens that fit beside an iteration."""
        reading = [(tokens, job.read) for job, tokens in plan.read]
        taken = server.times.iteration(len(plan.decode), sum(job.held for job in plan.decode), reading)
        return max(min(int((self.promised - taken) / self._each(server)), self.most), 0)

    def _each(self, server: Serving) -> float:
        """Seconds of a fine-tuning token, once an iteration is full."""
        return (1 + _BACKWARD) * server.times.iteration(0, 0, [(self.most, 0)]) / self.most
