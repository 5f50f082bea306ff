"""A value that one thing has from another."""

from __future__ import annotations

import random
from itertools import pairwise

from workbench.parameters import param
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.haystacks import between_paragraphs

_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "grey", "brown")


class Chain(Generated):
    """Boxes, each of which holds what the one before holds; asked is what the last one holds.

    The facts come on top of `length`.
    """

    key = "chain"
    title = "Chain of boxes"

    boxes: int = param(2, ge=2, le=len(_COLOURS), help="boxes in the chain")

    def make(self, encode: Encode, seed: int) -> Case:
        drawn = self.length + 10_000 * seed
        draw, colours = random.Random(drawn), _COLOURS[: self.boxes]
        value, last = str(draw.randrange(100, 1000)), colours[-1]
        facts = [f"The {colours[0]} box holds {value}."]
        facts += [f"The {box} box holds the same as the {before} box." for before, box in pairwise(colours)]
        text = between_paragraphs(draw, facts, self.length, drawn + 1, encode)
        return Case(text, f"What number does the {last} box hold?", (value,), lead=f"The {last} box holds")
