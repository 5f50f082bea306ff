"""What was said long ago in a conversation of many turns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

from workbench.errors import BadParameter
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.scoring import Scorer

_TURNS = 12  # of one day
_BETWEEN = 3  # turns of small talk, at most, between things that can be asked
_MONTHS = ("March", "April", "May", "June", "July", "August", "September", "October")
_SPEAKERS = ("Nora", "Tom", "Mira", "Jack", "Lena", "Paul", "Rita", "Sven")
_TALK = (
    ("How was the {what}?", "The {what} was {how}, thanks for asking."),
    ("Did you like the {what}?", "Honestly, the {what} was {how}."),
    ("I still think about the {what}.", "Me too, it was {how}."),
    ("Tell me about the {what} again.", "There is not much to tell, it was {how}."),
)
_WHAT = (
    *("concert", "picnic", "train ride", "wedding", "football match", "walk by the river", "pottery class", "film"),
    *("soup", "book about bees", "trip to the lake", "garden party", "new bakery", "museum", "dance lesson", "market"),
)
_HOW = (
    "better than I had feared",
    "far too long",
    "lovely",
    "a bit dull",
    "louder than usual",
    "worth the rain",
    "fine",
)


def _number(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda draw: str(draw.randrange(low, high))


def _one_of(*values: str) -> Callable[[random.Random], str]:
    return lambda draw: draw.choice(values)


# what is told -> (said at first, said when it changed, the question, what it can be)
_FACTS: tuple[tuple[str, str, str, Callable[[random.Random], str]], ...] = (
    (
        "By the way, the code of my front door is {value} now.",
        "They changed my front door again: the code is {value} from today.",
        "What is the code of {who}'s front door?",
        _number(1000, 10_000),
    ),
    (
        "I called my new boat {value}, by the way.",
        "I painted a new name on my boat: it is called {value} now.",
        "What is {who}'s boat called?",
        _one_of("Juniper", "Marigold", "Petrel", "Saffron", "Tamarisk", "Windrose"),
    ),
    (
        "My sister moves to {value} next month.",
        "My sister moves to {value} after all, she decided again.",
        "Where does {who}'s sister move to?",
        _one_of("Bergen", "Cadiz", "Dublin", "Ghent", "Lisbon", "Trieste", "Utrecht", "Vilnius"),
    ),
    (
        "I paid {value} crowns for the old bicycle.",
        "I sold that bicycle and bought it back for {value} crowns, can you believe it.",
        "How many crowns did {who} pay for the old bicycle?",
        _number(110, 990),
    ),
    (
        "My dentist has me down for {value} o'clock on Friday.",
        "The dentist moved me to {value} o'clock on Friday.",
        "At what o'clock does {who} see the dentist on Friday?",
        _one_of("seven", "eight", "nine", "ten", "eleven", "three", "four", "five"),
    ),
    (
        "The spare key is under the {value}, if you come before me.",
        "I put the spare key under the {value} now, the old place was too easy.",
        "Under what is {who}'s spare key?",
        _one_of("bench", "flower pot", "doormat", "rain barrel", "stone frog", "ladder"),
    ),
)


class Dialogue(Generated):
    """Two friends who write to each other over many days, and a question about something one of them said.

    Small talk lies between what can be asked, which is more the longer the conversation is; both tell such things of
    themselves. changed: what is asked is told a second time with another value, and the newest one is right.
    """

    key = "dialogue"
    title = "Dialogue memory"
    scorer: ClassVar[Scorer | None] = "any"
    paper: ClassVar[Paper | None] = Paper(
        "Evaluating Very Long-Term Conversational Memory of LLM Agents", "Maharana et al. 2024", "2402.17753"
    )

    length: int = param(1024, ge=192, le=1 << 24, unit="tokens", help="how long the text is, at most")
    changed: bool = param(False, help="what is asked changes later on; the newest value is right")

    def make(self, encode: Encode, seed: int) -> Case:
        draw = random.Random(f"{self.key} {self.length} {self.changed} {seed}")
        speakers = draw.sample(_SPEAKERS, 2)
        told = [(who, fact) for who in speakers for fact in _FACTS]  # each once; the first is asked for
        draw.shuffle(told)
        (who, (first, again, question, values)) = told[0]
        old, new = _different(draw, values)
        asked = [f"{who}: {first.format(value=old)}", *([f"{who}: {again.format(value=new)}"] if self.changed else [])]
        others = [f"{one}: {fact[0].format(value=fact[3](draw))}" for one, fact in told[1:]]
        turns = self._turns(draw, speakers, asked, others, encode)
        text = "\n".join(turns)
        return Case(text, question.format(who=who), (new if self.changed else old,), "any")

    def _turns(
        self, draw: random.Random, speakers: list[str], asked: list[str], others: list[str], encode: Encode
    ) -> list[str]:
        """Days of turns with what is asked at random places: at most `length` tokens."""
        lines: list[str] = []
        room, day = self.length - sum(len(encode(f"{turn}\n")) for turn in asked), 0
        while True:
            block = [others.pop()] if others and draw.random() < 1 / 2 else []
            for _ in range(draw.randrange(1, _BETWEEN)):
                one, other = draw.sample(speakers, 2)
                said, answered = draw.choice(_TALK)
                about = {"what": draw.choice(_WHAT), "how": draw.choice(_HOW)}
                block += [f"{one}: {said.format(**about)}", f"{other}: {answered.format(**about)}"]
            if len(lines) >= day * _TURNS:
                block.insert(0, f"\n{1 + day % 28} {_MONTHS[day // 28 % len(_MONTHS)]}".lstrip("\n" if not day else ""))
                day += 1
            room -= len(encode("\n".join(["", *block])))
            if room < 0:
                break
            lines += block
        if len(lines) <= len(asked):
            raise BadParameter(f"length is {self.length}: too few tokens for a conversation; give more")
        places = sorted(draw.sample(range(1, len(lines) + 1), len(asked)))  # never before the first day
        for place, turn in reversed(list(zip(places, asked, strict=True))):
            lines.insert(place, turn)
        return lines


def _different(draw: random.Random, values: Callable[[random.Random], str]) -> tuple[str, str]:
    first = second = values(draw)
    while second == first:
        second = values(draw)
    return first, second
