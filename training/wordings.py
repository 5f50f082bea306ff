"""What the tasks speak of: facts in several wordings, each with the question it answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from workbench.examples import OBJECTS, sentence

# Never part of a training fact: with these the evaluation asks for names that were not trained on.
HELD_OUT_THINGS = ("bakery", "windmill", "theatre", "cabin", "pharmacy", "stable", "laboratory", "embassy")

THINGS = (
    *OBJECTS, "museum", "library", "harbour", "station", "tower", "cellar", "garage", "workshop", "school", "hotel",
    "castle", "factory", "hospital", "market", "office", "kitchen", "attic", "barn", "vault", "studio", "clinic",
    "airport", "monastery", "warehouse", "gallery", "palace", "storage room", "engine room", "guesthouse",
    "reading room", "control room", "bell tower", "fire station", "post office", "power plant", "north gate",
    "blue door", "old bridge", "garden shed", "town hall", "back entrance", "server room", "music school",
    "upper deck", "left drawer", "red box",
)  # fmt: skip
_PLACES = ("", "", "", "", " in the valley", " by the river", " under the hill", " behind the church", " on the island")
_NUMBERED = (
    "secret number", "secret code", "access code", "room number", "serial number", "password", "phone number",
    "locker number", "combination", "account number", "code", "number", "secret code",
)  # fmt: skip
_SAYINGS = (
    "The {what} of the {thing} is {value}.",
    "The {what} of the {thing} is {value}.",
    "The {what} of the {thing} is {value}.",
    "Remember that the {what} of the {thing} is {value}.",
    "On a postcard stood that the {what} of the {thing} is {value}.",
    "The {what} for the {thing} is {value}.",
    "The {thing} has the {what} {value}.",
)
_NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon",
    "Marta", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Ulrich", "Vera", "Walter", "Yara", "Zeno", "Maria",
    "Peter", "Sofia", "Thomas",
)  # fmt: skip
_TRAITS = {
    "favourite colour": ("red", "green", "blue", "yellow", "black", "white", "purple", "orange", "grey", "brown"),
    "favourite fruit": ("apple", "pear", "plum", "cherry", "banana", "lemon", "grape", "peach", "fig", "melon"),
    "pet": ("dog", "cat", "parrot", "rabbit", "horse", "goat", "turtle", "hamster", "snake", "goose"),
    "city": ("Paris", "Oslo", "Rome", "Lisbon", "Vienna", "Prague", "Dublin", "Athens", "Madrid", "Berlin", "Cairo"),
    "instrument": ("piano", "violin", "trumpet", "flute", "guitar", "drum", "harp", "cello", "organ", "banjo"),
    "job": ("baker", "doctor", "pilot", "farmer", "painter", "singer", "lawyer", "tailor", "sailor", "teacher"),
}  # fmt: skip
_WORDS = (
    "amber", "anchor", "arrow", "autumn", "basket", "beacon", "bottle", "branch", "button", "candle", "canyon",
    "carpet", "castle", "cedar", "circle", "cloud", "cobalt", "copper", "coral", "cotton", "crystal", "desert",
    "dragon", "eagle", "ember", "falcon", "feather", "forest", "garden", "ginger", "glacier", "granite", "hammer",
    "harvest", "hazel", "island", "ivory", "jasmine", "jungle", "kettle", "ladder", "lantern", "lemon", "linen",
    "magnet", "maple", "marble", "meadow", "mirror", "morning", "mountain", "needle", "ocean", "olive", "orchid",
    "paper", "pebble", "pepper", "pillow", "planet", "pocket", "pollen", "prism", "quartz", "rabbit", "raven",
    "ribbon", "river", "rocket", "saddle", "saffron", "salmon", "shadow", "silver", "spiral", "summer", "sunset",
    "temple", "thunder", "ticket", "timber", "tunnel", "turtle", "valley", "velvet", "violet", "walnut", "window",
    "winter", "zephyr",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """Something a text says, and what is asked about it. The answer is `lead` and then `value`."""

    statement: str
    question: str
    lead: str
    value: str

    @property
    def answer(self) -> str:
        return self.lead + self.value


def number(draw: random.Random) -> str:
    """Three to six digits, mostly five."""
    digits = draw.choice((3, 4, 5, 5, 5, 5, 6))
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def word(draw: random.Random) -> str:
    """One of the words that stand for secrets."""
    return draw.choice(_WORDS)


def everyday_facts(draw: random.Random, count: int) -> list[Fact]:
    """Facts of which no two have the same question."""
    found: dict[str, Fact] = {}
    whats = draw.sample(_NUMBERED, draw.choice((1, 2, 4)))  # few, so that several things differ in one word only
    while len(found) < count:
        fact = _trait(draw) if draw.random() < 0.2 else _numbered(draw, draw.choice(whats))
        found.setdefault(fact.question, fact)
    return list(found.values())


def _numbered(draw: random.Random, what: str) -> Fact:
    thing = draw.choice(THINGS) + draw.choice(_PLACES)
    value = number(draw) if draw.random() < 0.8 else word(draw)
    saying = draw.choice(_SAYINGS)
    between = "for" if " for the " in saying else "of"
    return Fact(
        statement=saying.format(what=what, thing=thing, value=value),
        question=f"What is the {what} {between} the {thing}?",
        lead=f"The {what} {between} the {thing} is",
        value=f" {value}.",
    )


def _trait(draw: random.Random) -> Fact:
    name = draw.choice(_NAMES)
    trait = draw.choice(tuple(_TRAITS))
    value = draw.choice(_TRAITS[trait])
    return Fact(
        statement=f"{name}'s {trait} is {value}.",
        question=f"What is {name}'s {trait}?",
        lead=f"{name}'s {trait} is",
        value=f" {value}.",
    )


_PAIRS = ("{key}: {value}", '"{key}": "{value}",', "| {key} | {value} |", "{key} = {value}", "{key} -> {value}")


def pairs(draw: random.Random, count: int) -> list[Fact]:
    """Lines of a table of keys and values, every key once; its lines are written alike."""
    line, kind, valued = draw.choice(_PAIRS), draw.choice(("words", "letters", "numbers")), draw.choice((number, word))
    made: dict[str, Fact] = {}
    while len(made) < count:
        key = _key(draw, kind)
        value = valued(draw)
        made.setdefault(
            key,
            Fact(
                statement=line.format(key=key, value=value),
                question=f"What is the value of {key}?",
                lead=f"The value of {key} is",
                value=f" {value}.",
            ),
        )
    return list(made.values())


def _key(draw: random.Random, kind: str) -> str:
    if kind == "words":
        return f"{word(draw)}-{word(draw)}"
    if kind == "letters":
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.choice((4, 5, 6))))
    return str(draw.randrange(1000, 100_000))


def assignments(draw: random.Random, count: int) -> list[Fact]:
    """Python assignments of numbers and of earlier names, at most two names away from a number.

    An answer names the whole chain, so that each step of it is one look back.
    """
    names = draw.sample([f"{a}{b}" for a in _WORDS for b in ("", "_id", "_size", "2")], count)
    chains: dict[str, str] = {}
    made = []
    for index, name in enumerate(names):
        source = draw.choice(names[:index]) if index and draw.random() < 0.4 else None
        if source is None or chains[source].count("=") > 1:
            right, chains[name] = (value := number(draw)), f" {value}."
        else:
            right, chains[name] = source, f" {source} ={chains[source]}"
        made.append(Fact(f"{name} = {right}", f"What is {name}?", f"{name} =", chains[name]))
    return made


def sums(draw: random.Random, held_out: bool = False) -> Fact:
    """A sum, difference (up to 99 each) or product (up to 12 each). One in ten never comes in training."""
    while True:
        sign = draw.choice("+-×")
        a, b = (draw.randrange(13), draw.randrange(13)) if sign == "×" else (draw.randrange(100), draw.randrange(100))
        if sign == "-" and b > a:
            a, b = b, a
        if ((a * 101 + b * 7 + ord(sign)) % 10 == 3) == held_out:
            break
    result = {"+": a + b, "-": a - b, "×": a * b}[sign]
    return Fact("", f"What is {a} {sign} {b}?", f"{a} {sign} {b} =", f" {result}.")


def sample_text(draw: random.Random, length: int) -> str:
    """About `length` characters of everyday sentences, facts, tables and sums with their questions and answers."""
    out: list[str] = []
    size = 0
    while size < length:
        facts = [*everyday_facts(draw, 4), *pairs(draw, 2), *assignments(draw, 3), sums(draw)]
        new = [sentence(draw) for _ in range(8)]
        for fact in facts:
            new += [fact.statement, fact.question, fact.answer]
        out += new
        size += sum(map(len, new)) + len(new)
    return "\n\n".join(out)
