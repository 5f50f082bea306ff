"""A list of words, some of which come more often."""

from __future__ import annotations

import random
from itertools import chain, islice
from typing import ClassVar

from workbench.errors import BadParameter
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.kinds.needle import Needle
from workbench.tasks.words import words_of

_LONG = 4096  # tokens from which words are repeated more often


class CommonWords(Generated):
    """A numbered list of words of which ten come more often than the others; these ten are asked for.

    As in RULER's `common_words_extraction`: they come 6 times and the others once below 4,096 tokens, 30 and 3 times
    from there on, and the score is the share of the ten that the reply contains. Where the list needs more words than
    there are, the others are made of two.
    """

    key = "common-words"
    title = "Common words"
    paper: ClassVar[Paper | None] = Needle.paper

    common: int = param(10, ge=1, le=20, help="words that come more often")
    shots: int = param(
        0, ge=0, le=4, help="solved lists before the one that is asked", own="RULER gives 1: half of 512 tokens"
    )

    def make(self, encode: Encode, seed: int) -> Case:
        draw = random.Random(f"{self.key} {self.length} {seed}")
        often, once = (6, 1) if self.length < _LONG else (30, 3)
        begin = "".join(self._shot(draw) for _ in range(self.shots))
        words = words_of("nouns")
        draw.shuffle(words)
        low, high = 0, self.length  # others: the most that fit
        text = self._listed(draw, begin, words, often, once, 0)
        if len(encode(text)) > self.length:
            raise BadParameter(
                f"length is {self.length}: the common words alone take {len(encode(text))} tokens; give at least that"
            )
        state = draw.getstate()
        while low < high:
            others = (low + high + 1) // 2
            draw.setstate(state)
            if len(encode(self._listed(draw, begin, words, often, once, others))) <= self.length:
                low = others
            else:
                high = others - 1
        draw.setstate(state)
        text = self._listed(draw, begin, words, often, once, low)
        return Case(text, self._question, tuple(words[: self.common]), lead=self._lead, reply_tokens=8 * self.common)

    @property
    def _question(self) -> str:
        return f"What are the {self.common} words that come most often in the list above?"

    @property
    def _lead(self) -> str:
        return f"The {self.common} words that come most often are:"

    def _listed(self, draw: random.Random, begin: str, words: list[str], often: int, once: int, others: int) -> str:
        pairs = (f"{first}-{second}" for first in words for second in words if first != second)
        rest = list(islice(chain(words[self.common :], pairs), others))
        if len(rest) < others:
            raise BadParameter(f"length is {self.length}: there are not enough words for such a list")
        listed = words[: self.common] * often + rest * once
        draw.shuffle(listed)
        intro = "Some words in this numbered list come more often than others."
        return f"{begin}{intro}\n" + " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))

    def _shot(self, draw: random.Random) -> str:
        words = draw.sample(words_of("nouns"), 2 * self.common)
        solved = " ".join(f"{place}. {word}" for place, word in enumerate(words[: self.common], 1))
        return f"{self._listed(draw, '', words, 3, 1, self.common)}\n{self._question} {self._lead} {solved}\n\n"
