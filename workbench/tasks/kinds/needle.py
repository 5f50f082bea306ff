"""One fact hidden in a haystack."""

from __future__ import annotations

from typing import ClassVar, Literal

from workbench.examples import needle
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated


class Needle(Generated):
    """A number hidden in everyday sentences, at a depth and a length.

    As in RULER's `niah_single`: the reply must contain the number. asked="first": the question ends the text, so that
    what compresses it knows what will be asked, and nothing is asked after it.
    """

    key = "needle"
    title = "Needle"
    paper: ClassVar[Paper | None] = Paper(
        "RULER: What's the Real Context Size of Your Long-Context Language Models?", "Hsieh et al. 2024", "2404.06654"
    )

    depth: float = param(0.5, ge=0, le=1, help="where the fact stands, from 0 (first) to 1 (last)")
    asked: Literal["after", "first"] = param("after", help="after the text was compressed, or first: at its end")

    def make(self, encode: Encode, seed: int) -> Case:
        drawn = self.length + 10_000 * seed + round(100 * self.depth)
        made = needle(self.length, self.depth, seed=drawn, count=lambda text: len(encode(text)))
        lead = made.question.replace("What is the", "The").replace("?", " is")
        text, question = (made.text, made.question)
        if self.asked == "first":
            return Case(f"{text}\n\n{question}", None, (str(made.answer),), lead=lead)
        return Case(text, question, (str(made.answer),), lead=lead)
