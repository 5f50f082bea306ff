"""Problems in arithmetic, in the style of GSM8K's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from workbench.errors import BadParameter
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode
from workbench.tasks.files import Entry, FromFile, Malformed, text_in
from workbench.tasks.scoring import Scorer, number_after_mark


class GSM8K(FromFile):
    """Problems from a local JSONL with GSM8K's fields, "question" and "answer", after some that are solved.

    The solved ones are the next of the file, and are what is read and compressed. A reply is right where the number
    after its first "#### " is that of the answer, as in the authors' code.
    """

    key = "gsm8k"
    title = "GSM8K"
    scorer: ClassVar[Scorer | None] = "number"
    paper: ClassVar[Paper | None] = Paper(
        "Training Verifiers to Solve Math Word Problems", "Cobbe et al. 2021", "2110.14168"
    )

    path: str = param("", help="a JSONL file with the fields question and answer")
    shots: int = param(4, ge=1, le=64, help="solved problems before the one that is asked")
    reply_tokens: int = param(256, ge=1, le=1 << 20, unit="tokens", help="the longest reply")

    def entry(self, found: dict[str, Any], where: str) -> Sequence[Entry]:
        question, answer = text_in(found, "question"), text_in(found, "answer")
        if number_after_mark(answer) is None:
            raise Malformed("'answer' must end with #### and the number")
        return [Case("", question, (answer,), "number", reply_tokens=self.reply_tokens, origin=where)]

    def make(self, encode: Encode, seed: int) -> Case:
        asked = super().make(encode, seed)
        turned = [*self.entries[seed + 1 :], *self.entries[:seed]]
        shown = [one for one in turned if isinstance(one, Case)][: self.shots]
        if len(shown) < self.shots:
            raise BadParameter(f"gsm8k: {self.path} has too few problems for shots={self.shots} beside the one asked")
        text = "\n\n".join(f"Question: {one.question}\nAnswer: {one.answers[0]}" for one in shown)
        return Case(
            f"Each problem is solved step by step, and its number stands after ####.\n\n{text}",
            *(asked.question, asked.answers, "number"),
            reply_tokens=self.reply_tokens,
            origin=asked.origin,
        )
