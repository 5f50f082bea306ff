"""What the KV methods are asked: needles, one of many keys, a chain of variables, and held texts to go on with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.examples import examples, needle

DEPTHS = (0.1, 0.5, 0.9)
ASKED_LATER = ("needle", "multi-key", "variables")  # the question comes after compression
ASKED_FIRST = "asked first"  # a needle whose question ends the text that is compressed
HELD = "held text"
TASKS = (*ASKED_LATER, ASKED_FIRST, HELD)
HELD_TOKENS = 64  # how much of a held text is predicted
_NAMES = ("Ada", "Boris", "Clara", "Dmitri", "Elena")


@dataclass(frozen=True)
class Spec:
    """One case, from which `build` makes the same text every time. depth: of the needle. draw: which of many alike."""

    task: str
    length: int
    depth: float | None = None
    draw: int = 0

    @property
    def key(self) -> str:
        depth = "" if self.depth is None else f"/{self.depth:g}"
        return f"{self.task}/{self.length}{depth}/{self.draw}"


@dataclass(frozen=True)
class Case:
    """A text, a question asked after compression (None: go on), the beginning of the reply, and the right answer."""

    text: str
    question: str | None
    lead: str
    answer: str


def specs(tasks: Sequence[str], lengths: Sequence[int], draws: int) -> list[Spec]:
    """All cases, in an order in which every beginning is balanced: draw by draw, and in each the short texts first."""
    found = []
    for draw in range(draws):
        for length in lengths:
            for task in tasks:
                if task in ("needle", ASKED_FIRST):
                    found += [Spec(task, length, depth, draw) for depth in DEPTHS]
                elif task != HELD or (length <= 1024 and draw < len(examples())):  # no ready text is longer
                    found.append(Spec(task, length, None, draw))
    return found


def build(spec: Spec, count: Callable[[str], int]) -> Case:
    """The text of a case that is not a held text. count: how many tokens a text has."""
    if spec.task in ("needle", ASKED_FIRST):
        depth = 0.5 if spec.depth is None else spec.depth
        made = needle(spec.length, depth, seed=_seed(spec), count=count)
        lead = made.question.replace("What is the", "The").replace("?", " is")
        if spec.task == ASKED_FIRST:
            return Case(f"{made.text}\n\n{made.question}", None, lead, str(made.answer))
        return Case(made.text, made.question, lead, str(made.answer))
    draw = random.Random(_seed(spec))
    hay = needle(spec.length, 0.5, seed=_seed(spec) + 1, count=count).text.split("\n\n")
    paragraphs = [paragraph for paragraph in hay if "secret number" not in paragraph]  # without the needle's own
    if spec.task == "multi-key":
        codes = dict(zip(_NAMES, draw.sample(range(100, 1000), len(_NAMES)), strict=True))
        facts = [f"The room of {name} is number {code}." for name, code in codes.items()]
        wanted = draw.choice(_NAMES)
        question, lead = f"What is the room number of {wanted}?", f"The room of {wanted} is number"
        return Case(_mixed(draw, paragraphs, facts), question, lead, str(codes[wanted]))
    value = str(draw.randrange(100, 1000))
    chain = [f"The red box holds {value}.", "The blue box holds the same as the red box."]
    text = _mixed(draw, paragraphs, chain)
    return Case(text, "What number does the blue box hold?", "The blue box holds", value)


def held_text(draw: int) -> str:
    """The ready texts in one, beginning with another one for each draw."""
    texts = [example.text for example in examples()]
    return "\n\n".join(texts[draw:] + texts[:draw])


def _seed(spec: Spec) -> int:
    return spec.length + 10_000 * spec.draw + (0 if spec.depth is None else round(100 * spec.depth))


def _mixed(draw: random.Random, paragraphs: list[str], facts: list[str]) -> str:
    """The facts, in their order, at random places between paragraphs."""
    out = list(paragraphs)
    places = sorted(draw.choices(range(len(paragraphs) + 1), k=len(facts)))
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        out.insert(place, fact)
    return "\n\n".join(out)
