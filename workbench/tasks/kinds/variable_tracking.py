"""Variables that are set to each other."""

from __future__ import annotations

import random
from string import ascii_uppercase
from typing import ClassVar

from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.haystacks import between_sentences
from workbench.tasks.kinds.needle import Needle

_LETTERS = 5  # of a variable's name


class VariableTracking(Generated):
    """Variables set to a value or to each other in everyday sentences; asked are all that have one value.

    As in RULER's `variable_tracking`, with its 4 hops of one chain: the score is the share of the names that the reply
    contains.
    """

    key = "variable-tracking"
    title = "Variable tracking"
    paper: ClassVar[Paper | None] = Needle.paper

    hops: int = param(4, ge=1, le=16, help="variables of a chain after the first")
    chains: int = param(1, ge=1, le=8, help="chains, of which one is asked for")

    def make(self, encode: Encode, seed: int) -> Case:
        draw = random.Random(f"{self.key} {self.length} {seed}")
        values = [str(value) for value in draw.sample(range(10_000, 100_000), self.chains)]
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(draw.choices(ascii_uppercase, k=_LETTERS))
            names += [] if name in names else [name]
        chains = [names[first :: self.chains] for first in range(self.chains)]
        facts = []
        for step in range(self.hops + 1):  # of each chain in its order, the chains in turns
            for chain, value in zip(chains, values, strict=True):
                facts.append(f"Variable {chain[step]} is {f'variable {chain[step - 1]}' if step else value}.")
        text = between_sentences(draw, facts, self.length, encode)
        question = f"Which {self.hops + 1} variables have the value {values[0]}?"
        lead = f"The {self.hops + 1} variables that have the value {values[0]} are"
        return Case(text, question, tuple(chains[0]), lead=lead, reply_tokens=10 * (self.hops + 1))
