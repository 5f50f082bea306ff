"""The user's own prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from workbench.errors import BadPrompt
from workbench.parameters import param
from workbench.tasks.base import Case
from workbench.tasks.files import Entry, FromFile, Malformed, located, text_in, text_of, texts_in
from workbench.tasks.scoring import Scorer

_ANSWER, _QUESTION = ".answer.txt", ".question.txt"


class Prompts(FromFile):
    """Prompts of your own with expected answers: a JSONL file, or a folder.

    Each line of the file is an object with "text", and where there are any "question", "answer" or "answers" (a list),
    and "lead" (the beginning of the reply, which is given). A folder holds such files (*.jsonl), or texts: NAME.txt
    with NAME.answer.txt (one answer a line) and NAME.question.txt. What is malformed gives one line about it, and the
    rest is used.
    """

    key = "file"
    title = "Prompts of your own"
    scorer: ClassVar[Scorer | None] = "any"

    path: str = param("", help="a JSONL file, or a folder of such files or of texts")
    match: Literal["any", "all", "exact", "line"] = param(
        "any", help="the reply contains any answer, or all; its whole, or its first line, is one"
    )
    reply_tokens: int = param(32, ge=1, le=1 << 20, unit="tokens", help="the longest reply")

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        folder = located(self.key, self.path)
        if not folder.is_dir():
            return super().entries
        found = tuple(self._of_folder(folder))
        if not found:
            raise BadPrompt(f"{self.path} has neither .jsonl nor .txt files: there is no case in it")
        return found

    def _of_folder(self, folder: Path) -> Iterator[Entry]:
        for path in sorted(folder.iterdir()):
            if path.suffix == ".jsonl":
                yield from self._read(path)
            elif path.suffix == ".txt" and not path.name.endswith((_ANSWER, _QUESTION)):
                yield self._of_texts(path)

    def _of_texts(self, path: Path) -> Entry:
        beside = {ending: path.with_name(f"{path.stem}{ending}") for ending in (_ANSWER, _QUESTION)}
        try:
            text = text_of(path)
            answers, question = (text_of(one).strip() if one.exists() else "" for one in beside.values())
        except BadPrompt as problem:
            return f"{path.name}: {problem}"
        if not text.strip():
            return f"{path.name}: it is empty"
        return self._case(text, question or None, tuple(filter(str.strip, answers.splitlines())), "", path.name)

    def entry(self, found: dict[str, Any], where: str) -> Sequence[Entry]:
        known = ("text", "question", "answer", "answers", "lead")
        if unknown := [name for name in found if name not in known]:
            raise Malformed(f"unknown field {unknown[0][:64]!r}: there are {', '.join(known)}")
        question = text_in(found, "question") if found.get("question") is not None else None
        answers: tuple[str, ...] = ()
        if "answers" in found:
            answers = texts_in(found, "answers")
        elif found.get("answer") is not None:
            answers = texts_in({"answer": [found["answer"]]}, "answer")
        lead = text_in(found, "lead") if found.get("lead") else ""
        return [self._case(text_in(found, "text"), question, answers, lead, where)]

    def _case(self, text: str, question: str | None, answers: tuple[str, ...], lead: str, where: str) -> Case:
        return Case(text, question, answers, self.match, lead=lead, reply_tokens=self.reply_tokens, origin=where)
