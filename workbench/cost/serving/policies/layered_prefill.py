"""Prompts that advance by groups of layers (layered prefill)."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.cost.serving.jobs import Job, Plan, Serving
from workbench.cost.serving.policy import Policy
from workbench.parameters import param
from workbench.registry import Paper


class LayeredPrefill(Policy):
    """A prompt goes through one group of layers in each iteration, beside decoding: a layer's experts are loaded once
    for the whole prompt, and not once for each chunk of it.
    """

    key = "layered-prefill"
    title = "Layered prefill"
    paper = Paper(
        "From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill",
        "Lee 2025",
        "2510.08055",
    )
    claim = "time to the first token 70 % shorter, latency 41 %, energy a token 22 % less, than chunked prefill"

    groups: int = param(8, ge=1, help="of layers, each an iteration of a prompt's")

    def fill(self, plan: Plan, chosen: Sequence[Job], server: Serving) -> None:
        plan.decode = [job for job in chosen if job.ready]
        reading = [job for job in chosen if not job.ready]
        plan.layered = [(job, min(1 / self.groups, 1 - job.layers)) for job in reading[:1]]
