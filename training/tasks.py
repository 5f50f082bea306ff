"""Rows of training tokens: documents, and tasks that can only be solved by looking back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from training.corpus import KINDS
from training.vocabulary import ASSISTANT, END, USER
from training.wordings import Fact, assignments, everyday_facts, pairs, sums
from workbench.examples import sentence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What a token is worth as a target. A task's text is given, not asked for: it is read for its language alone.
PADDING, CONTEXT, TEXT, ANSWER = 0, 1, 2, 3
WEIGHTS = (0.0, 0.1, 1.0, 6.0)

_PARAGRAPH = 8  # sentences, as in workbench.examples
_TOKENS_A_QUESTION = 160  # a row has about one question for each so many of its tokens


@dataclass
class Row:
    """Token ids, and what each is worth as a target."""

    ids: list[int] = field(default_factory=list)
    worth: list[int] = field(default_factory=list)

    def add(self, ids: Iterable[int], worth: int) -> None:
        before = len(self.ids)
        self.ids.extend(ids)
        self.worth.extend([worth] * (len(self.ids) - before))

    def filled(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids uint16 [length], worth uint8 [length]): cut, or padded with END that is worth nothing."""
        room = max(0, length - len(self.ids))
        ids = np.array(self.ids[:length] + [END] * room, dtype=np.uint16)
        return ids, np.array(self.worth[:length] + [PADDING] * room, dtype=np.uint8)


@dataclass(frozen=True)
class Sources:
    """What rows are made from: the tokenizer, and the training documents of each kind, uint16 [n]."""

    tokenizer: Tokenizer
    documents: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        def encode(text: str) -> tuple[int, ...]:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

        object.__setattr__(self, "encode", encode)
        object.__setattr__(self, "remembered", lru_cache(100_000)(encode))  # for sentences that come again and again
        breaks = {}
        for kind, tokens in self.documents.items():
            newline = encode("\n")[0]
            breaks[kind] = 2 + np.flatnonzero((tokens[:-2] == newline) & (tokens[1:-1] == newline))
        object.__setattr__(self, "breaks", breaks)

    encode: Callable[[str], tuple[int, ...]] = field(init=False)
    remembered: Callable[[str], tuple[int, ...]] = field(init=False)
    breaks: dict[str, np.ndarray] = field(init=False)  # where paragraphs begin


Task = Callable[[random.Random, int, Sources], Row]


def document(draw: random.Random, length: int, sources: Sources) -> Row:
    """A stretch of the documents of one kind, beginning anywhere."""
    kind = _kind(draw, sources)
    tokens = sources.documents[kind]
    first = draw.randrange(max(1, len(tokens) - length))
    row = Row()
    row.add(tokens[first : first + length].tolist(), TEXT)
    return row


def copying(draw: random.Random, length: int, sources: Sources) -> Row:
    """Random spans that come again later: what follows can be told from the first time alone."""
    size = sources.tokenizer.get_vocab_size()
    row = Row()
    seen: list[list[int]] = []
    while len(row.ids) < length:
        if seen and draw.random() < 0.6:
            span = draw.choice(seen)
            start = draw.randrange(max(1, len(span) - 8))
            again = span[start : start + draw.randrange(8, len(span) + 1)]
            row.add(again[:2], PADDING)  # nothing tells that it will be this one
            row.add(again[2:], ANSWER)
        else:
            if draw.random() < 0.5:
                span = [draw.randrange(len(WEIGHTS), size) for _ in range(draw.randrange(8, max(10, length // 8)))]
            else:
                span = document(draw, draw.randrange(8, max(10, length // 8)), sources).ids
            seen.append(span)
            row.add(span, PADDING)
    return row


def needles(draw: random.Random, length: int, sources: Sources) -> Row:
    """Facts hidden in everyday sentences, and questions about some of them."""
    facts = everyday_facts(draw, _questions(draw, length))

    def body(room: int) -> list[tuple[int, ...]]:
        said = [fact.statement for fact in facts]
        room -= sum(len(sources.encode(" " + text)) + 2 for text in said)
        hay = []
        while room > 0:
            hay.append(sentence(draw))
            room -= len(sources.remembered(" " + hay[-1])) + (len(hay) % _PARAGRAPH == 0)
        hay = hay[:-1]
        for text in said:
            hay.insert(draw.randrange(len(hay) + 1), text)
        return _paragraphs(hay, sources)

    return _asked(draw, length, sources, facts, body)


def needles_in_documents(draw: random.Random, length: int, sources: Sources) -> Row:
    """Facts as paragraphs of their own between those of a document, and questions about some of them."""
    facts = everyday_facts(draw, _questions(draw, length))
    kind = _kind(draw, sources)

    def body(room: int) -> list[tuple[int, ...]]:
        said = [sources.encode("\n\n" + fact.statement + "\n\n") for fact in facts]
        room -= sum(map(len, said))
        return _between(draw, room, sources, kind, said)

    return _asked(draw, length, sources, facts, body)


def lookups(draw: random.Random, length: int, sources: Sources) -> Row:
    """A long table of keys and values, and questions about some keys."""
    table = pairs(draw, max(4, length // 10))
    asked = table[: _questions(draw, length)]  # in no order yet

    def body(room: int) -> list[tuple[int, ...]]:
        lines: list[tuple[int, ...]] = []
        for fact in table:
            lines.append(sources.encode(fact.statement + "\n"))
            room -= len(lines[-1])
            if room < 0 and len(lines) > len(asked):
                lines.pop()
                break
        draw.shuffle(lines)
        return [*lines[:-1], lines[-1][:-1]]  # a text ends without a line break

    return _asked(draw, length, sources, asked, body)


def variables(draw: random.Random, length: int, sources: Sources) -> Row:
    """Assignments in order between lines of the standard library, and questions about what a name stands for."""
    count = _questions(draw, length) + 2
    facts = assignments(draw, count)

    def body(room: int) -> list[tuple[int, ...]]:
        said = [sources.encode("\n" + fact.statement + "\n") for fact in facts]
        room -= sum(map(len, said))
        return _between(draw, room, sources, "library", said)

    return _asked(draw, length, sources, facts, body)


def arithmetic(draw: random.Random, length: int, sources: Sources) -> Row:
    """Sums one after another, as questions of one conversation."""
    row = Row()
    while len(row.ids) < length:
        fact = sums(draw)
        row.add([USER, *sources.encode(fact.question), END, ASSISTANT], CONTEXT)
        row.add((*sources.encode(fact.lead), *sources.encode(fact.value), END), TEXT)  # they fill the row
    return row


def _kind(draw: random.Random, sources: Sources) -> str:
    kinds = list(sources.documents)
    return draw.choices(kinds, weights=[KINDS[kind] for kind in kinds])[0]


def _questions(draw: random.Random, length: int) -> int:
    return draw.randrange(1, 2 + length // _TOKENS_A_QUESTION)


def _paragraphs(sentences: list[str], sources: Sources) -> list[tuple[int, ...]]:
    """Sentences as `workbench.examples.needle` lays them out.

    A break between paragraphs is one token here, and two in a text that is encoded whole, as in documents: both are
    learned.
    """
    pieces = []
    for index, text in enumerate(sentences):
        if index % _PARAGRAPH:
            pieces.append(sources.remembered(" " + text))
        else:
            pieces.append((*(sources.remembered("\n\n") if index else ()), *sources.remembered(text)))
    return pieces


def _between(
    draw: random.Random, room: int, sources: Sources, kind: str, said: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """`room` tokens of one kind of document with `said`, in its order, between paragraphs."""
    tokens, breaks = sources.documents[kind], sources.breaks[kind]
    room = max(0, room)
    first = int(breaks[draw.randrange(len(breaks))]) if len(breaks) else 0
    first = max(0, min(first, len(tokens) - room))
    inside = breaks[np.searchsorted(breaks, first) : np.searchsorted(breaks, first + room)].tolist()
    places = [first, *inside, min(first + room, len(tokens))]
    cuts = sorted(draw.choice(places) for _ in said)
    pieces: list[tuple[int, ...]] = []
    for cut, text in zip(cuts, said, strict=True):
        pieces += [tuple(tokens[first:cut].tolist()), text]
        first = cut
    return [*pieces, tuple(tokens[first : places[-1]].tolist())]


def _asked(
    draw: random.Random,
    length: int,
    sources: Sources,
    facts: list[Fact],
    body: Callable[[int], list[tuple[int, ...]]],
) -> Row:
    """A text, then questions about its facts, as a session appends them (one time in six: plain statements)."""
    asked = draw.sample(facts, draw.randrange(max(1, len(facts) // 2), len(facts) + 1))
    chat = draw.random() < 5 / 6
    end = Row()
    for index, fact in enumerate(asked):
        if not chat:
            end.add(sources.encode("\n\n" + fact.lead), CONTEXT)
            end.add(sources.encode(fact.value), ANSWER)
            continue
        before = sources.encode("\n\n" + fact.question) if index == 0 else (USER, *sources.encode(fact.question))
        end.add((*before, END, ASSISTANT), CONTEXT)
        end.add((*sources.encode(fact.lead), *sources.encode(fact.value), END), ANSWER)
    row = Row()
    if chat:
        row.add([USER], CONTEXT)
    for piece in body(length - len(end.ids) - 1):
        row.add(piece, CONTEXT)
    row.add(end.ids, CONTEXT)
    row.worth[-len(end.ids) :] = end.worth
    return row
