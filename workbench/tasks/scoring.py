"""How replies are judged: each scorer takes a reply and the expected answers, and gives from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

from workbench.errors import MissingExtra

Scorer = Literal["all", "any", "exact", "line", "identifier", "number", "f1", "f1 of several", "unanswerable"]

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_LEFT_OUT = re.compile(r"\b(a|an|the|and)\b")
_UNKNOWN = ("no information available", "not mentioned")


def contains_all(reply: str, answers: Sequence[str]) -> float:
    """The share of the answers that the reply contains, whatever their case: RULER's `string_match_all`."""
    return sum(answer.lower() in reply.lower() for answer in answers) / len(answers)


def contains_any(reply: str, answers: Sequence[str]) -> float:
    """1 where the reply contains one of the answers, whatever its case: RULER's `string_match_part`."""
    return float(any(answer.lower() in reply.lower() for answer in answers))


def exact(reply: str, answers: Sequence[str]) -> float:
    """1 where the reply is one of the answers, but for space around it."""
    return float(reply.strip() in {answer.strip() for answer in answers})


def line(reply: str, answers: Sequence[str]) -> float:
    """1 where the first line with anything in it is one of the answers, but for space."""
    first = next((each.split() for each in reply.splitlines() if each.strip()), [])
    return float(first in [answer.split() for answer in answers])


def identifier(reply: str, answers: Sequence[str]) -> float:
    """1 where the reply begins with one of the answers as a whole name."""
    first = _IDENTIFIER.match(reply.lstrip())
    return float(first is not None and first[0] in answers)


def number(reply: str, answers: Sequence[str]) -> float:
    """1 where the number after the first #### is that of an answer, written alike but for commas: GSM8K's."""
    found = number_after_mark(reply)
    return float(found is not None and found in [number_after_mark(answer) for answer in answers])


def number_after_mark(text: str) -> str | None:
    """The number after the first "#### ", without commas; None where there is none."""
    found = _NUMBER.search(text)
    return None if found is None else found[1].replace(",", "")


def f1(reply: str, answers: Sequence[str]) -> float:
    """The largest F1 of the words of the reply and of an answer: LoCoMo's, over stems, without articles and "and"."""
    return max(_f1(reply, answer) for answer in answers)


def f1_of_several(reply: str, answers: Sequence[str]) -> float:
    """The mean F1 over an answer's parts, each with the part of the reply that is nearest: LoCoMo's for lists.

    Parts are what commas separate.
    """
    parts = [part.strip() for part in reply.split(",")]
    expected = [part.strip() for answer in answers for part in answer.split(",")]
    return sum(max(_f1(part, wanted) for part in parts) for wanted in expected) / len(expected)


def unanswerable(reply: str, answers: Sequence[str]) -> float:  # noqa: ARG001  every scorer takes the answers
    """1 where the reply says that the text does not tell: LoCoMo's for questions that have no answer."""
    return float(any(words in reply.lower() for words in _UNKNOWN))


def _f1(reply: str, answer: str) -> float:
    said, wanted = _stems(reply), _stems(answer)
    same = (Counter(said) & Counter(wanted)).total()
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def _stems(text: str) -> list[str]:
    try:
        from nltk.stem import PorterStemmer
    except ImportError:
        raise MissingExtra(
            "LoCoMo's F1 needs NLTK's Porter stemmer, which is not installed: pip install 'inference-workbench[tasks]'"
        ) from None
    stem = PorterStemmer().stem
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [stem(word) for word in _LEFT_OUT.sub(" ", letters).split()]


SCORERS: Mapping[Scorer, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    dict(
        zip(
            get_args(Scorer),
            (contains_all, contains_any, exact, line, identifier, number, f1, f1_of_several, unanswerable),
            strict=True,
        )
    )
)
