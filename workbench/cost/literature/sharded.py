"""Attention over a text that lies on several devices: what the exchange takes, for as many devices as there are.

The same attention runs for real, and is the same as on one device: `workbench.core.sequence_parallel`.
"""

from __future__ import annotations

from typing import Any

from workbench.attention.base import visible_entries
from workbench.core.sequence_parallel import ring_numbers, tree_numbers
from workbench.cost.estimating import cost
from workbench.cost.kernels import kernel
from workbench.cost.literature.base import Outcome, System
from workbench.cost.literature.models import LLAMA_8B
from workbench.cost.times import LINK_LATENCY
from workbench.parameters import param
from workbench.registry import Paper


class _Sharded(System):
    """What both have: a text on devices with links between them."""

    hardware: str = param("H100", help="the kind of device")
    context: int = param(131072, ge=1, unit="tokens", help="of the text")
    most: int = param(8, ge=2, help="devices: 2, 4, 8, ... up to so many")

    def devices(self) -> list[int]:
        """Powers of two."""
        return [2**power for power in range(1, self.most.bit_length())]


class TreeAttention(_Sharded):
    """A decode step's attention by a tree, which exchanges what softmaxes came to, beside a ring of keys and values."""

    key = "tree-attention"
    title = "Tree attention"
    paper = Paper(
        "Tree Attention: Topology-Aware Decoding for Long-Context Attention on GPU Clusters", "Shyam 2024", "2408.04093"
    )
    claim = "up to 8 times faster decoding than a ring, with half its peak memory"

    def run(self) -> Outcome:
        told = cost(LLAMA_8B, hardware=self.hardware, context=self.context)
        facts, device, timed = told.architecture.facts, told.machine.hardware, kernel("attention")
        link = device.device_link.plain if device.device_link else 1e9
        rows: list[dict[str, Any]] = []
        for count in self.devices():
            part = self.context // count
            nbytes = 4 * part * facts.kv_heads * facts.head_dim
            local = timed.seconds(nbytes, 0.0, device.bandwidth.plain, 1.0)
            sent = 2 * ring_numbers(facts.kv_heads, part, count, facts.head_dim, facts.head_dim)
            step = LINK_LATENCY + sent / (count - 1) / link
            ring = local + (count - 1) * max(local, step)
            numbers = 4 * tree_numbers(facts.heads, 1, facts.head_dim)
            rounds = 2 * (count - 1).bit_length()  # up and down, twice: maxima, then sums
            tree = local + 2 * rounds * (LINK_LATENCY + numbers / link)
            rows.append(
                {
                    "devices": count,
                    "ring (us)": 1e6 * ring,
                    "tree (us)": 1e6 * tree,
                    "times": ring / tree,
                    "ring sends (MB)": sent / 1e6,
                    "tree sends (MB)": numbers / 1e6,
                }
            )
        return self.outcome(*rows, note=f"a layer of Llama 3.1 8B, {self.context:,} tokens on {self.hardware}")


class BurstAttention(_Sharded):
    """A prompt's attention round a ring whose transfers run beside the computation, and one after the other."""

    key = "burst-attention"
    title = "BurstAttention"
    paper = Paper(
        "BurstAttention: An Efficient Distributed Attention Framework for Extremely Long Sequences",
        "Sun 2024",
        "2403.09347",
    )
    claim = "40 % less communication, and twice the training speed at 32K tokens on 8 A100"

    hardware: str = param("A100", help="the kind of device")
    context: int = param(32768, ge=1, unit="tokens", help="of the text")

    def run(self) -> Outcome:
        told = cost(LLAMA_8B, hardware=self.hardware, context=self.context)
        facts, device, timed = told.architecture.facts, told.machine.hardware, kernel("attention")
        link = device.device_link.plain if device.device_link else 1e9
        operations = 4.0 * visible_entries(self.context) * facts.heads * facts.head_dim
        rows = []
        for count in self.devices():
            nbytes = 2 * ring_numbers(facts.kv_heads, self.context // count, count, facts.head_dim, facts.head_dim)
            computing = operations / count / (timed.compute * device.peak("bfloat16").plain)
            moving = (count - 1) * LINK_LATENCY + nbytes / link
            rows.append(
                {
                    "devices": count,
                    "one after the other (us)": 1e6 * (computing + moving),
                    "beside each other (us)": 1e6 * max(computing, moving),
                    "times": (computing + moving) / max(computing, moving),
                }
            )
        return self.outcome(*rows, note="a layer of Llama 3.1 8B, forward; causal work is taken to be shared evenly")
