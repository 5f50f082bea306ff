"""Bytes: weights, caches, states, activations, and the most that is alive at once."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.cost.architecture import Architecture


@dataclass(frozen=True)
class Memory:
    """Bytes on all devices together.

    weights, kv, states: of the whole batch, while it is decoded; host: what a recipe puts into host memory.
    reading_kv: the caches while prompts are read, before they are compressed. activations: while prompts are read;
    step_activations: while a token is made. full_weights, full_kv: uncompressed.
    """

    weights: int
    kv: int
    states: int
    activations: int
    step_activations: int
    reading_kv: int
    host: int
    full_weights: int
    full_kv: int

    @property
    def reading(self) -> int:
        """The most while prompts are read."""
        return self.weights + self.reading_kv + self.states + self.activations

    @property
    def decoding(self) -> int:
        """The most while tokens are made."""
        return self.weights + self.kv + self.states + self.step_activations

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.reading, self.decoding)


def activation_nbytes(architecture: Architecture, tokens: int, sequences: int = 1) -> int:
    """Bytes that live beside weights and caches while so many tokens of each sequence go through a layer at once.

    The wider of a layer's halves: attention holds its input three times and queries four times (H, h d), a gated MLP
    its input four times and what it widens to three times (H, I), another its input twice and that five times; one
    position's logits come on top. What attention computes by blocks needs no map of all pairs.
    """
    facts, width = architecture.facts, architecture.intermediate
    hidden = facts.hidden_size
    attention = 3 * hidden + 4 * facts.heads * architecture.query_width
    mlp = 4 * hidden + 3 * width if architecture.gated else 2 * hidden + 5 * width
    itemsize = architecture.dtype.itemsize
    return sequences * (tokens * max(attention, mlp) * itemsize + facts.vocab_size * (itemsize + 4))
