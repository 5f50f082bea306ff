"""One key with several values, all of which are asked for."""

from __future__ import annotations

import random
from typing import ClassVar

from workbench.examples import OBJECTS
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.haystacks import between_sentences
from workbench.tasks.kinds.needle import Needle


class MultiValue(Generated):
    """Several numbers of one thing, apart from each other in everyday sentences; all of them are asked for.

    As in RULER's `niah_multivalue`: the score is the share of the numbers that the reply contains.
    """

    key = "multi-value"
    title = "Multi-value needle"
    paper: ClassVar[Paper | None] = Needle.paper

    values: int = param(4, ge=2, le=16, help="numbers of the thing")

    def make(self, encode: Encode, seed: int) -> Case:
        draw = random.Random(f"{self.key} {self.length} {seed}")
        thing = draw.choice(OBJECTS)
        numbers = [str(number) for number in draw.sample(range(10_000, 100_000), self.values)]
        facts = [f"One of the secret numbers of the {thing} is {number}." for number in numbers]
        text = between_sentences(draw, facts, self.length, encode)
        question, lead = f"What are all the secret numbers of the {thing}?", f"The secret numbers of the {thing} are"
        return Case(text, question, tuple(numbers), lead=lead, reply_tokens=16 * self.values)
