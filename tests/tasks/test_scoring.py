"""Scorers, against what RULER's, GSM8K's and LoCoMo's own code gives for the same replies."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from workbench.errors import MissingExtra
from workbench.tasks.scoring import SCORERS, Scorer

# Worked out from the authors' definitions by hand.
PUBLISHED: tuple[tuple[Scorer, str, tuple[str, ...], float], ...] = (
    ("all", "They are 12 and 34.", ("12", "34"), 1),
    ("all", "Only 12.", ("12", "34"), 1 / 2),
    ("all", "ABC", ("abc", "d", "e"), 1 / 3),
    ("any", "Only 12.", ("12", "34"), 1),
    ("any", "nothing", ("12", "34"), 0),
    ("number", "5 + 7 = 12\n#### 12", ("so\n#### 12",), 1),
    ("number", "#### 1,200", ("#### 1200",), 1),
    ("number", "#### -3", ("#### 3",), 0),
    ("number", "#### 12.0", ("#### 12",), 0),  # compared as text
    ("number", "the answer is 12", ("#### 12",), 0),
    ("number", "#### 1\n#### 2", ("#### 2",), 0),  # the first one counts
    ("f1", "The dogs and a cat", ("dog cat",), 1),  # articles, "and" and endings are left out
    ("f1", "running quickly", ("She runs",), 1 / 2),
    ("f1", "no idea", ("blue",), 0),
    ("f1", "7 May 2023", ("May 7, 2023",), 1),
    ("f1 of several", "pottery, camping", ("camping, painting",), 1 / 2),
    ("f1 of several", "camping, red painting", ("painting, camping",), (2 / 3 + 1) / 2),
    ("unanswerable", "That is Not Mentioned.", ("not mentioned",), 1),
    ("unanswerable", "Blue.", ("not mentioned",), 0),
    ("line", "\n  x =  1\ny = 2", ("x = 1",), 1),
    ("line", "x = 12", ("x = 1",), 0),
    ("identifier", " names[0]", ("names",), 1),
    ("identifier", "names_of", ("names",), 0),
    ("exact", " yes\n", ("yes", "no"), 1),
    ("exact", "yes.", ("yes",), 0),
)


@pytest.mark.parametrize(("scorer", "reply", "answers", "score"), PUBLISHED)
def test_a_reply_is_worth_what_the_authors_say(
    scorer: Scorer, reply: str, answers: tuple[str, ...], score: float
) -> None:
    assert SCORERS[scorer](reply, answers) == pytest.approx(score)


def test_without_nltk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "nltk":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"inference-workbench\[tasks\]"):
        SCORERS["f1"]("a reply", ("an answer",))
