"""Long conversations between two people, in the style of LoCoMo's file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from workbench.formatting import quoted
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case
from workbench.tasks.files import Entry, FromFile, Malformed, text_in, texts_in
from workbench.tasks.kinds.dialogue import Dialogue
from workbench.tasks.scoring import Scorer

_SESSION = re.compile(r"session_(\d+)")
_HINTS = {
    2: " Answer with a date, as near as the dates of the conversations tell.",
    5: ' If the conversations do not tell, say "not mentioned".',
}
_SCORERS: dict[int, Scorer] = {1: "f1 of several", 2: "f1", 3: "f1", 4: "f1", 5: "unanswerable"}


class LoCoMo(FromFile):
    """Questions about long conversations, from a local file with LoCoMo's fields (its JSON list, or JSONL).

    Each object has "conversation" (`session_N`, `session_N_date_time`) and "qa" (`question`, `answer`, `category`), and
    gives a case for each question. Replies are scored as in the authors' code: the F1 of stemmed words (categories 2
    to 4; of the first answer before ";" in 3), its mean over the parts of a list (1), and for questions that the
    conversation does not answer, whether the reply says so (5). Pictures count as their captions. Needs NLTK.
    """

    key = "locomo"
    title = "LoCoMo"
    scorer: ClassVar[Scorer | None] = "f1"
    paper: ClassVar[Paper | None] = Dialogue.paper

    path: str = param("", help="a file with the fields conversation and qa")
    reply_tokens: int = param(32, ge=1, le=1 << 20, unit="tokens", help="the longest reply")

    def entry(self, found: dict[str, Any], where: str) -> Sequence[Entry]:
        asked = found.get("qa")
        if not isinstance(asked, list) or not asked:
            raise Malformed(f"'qa' must be a list of questions, not {quoted(asked)}")
        text = _told(found.get("conversation"))
        return [self._asked(text, one, f"{where}, question {number}") for number, one in enumerate(asked, 1)]

    def _asked(self, text: str, found: Any, where: str) -> Entry:
        if not isinstance(found, dict) or found.get("category") not in _SCORERS:
            return f"{where}: a question is an object with a category from 1 to 5, not {quoted(found)}"
        try:
            question, answers = text_in(found, "question"), _answers(found)
        except Malformed as problem:
            return f"{where}: {problem}"
        category = found["category"]
        question += _HINTS.get(category, "")
        return Case(text, question, answers, _SCORERS[category], reply_tokens=self.reply_tokens, origin=where)


def _answers(found: dict[str, Any]) -> tuple[str, ...]:
    """What is expected of a question. Raises Malformed."""
    if found["category"] == 5:
        return ("not mentioned",)
    (answer,) = texts_in({"answer": [found.get("answer")]}, "answer")
    return (answer.split(";")[0].strip() if found["category"] == 3 else answer,)


def _told(conversation: Any) -> str:
    """A conversation as text: each day under its date. Raises Malformed."""
    if not isinstance(conversation, dict):
        raise Malformed(f"'conversation' must be an object with session_1 and more, not {quoted(conversation)}")
    days = sorted((int(match[1]), name) for name in conversation if (match := _SESSION.fullmatch(name)))
    told = []
    for number, name in days:
        turns = conversation[name]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Malformed(f"'{name}' must be a list of turns, not {quoted(turns)}")
        if turns:
            date = conversation.get(f"session_{number}_date_time", f"Day {number}")
            told.append("\n".join([f"{date}:", *map(_said, turns)]))
    if not told:
        raise Malformed("'conversation' has no session_1")
    return "\n\n".join(told)


def _said(turn: dict[str, Any]) -> str:
    shown = f" [shows a picture: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return f"{text_in(turn, 'speaker')}: {turn.get('text') or ''}{shown}"
