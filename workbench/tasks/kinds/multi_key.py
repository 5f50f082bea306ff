"""Several facts alike, one of which is asked for."""

from __future__ import annotations

import random
from typing import ClassVar

from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.haystacks import between_paragraphs
from workbench.tasks.kinds.needle import Needle

NAMES = ("Ada", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Katya", "Liam")


class MultiKey(Generated):
    """The room numbers of several people in everyday sentences; one of them is asked for.

    As in RULER's `niah_multikey`. The facts come on top of `length`.
    """

    key = "multi-key"
    title = "Multi-key needle"
    paper: ClassVar[Paper | None] = Needle.paper

    people: int = param(5, ge=2, le=len(NAMES), help="people whose room is told", own="RULER has 4")

    def make(self, encode: Encode, seed: int) -> Case:
        drawn = self.length + 10_000 * seed
        draw, names = random.Random(drawn), NAMES[: self.people]
        codes = dict(zip(names, draw.sample(range(100, 1000), len(names)), strict=True))
        facts = [f"The room of {name} is number {code}." for name, code in codes.items()]
        wanted = draw.choice(names)
        text = between_paragraphs(draw, facts, self.length, drawn + 1, encode)
        question, lead = f"What is the room number of {wanted}?", f"The room of {wanted} is number"
        return Case(text, question, (str(codes[wanted]),), lead=lead)
