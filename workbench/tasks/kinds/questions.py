"""Questions about people in a long register of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

from workbench.errors import BadParameter
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.kinds.needle import Needle
from workbench.tasks.scoring import Scorer
from workbench.tasks.words import words_of

_STREETS = ("Mill Lane", "Harbour Street", "Station Road", "Church Square", "Garden Walk", "Bridge Street", "Long Row")
_HOUSES = 300  # numbers of each street

# trait -> (what is asked, how it is told, the list of its values)
_TRAITS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "trade": (
        "What does {who} work as",
        ("{name} works as a {value}.", "For many years {name} has been a {value}."),
        "trades",
    ),
    "instrument": (
        "Which instrument does {who} play",
        ("In the evening {name} plays the {value}.", "At school {name} learned to play the {value}."),
        "instruments",
    ),
    "animal": (
        "Which animal does {who} keep",
        ("At home {name} keeps a {value}.", "A {value} has lived with {name} for years."),
        "animals",
    ),
    "town": (
        "In which town was {who} born",
        ("{name} was born in {value}.", "The birthplace of {name} is {value}."),
        "towns",
    ),
    "year": (
        "In which year was {who} born",
        ("The year of birth of {name} is {value}.", "{name} came into the world in {value}."),
        "years",
    ),
}


@dataclass(frozen=True)
class _Person:
    name: str
    address: str
    traits: dict[str, str]

    def told(self, draw: random.Random) -> str:
        """A paragraph about the person; each fact in one of its wordings, in any order."""
        facts = [
            draw.choice(wordings).format(name=self.name, value=self.traits[trait])
            for trait, (_, wordings, _) in _TRAITS.items()
        ]
        draw.shuffle(facts)
        return " ".join([f"{self.name} lives at {self.address}.", *facts])


class Questions(Generated):
    """A register of people, a paragraph each, and a question about one of them.

    hops=2: the person is named by the address, which another sentence ties to the name. As in RULER's `qa` the reply
    must contain the answer, in texts of our own.
    """

    key = "qa"
    title = "Question answering"
    scorer: ClassVar[Scorer | None] = "any"
    paper: ClassVar[Paper | None] = Needle.paper

    length: int = param(1024, ge=128, le=1 << 16, unit="tokens", help="how long the text is, at most")
    hops: Literal[1, 2] = param(1, help="facts that the answer takes")

    def make(self, encode: Encode, seed: int) -> Case:
        draw = random.Random(f"{self.key} {self.length} {seed}")
        paragraphs, people, room = [], [], self.length
        names = [f"{first} {last}" for first, last in product(words_of("first_names"), words_of("last_names"))]
        addresses = [f"{number} {street}" for street in _STREETS for number in range(1, _HOUSES + 1)]
        draw.shuffle(names)
        draw.shuffle(addresses)
        values = {trait: words_of(listed) for trait, (_, _, listed) in _TRAITS.items()}
        for name, address in zip(names, addresses, strict=False):
            person = _Person(name, address, {trait: draw.choice(each) for trait, each in values.items()})
            paragraph = person.told(draw)
            room -= len(encode(f"{paragraph}\n\n"))
            if room < 0:
                break
            people.append(person)
            paragraphs.append(paragraph)
        if not people:
            raise BadParameter(f"length is {self.length}: too few tokens for one paragraph of the register; give more")
        one, trait = draw.choice(people), draw.choice(tuple(_TRAITS))
        who = one.name if self.hops == 1 else f"the person who lives at {one.address}"
        question = _TRAITS[trait][0].format(who=who)
        return Case("\n\n".join(paragraphs), f"{question}?", (one.traits[trait],), "any")
