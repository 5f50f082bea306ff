"""Ids of a text in which a chat template's own words and somebody else's stand side by side.

A tokenizer finds its control tokens wherever they are spelled. Here only those that the template itself writes count:
somebody's words stay words, whatever they spell.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import BadPrompt
from workbench.formatting import quoted

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NAMED = 5  # spellings that a note names
_MARK = re.compile("\ue000Aa([0-9]{1,9})zZ\ue001")


class Piece(NamedTuple):
    """A stretch of a prompt; `words`: of somebody's own, so that no control token is read in it."""

    text: str
    words: bool = False


class Encoded(NamedTuple):
    """Ids, int64 [n], and what is to be said about them."""

    ids: Tensor
    notes: tuple[str, ...] = ()


def stand_ins(count: int, *texts: str) -> list[str]:
    """As many different words that no text contains: letters of both cases between characters of private use, so that
    whatever changes a text changes them too, but for trimming.
    """
    taken = {int(found) for text in texts for found in _MARK.findall(text)}
    free = (number for number in range(len(taken) + count) if number not in taken)
    return [f"\ue000Aa{next(free)}zZ\ue001" for _ in range(count)]


def encode(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> Encoded:
    """The ids of all pieces as one text; special: with what the tokenizer puts around a text.

    Where no words spell a control token these are the tokenizer's own ids of the whole. A control token whose letters
    the tokenizer cannot read otherwise is one in words too, and the notes say so. Raises BadPrompt for words of which
    no token is made.
    """
    text = "".join(piece.text for piece in pieces)
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    control = control_tokens(tokenizer)
    own = list(_own(pieces, tokenizer, special))
    words = "".join(piece.text for piece in pieces if piece.words)
    if len(ids) <= len(own) and words.strip() and not tokenizer(words, add_special_tokens=False)["input_ids"]:
        raise BadPrompt(f"the model's tokenizer makes no token of {quoted(words)}: there is nothing to read")
    # Characters that the tokenizer does not know are read as its token for that, and do not spell it.
    unknown = getattr(tokenizer, "unk_token_id", None)
    unknown = -1 if unknown is None else int(unknown)
    counted = {token: name for token, name in control.items() if token != unknown}
    ours, read = _count(own, counted), _count(ids, counted)
    spelled = read - ours + Counter([unknown] if unknown in control and control[unknown] in words else [])
    if read == ours and not spelled:
        return Encoded(_tensor(ids))
    ids = _apart(pieces, tokenizer, control, special, ours)
    stays = _count(ids, counted) - ours
    notes = []
    if apart := [token for token in spelled if token not in stays]:
        notes.append(f"{_named(apart, control)} in the text: read as letters, not as a control token")
    if stays:
        notes.append(f"{_named(stays, control)} in the text: read as a control token, the only way this tokenizer has")
    return Encoded(_tensor(ids), tuple(notes))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids and spellings of the tokens that steer a model: special ones, those in its chat template, and other added
    ones that begin and end with a sign, as <think> does; not those that are words or spaces.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    found: dict[int, str] = {}
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        content = str(added)
        bare = content.strip(" \t\r\n▁")
        signs = len(bare) > 2 and not bare[0].isalnum() and not bare[-1].isalnum()
        if bare and (added.special or signs or content in template):
            found[int(token)] = content
    return found


def _own(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, special: bool) -> Iterator[int]:
    """Ids of what is not somebody's words."""
    if special:
        yield from tokenizer("", add_special_tokens=True)["input_ids"]
    for text in _runs(pieces):
        yield from tokenizer(text, add_special_tokens=False)["input_ids"]


def _runs(pieces: Sequence[Piece]) -> Iterator[str]:
    """The template's texts, each as long as it goes on."""
    run = ""
    for piece in pieces:
        if piece.words and piece.text:
            if run:
                yield run
            run = ""
        elif not piece.words:
            run += piece.text
    if run:
        yield run


def _count(ids: Iterable[int], control: Mapping[int, str]) -> Counter[int]:
    return Counter(token for token in ids if token in control)


def _named(tokens: Iterable[int], control: Mapping[int, str]) -> str:
    names = [quoted(control[token]) for token in tokens]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _tensor(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)


def _apart(
    pieces: Sequence[Piece],
    tokenizer: PreTrainedTokenizerBase,
    control: Mapping[int, str],
    special: bool,
    ours: Counter[int],
) -> list[int]:
    """Ids for which only the template's own texts were searched for control tokens."""
    if getattr(tokenizer, "is_fast", False):
        other, marks = _renamed(tokenizer.backend_tokenizer, control, pieces)
        text = "".join(piece.text if piece.words else _marked(piece.text, tokenizer, marks) for piece in pieces)
        ids: list[int] = other.encode(text, add_special_tokens=special).ids
        found = _count(ids, control)
        if all(found[token] >= ours[token] for token in ours):
            return ids
    # A tokenizer that cannot be changed: what stands on its own is read on its own.
    if all(piece.words for piece in pieces):
        return _literally("".join(piece.text for piece in pieces), tokenizer, special)
    parts = (
        _literally(text, tokenizer, False) if words else tokenizer(text, add_special_tokens=False)["input_ids"]
        for text, words in pieces
    )
    return [token for part in parts for token in part]


def _literally(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]
    return ids


def _marked(text: str, tokenizer: PreTrainedTokenizerBase, marks: Mapping[int, str]) -> str:
    """The template's own text with marks where it writes control tokens."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    parts, end = [], 0
    for token, (first, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token in marks:
            parts += [text[end:first], marks[token]]
            end = stop
    return "".join([*parts, text[end:]])


def _renamed(
    backend: Tokenizer, control: Mapping[int, str], pieces: Sequence[Piece]
) -> tuple[Tokenizer, dict[int, str]]:
    """The same tokenizer with marks for its control tokens' spellings, and the mark of each id.

    A spelling that other entries of the vocabulary are built from, or a single character, stays: text needs it.
    """
    from tokenizers import Tokenizer

    made: dict[str, Any] = json.loads(backend.to_str())
    made["truncation"] = made["padding"] = None
    model = made["model"]
    vocab = model["vocab"]
    known = set(vocab) if isinstance(vocab, dict) else {name for name, _ in vocab}
    needed = {name for name in known if len(name) == 1}
    for pair in model.get("merges") or ():
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        needed |= {left, right, left + right}
    names = {token: name for token, name in control.items() if name not in needed}
    marks = dict(zip(names, stand_ins(len(names), *(piece.text for piece in pieces)), strict=True))
    instead = {name: marks[token] for token, name in names.items()}
    for added in made["added_tokens"]:
        added["content"] = instead.get(added["content"], added["content"])
    if isinstance(vocab, dict):
        model["vocab"] = {instead.get(name, name): index for name, index in vocab.items()}
    else:
        model["vocab"] = [[instead.get(name, name), score] for name, score in vocab]
    if model.get("unk_token") in instead:
        model["unk_token"] = instead[model["unk_token"]]
    return Tokenizer.from_str(json.dumps(made)), marks
