"""Any text, whose next tokens are predicted."""

from __future__ import annotations

from typing import ClassVar

from workbench import arguments
from workbench.errors import BadParameter
from workbench.examples import example
from workbench.parameters import param
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.files import text_of
from workbench.tasks.scoring import Scorer

_STORIES = ("needle", "code", "dialogue")


class Perplexity(Generated):
    """The perplexity of a text's next tokens, and how far their distribution is from the uncompressed model's.

    The first `length` tokens are read, the next `predicted` ones are given one by one; nothing is right or wrong. path:
    a text file, of which each seed takes a stretch of its own. Without it the ready texts, from 1,500 to 2,000 tokens
    together, each seed beginning with another one.
    """

    key = "perplexity"
    title = "Perplexity and KL"
    scorer: ClassVar[Scorer | None] = None

    length: int = param(512, ge=2, le=1 << 24, unit="tokens", help="how long the text is")
    predicted: int = param(64, ge=2, le=1 << 20, unit="tokens", help="how much of what follows is predicted")
    path: str = param("", help="a text file (empty: the ready texts)")

    def make(self, encode: Encode, seed: int) -> Case:
        size = self.length + self.predicted
        if self.path:
            ids = encode(text_of(arguments.path("path", self.path)))
            first, end = seed * size, (seed + 1) * size
            about = f"{self.path} has {len(ids):,} tokens"
        else:
            ids, first, end = encode(held_text(seed)), 0, size
            about = f"the ready texts have {len(ids):,} tokens together"
        if end > len(ids):
            raise BadParameter(f"perplexity: {about}, and this case ends at token {end:,}; take a longer text or less")
        read = tuple(int(token) for token in ids[first:end])
        return Case(read[: self.length], continuation=read[self.length :], goes_on=True)


def held_text(seed: int) -> str:
    """The ready texts in one, beginning with another one for each seed."""
    texts = [example(key).text for key in _STORIES]
    first = seed % len(texts)
    return "\n\n".join(texts[first:] + texts[:first])
