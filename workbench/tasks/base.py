"""What a task is: a frozen description that makes cases, each a text, a question and the answer that is expected."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from workbench import arguments
from workbench.described import Described
from workbench.errors import BadParameter
from workbench.parameters import param
from workbench.registry import Paper
from workbench.tasks.scoring import SCORERS, Scorer

Encode = Callable[[str], Sequence[int]]
"""From a text to its token ids, special tokens included, as a tokenizer reads it by itself."""

SOME = 4  # cases of a task that has no end, where nobody says how many


@dataclass(frozen=True)
class Case:
    """One text and what is asked of it.

    text: what is read and compressed, or its token ids. question: asked after it (None: the model goes on). answers:
    what is expected, as `scorer` understands it; none: nothing is expected. lead: the beginning of the reply, which is
    given. goes_on: the right reply continues the text, so that it is read as plain text where nobody asks for a chat
    template, and no question is asked then. continuation: token ids that are predicted one by one in place of a reply.
    reply_tokens: the longest reply. origin: where the text is from, if that is worth telling.
    """

    text: str | tuple[int, ...]
    question: str | None = None
    answers: tuple[str, ...] = ()
    scorer: Scorer = "all"
    lead: str = ""
    goes_on: bool = False
    continuation: tuple[int, ...] = ()
    reply_tokens: int = 32
    origin: str = ""

    def as_read(self, chat: bool | None) -> tuple[str | tuple[int, ...], bool | None]:
        """The text, and whether it is wrapped in the chat template, where that is `chat` (None: nobody says)."""
        return self.text, False if chat is None and self.goes_on else chat

    def score(self, reply: str) -> float | None:
        """How right a reply is, from 0 to 1; None where nothing is expected."""
        return SCORERS[self.scorer](reply, self.answers) if self.answers else None

    def right(self, reply: str) -> bool | None:
        """Whether a reply is wholly right; None where nothing is expected."""
        score = self.score(reply)
        return None if score is None else score == 1


class Task(Described):
    """A description of cases that are all of one kind. Immutable and hashable.

    A subclass sets `key`, `title`, `scorer` and, where somebody published its like, `paper`, declares its parameters
    with `param`, and makes one case in `make`. The same parameters give the same case.
    """

    scorer: ClassVar[Scorer | None] = "all"
    paper: ClassVar[Paper | None] = None

    seed: int = param(0, ge=0, help="draws the case; the next case is that of the next seed")

    @property
    def available(self) -> int | None:
        """How many cases there are from `seed` on; None: as many as are asked for."""
        return None

    def case(self, encode: Encode, number: int = 0) -> Case:
        """The case of seed + number. Raises BadParameter, and BadPrompt for an entry of a file that is none."""
        return self.make(encode, self.seed + arguments.whole("number", number, 0))

    def cases(self, encode: Encode, count: int | None = None) -> Iterator[Case]:
        """The first `count` cases; None: all that a file has, 4 of a task that has no end."""
        for number in range(self.count(count)):
            yield self.case(encode, number)

    def count(self, asked: int | None = None) -> int:
        """How many cases there are of those asked for. Raises BadParameter where a file has fewer."""
        available = self.available
        if asked is None:
            return SOME if available is None else available
        if arguments.whole("cases", asked, 1) > (asked if available is None else available):
            raise BadParameter(f"cases is {asked}: {self.label} has {available}")
        return asked

    @property
    def label(self) -> str:
        """A short name with whatever differs from the defaults: `needle depth=0.1`."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "seed"}
        return " ".join([self.key, *(f"{n}={value}" for n, value in values.items() if value != self._default(n))])

    @abstractmethod
    def make(self, encode: Encode, seed: int) -> Case:
        """The case of one seed."""


class Generated(Task):
    """A task whose texts are made, as long as is asked for."""

    length: int = param(1024, ge=32, le=1 << 24, unit="tokens", help="how long the text is, at most")
