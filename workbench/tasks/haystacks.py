"""Facts hidden among everyday sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence

from workbench.errors import BadParameter
from workbench.examples import needle, sentence
from workbench.tasks.base import Encode

_PARAGRAPH = 8  # sentences


def between_paragraphs(draw: random.Random, facts: Sequence[str], length: int, seed: int, encode: Encode) -> str:
    """A haystack of about `length` tokens with facts, in their order, as paragraphs at random places in it."""
    hay = needle(length, 0.5, seed=seed, count=lambda text: len(encode(text))).text.split("\n\n")
    paragraphs = [paragraph for paragraph in hay if "secret number" not in paragraph]  # without the needle's own
    places = sorted(draw.choices(range(len(paragraphs) + 1), k=len(facts)))
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        paragraphs.insert(place, fact)
    return "\n\n".join(paragraphs)


def between_sentences(draw: random.Random, facts: Sequence[str], length: int, encode: Encode) -> str:
    """Facts, in their order, at random places between sentences: at most `length` tokens. Raises BadParameter."""
    hay = filling(draw, length - sum(len(encode(f" {fact}")) for fact in facts), encode)
    if len(hay) < len(facts):
        raise BadParameter(f"length is {length}: too few tokens to hide {len(facts)} facts in; give more")
    places = sorted(draw.sample(range(len(hay) + 1), len(facts)))
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        hay.insert(place, fact)
    return "\n\n".join(" ".join(hay[first : first + _PARAGRAPH]) for first in range(0, len(hay), _PARAGRAPH))


def filling(draw: random.Random, room: int, encode: Encode) -> list[str]:
    """Everyday sentences of at most `room` tokens together."""
    hay: list[str] = []
    while True:
        more = sentence(draw)
        room -= len(encode(f" {more}")) + (len(hay) % _PARAGRAPH == 0)  # a line break is a token too
        if room < 0:
            return hay
        hay.append(more)
