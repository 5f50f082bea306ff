"""Ready prompts: four short texts with a question, and haystacks of any length with one fact hidden in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import product

from workbench.errors import BadParameter


@dataclass(frozen=True)
class Example:
    """A prompt with a question about it.

    answer: what a right answer contains, or None where no single wording is right.
    """

    key: str
    title: str
    text: str
    question: str
    answer: str | None = None

    def answered_by(self, text: str) -> bool | None:
        """Whether `text` contains the expected answer, whatever its case; None where none is expected."""
        return None if self.answer is None else self.answer.lower() in text.lower()


# key -> title, question, answer; the texts lie beside this file
_READY = {
    "haystack": (
        "A number in a haystack (about 500 tokens)",
        "What is the secret number of the watermill?",
        "19130",
    ),
    "needle": (
        "A needle in a day by the sea (about 600 tokens)",
        "What is the secret code for the storage room under the clock tower?",
        "7391",
    ),
    "code": ("A job queue in Python (about 450 tokens)", "What is the value of MAX_ATTEMPTS in this code?", "7"),
    "dialogue": (
        "Two friends plan a trip (about 500 tokens)",
        "What is the name of the owner of the guesthouse?",
        "Halvorsen",
    ),
}


def examples() -> tuple[Example, ...]:
    """The ready examples: haystack (which the small model that ships answers too), needle, code, dialogue."""
    return tuple(example(key) for key in _READY)


def example(key: str) -> Example:
    """The ready example of this name. Raises BadParameter, naming those there are."""
    if key not in _READY:
        raise BadParameter(f"no example {key!r}: there are {', '.join(_READY)}")
    title, question, answer = _READY[key]
    text = (files("workbench") / "examples" / f"{key}.txt").read_text(encoding="utf-8").strip()
    return Example(key, title, text, question, answer)


_PARAGRAPH = 8  # sentences
_WHEN = (
    "Early in the morning",
    "Shortly before noon",
    "After the rain",
    "On the way home",
    "When the bells rang",
    "Late in the evening",
    "In the first week of spring",
    "While the kettle boiled",
    "Between two trains",
    "On a quiet Sunday",
    "As the fog lifted",
    "Long after closing time",
)
_WHO = (
    "the gardener",
    "a tired clerk",
    "the youngest sister",
    "an old sailor",
    "the bus driver",
    "a travelling tailor",
    "the head nurse",
    "a student of maps",
    "the miller",
    "the night porter",
    "a retired judge",
    "the piano teacher",
    "a glass blower",
    "the beekeeper",
)
_DID = (
    "counted the apples in the cellar",
    "wrote a long letter to a cousin",
    "painted the garden gate green",
    "watched the swallows above the roof",
    "looked for a lost button",
    "carried two buckets of water uphill",
    "learned the names of the hills",
    "folded the washing by the window",
    "played cards with the neighbours",
    "repaired the handle of a basket",
    "measured the field with a rope",
    "read the timetable twice",
    "baked a flat round loaf",
    "waited for the ferry in silence",
)
_HOW = (
    "and thought of nothing else.",
    "as if there were no hurry at all.",
    "before anyone else had noticed.",
    "and went to bed content.",
    "without saying why.",
    "just as it had always been done.",
    "and laughed about it later.",
    "while the dog slept under the bench.",
    "until the light was gone.",
    "and told nobody.",
)
OBJECTS = ("lighthouse", "observatory", "greenhouse", "boathouse", "archive", "watermill", "chapel", "quarry")


def needle(
    tokens: int = 2048, depth: float = 0.5, seed: int = 0, *, count: Callable[[str], int] | None = None
) -> Example:
    """A haystack of everyday sentences with one fact hidden in it.

    tokens: how long the text is, at most. depth: where the fact stands, from 0 (first) to 1 (last). seed: draws the
    sentences, the fact and its number; the same arguments give the same text. count: how many tokens a text has, for
    instance `lambda text: len(tokenizer(text)["input_ids"])`; without it lengths are estimated to within a tenth for
    usual English vocabularies. Raises BadParameter.
    """
    if tokens < 32:
        raise BadParameter(f"a haystack of {tokens} tokens has no room for its needle: give at least 32")
    if not 0 <= depth <= 1:
        raise BadParameter(f"depth is {depth}: give a number from 0 (the fact comes first) to 1 (last)")
    count = count or _estimate
    draw = random.Random(f"needle {seed}")
    thing, number = draw.choice(OBJECTS), draw.randrange(10_000, 100_000)
    fact = f"The secret number of the {thing} is {number}."
    room = tokens - count(fact) - 1
    hay: list[str] = []
    for sentence in _sentences(draw):
        room -= count(" " + sentence) + (len(hay) % _PARAGRAPH == 0)  # a line break is a token too
        if room < 0:
            break
        hay.append(sentence)
    hay.insert(round(depth * len(hay)), fact)
    paragraphs = (" ".join(hay[first : first + _PARAGRAPH]) for first in range(0, len(hay), _PARAGRAPH))
    return Example(
        key="needle",
        title=f"A needle at depth {depth:g} of about {tokens:,} tokens",
        text="\n\n".join(paragraphs),
        question=f"What is the secret number of the {thing}?",
        answer=str(number),
    )


def sentence(draw: random.Random) -> str:
    """One of the everyday sentences of which haystacks are made."""
    return f"{draw.choice(_WHEN)}, {draw.choice(_WHO)} {draw.choice(_DID)} {draw.choice(_HOW)}"


def _sentences(draw: random.Random) -> Iterator[str]:
    """All combinations in a random order, over and over."""
    every = list(product(_WHEN, _WHO, _DID, _HOW))
    while True:
        draw.shuffle(every)
        for when, who, did, how in every:
            yield f"{when}, {who} {did} {how}"


def _estimate(text: str) -> int:
    """Words and punctuation marks, with a margin for words of two tokens."""
    return round(1.05 * len(text.split()) + sum(text.count(mark) for mark in ",.") + sum(map(str.isdigit, text)))
