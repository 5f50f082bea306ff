"""Cases that RULER's own scripts made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case
from workbench.tasks.files import Entry, FromFile, text_in, texts_in
from workbench.tasks.kinds.needle import Needle
from workbench.tasks.scoring import Scorer


class RULER(FromFile):
    """Cases from a local JSONL with RULER's fields, "input" and "outputs", and "answer_prefix" where there is one.

    The question stands at the end of the input, so that it is known when the cache is compressed. match: "all" for
    RULER's needles, variables and words, whose score is the share of the outputs that the reply contains; "any" for
    its question answering.
    """

    key = "ruler"
    title = "RULER"
    scorer: ClassVar[Scorer | None] = "all"
    paper: ClassVar[Paper | None] = Needle.paper

    path: str = param("", help="a JSONL file with the fields input and outputs")
    match: Literal["all", "any"] = param("all", help="outputs that a right reply contains")
    reply_tokens: int = param(128, ge=1, le=1 << 20, unit="tokens", help="the longest reply")

    def entry(self, found: dict[str, Any], where: str) -> Sequence[Entry]:
        lead = text_in(found, "answer_prefix").strip() if found.get("answer_prefix") else ""
        text, outputs = text_in(found, "input"), texts_in(found, "outputs")
        return [Case(text, None, outputs, self.match, lead=lead, reply_tokens=self.reply_tokens, origin=where)]
