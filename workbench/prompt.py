"""From text, chat messages or token ids to the ids a model reads, with or without its chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from workbench.engine.images import Images
from workbench.errors import BadPrompt
from workbench.formatting import Brief, quoted
from workbench.models.chat_template import render
from workbench.models.image_text import check_words, image_mark, messages_of, placed, processed
from workbench.models.literal_text import Encoded, Piece, encode, stand_ins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from workbench.models.image_text import Picture

Message = dict[str, Any]
Text = str | Sequence[Message] | Sequence[int] | np.ndarray | Tensor

_ELSE = "give plain text with chat=False, or token ids"


@dataclass(frozen=True, repr=False)
class Prompt(Brief):
    """What a session reads: token ids, and how a question is appended to them.

    `ids` is int64 [n]. `chat` says whether the ids were made with the chat template; `open_turn`, whether they end
    inside a turn of the user: a question then joins that turn, after `held` (space that the template drops at a turn's
    end), and `closing` follows it (None: as after a first turn). Without `chat` a question is appended as plain text.
    `tokenizer` tells views how the ids read. `notes` say what was read otherwise than it may seem. `images`: those that
    some of the tokens stand for.
    """

    ids: Tensor
    chat: bool
    open_turn: bool = False
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)
    closing: str | None = None
    held: str = ""
    notes: tuple[str, ...] = ()
    images: Images | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, text: Text, tokenizer: PreTrainedTokenizerBase | None, chat: bool | None = None) -> Prompt:
        """Read a prompt.

        text: plain text (wrapped in the model's chat template where it has one, unless `chat=False`), chat messages
        (`[{"role": ..., "content": ...}, ...]`), or token ids. Control tokens that a text spells are read as the
        letters that stand there, but for what an assistant said in messages: give token ids to set them by hand.
        Raises BadPrompt.
        """
        if isinstance(text, str):
            if not text.strip():
                raise BadPrompt("the text is empty: there is nothing to read")
            if has_template(tokenizer) if chat is None else chat:
                return cls._of_messages([{"role": "user", "content": text}], tokenizer)
            found = _encode([Piece(text, words=True)], tokenizer, special=True)
            return cls(found.ids, chat=False, notes=found.notes)
        if isinstance(text, Tensor | np.ndarray) or _is_ids(text):
            return cls(_row_of_ids(text), chat=False)
        return cls._of_messages(text, tokenizer)

    @classmethod
    def with_images(
        cls,
        text: str | Sequence[Message],
        images: Sequence[Picture],
        processor: ProcessorMixin,
        tokenizer: PreTrainedTokenizerBase,
        token: int | None,
        chat: bool | None = None,
    ) -> Prompt:
        """Read a text with images by the model's own processor; see `workbench.models.image_text`.

        text: as in `of`; contents of messages may be lists of parts. tokenizer: the processor's, with its template.
        token: the id that stands for a part of an image. Raises BadPrompt, MissingExtra.
        """
        if isinstance(text, str) and not (has_template(tokenizer) if chat is None else chat):
            parts = placed(text, len(images), processor)
            for part in parts:
                check_words(part or "", processor)
            mark = image_mark(processor)
            ids, shown = processed("".join(part or mark for part in parts), images, processor, token)
            return cls(ids, chat=False, images=shown)
        messages, sources = messages_of(text, images, processor)
        template = _need_template(tokenizer)
        for message in messages:
            for part in message["content"]:
                check_words(part.get("text", ""), processor)
        open_turn = bool(messages) and messages[-1]["role"] == "user"
        if not open_turn:
            ids, shown = processed(render(template, messages, generate=False), sources, processor, token)
            return cls(ids, chat=True, images=shown)
        last = messages[-1]["content"][-1] if messages[-1]["content"] else {}
        if not last.get("text", "").strip():
            raise BadPrompt("the last message ends without words: say something about the images")
        (mark,) = stand_ins(1, _source(template), last["text"])
        marked = [*messages[:-1], {**messages[-1], "content": [*messages[-1]["content"][:-1], {**last, "text": mark}]}]
        before, _, closing = _split(render(template, marked, generate=True), [mark], each=True)
        rendered, words = render(template, messages, generate=True), last["text"]
        variants = dict.fromkeys((words, words.lstrip(), words.rstrip(), words.strip()))
        said = next((each for each in variants if rendered == before + each + closing), None)
        if said is None:
            raise BadPrompt(f"the model's chat template changes what the user says: {_ELSE}")
        ids, shown = processed(before + said, sources, processor, token)
        held = words[len(words.rstrip()) :] if said == said.rstrip() else ""
        return cls(ids, chat=True, open_turn=True, closing=closing, held=held, images=shown)

    @classmethod
    def _of_messages(cls, messages: Any, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
        if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray) or not messages:
            raise BadPrompt("a prompt is a text, a list of chat messages, or a row of token ids")
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(x), str) for x in ("role", "content")):
                raise BadPrompt(f'a chat message needs "role" and "content", both text, not {quoted(message)}')
        template = _need_template(tokenizer)
        # A last message from the user is left open, so that a question can still join it.
        open_turn = messages[-1]["role"] == "user"
        pieces, held = _laid_out(template, messages, generate=open_turn)
        closing = pieces.pop().text if open_turn else None
        found = _encode(pieces, template)
        return cls(found.ids, chat=True, open_turn=open_turn, closing=closing, held=held, notes=found.notes)

    def question_ids(self, question: str | Sequence[int] | Tensor | None, tokenizer: Any) -> Tensor:
        """The ids [q] to read after the prompt so that the model answers `question` (None: go on from here)."""
        if question is not None and not isinstance(question, str):
            return text_ids(question, tokenizer)
        _check_question(question)
        if not self.chat:
            return torch.empty(0, dtype=torch.long) if question is None else text_ids(question, tokenizer)
        if not self.open_turn:
            return self.next_ids(question, tokenizer, ended=_ending(_need_template(tokenizer)))
        template = _need_template(tokenizer)
        frame = _frame(template)
        asked = "" if question is None else f"{self.held}\n\n{frame.trimmed(question, left=False)}"
        closing = frame.after if self.closing is None else self.closing
        return _encode([Piece(asked, words=True), Piece(closing)], template).ids

    def next_ids(self, question: str | Sequence[int] | Tensor | None, tokenizer: Any, *, ended: str) -> Tensor:
        """The ids [q] that follow an answer: they close the assistant's turn and ask the next question.

        ended: what has been read of the turn's end already, for instance the text of the token that ended the answer.
        """
        if not isinstance(question, str):
            return Prompt.of(question, tokenizer).ids if question is not None else torch.empty(0, dtype=torch.long)
        _check_question(question)
        if not self.chat:
            return text_ids(question, tokenizer)
        template = _need_template(tokenizer)
        frame = _frame(template)
        turn, asked = frame.between.removeprefix(ended), frame.trimmed(question)
        return _encode([Piece(turn), Piece(asked, words=True), Piece(frame.later)], template).ids


def has_messages(text: Any) -> TypeGuard[Sequence[Message]]:
    """Whether this is a list of chat messages."""
    return isinstance(text, Sequence) and not isinstance(text, str) and all(isinstance(x, dict) for x in text)


def has_images(text: Any) -> bool:
    """Whether chat messages have images among their parts."""
    if not has_messages(text):
        return False
    parts = [part for message in text if isinstance(message.get("content"), list) for part in message["content"]]
    return any(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def text_ids(text: str | Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The ids [t] of a text as it stands in the middle of others, without special tokens; ids stay as they are."""
    if isinstance(text, str):
        return _encode([Piece(text, words=True)], tokenizer).ids
    return Prompt.of(text, tokenizer).ids


def notes_on(
    question: str | Sequence[int] | Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, ...]:
    """What is to be said about how a question is read, as `Prompt.notes` is about a prompt."""
    return _encode([Piece(question, words=True)], tokenizer).notes if isinstance(question, str) else ()


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the tokenizer knows how its model was taught to chat."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_vocabulary(ids: Tensor, size: int, name: str) -> None:
    """Raise BadPrompt if an id of ids [n] is not in the vocabulary of `size` tokens of the model `name`."""
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.numel():
        raise BadPrompt(f"token id {int(outside[0])} is outside the vocabulary of {name}: ids go from 0 to {size - 1}")


def _check_question(question: str | None) -> None:
    if question is not None and not question.strip():
        raise BadPrompt("the question is empty; leave it out to let the model go on from the prompt")


def _is_ids(text: Any) -> bool:
    return (
        isinstance(text, Sequence)
        and not isinstance(text, bytes | bytearray)
        and all(isinstance(item, Integral) and not isinstance(item, bool) for item in text)
    )


def _need_template(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None or not has_template(tokenizer):
        raise BadPrompt("this model has no chat template: give plain text (chat=False) or token ids")
    return tokenizer


def _row_of_ids(given: Any) -> Tensor:
    """Token ids as int64 [n]."""
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise BadPrompt(f"token ids must be whole numbers in one row [n]: {reason}") from None
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.numel() == 0:
        raise BadPrompt("the list of token ids is empty: there is nothing to read")
    whole = ids.dtype != torch.bool and not (ids.is_floating_point() or ids.is_complex())
    if ids.ndim != 1 or not whole:
        raise BadPrompt(f"token ids must be whole numbers in one row [n], not {ids.dtype} {list(ids.shape)}")
    read = ids.long().cpu()
    if ids.dtype == torch.uint64 and bool((read < 0).any()):
        raise BadPrompt("token ids must be whole numbers in one row [n]: one is above 2**63")
    return read


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.chat_template)


def _laid_out(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool
) -> tuple[list[Piece], str]:
    """What the template makes of messages: its own texts and, between them, the words of each; and the space that it
    drops at the end of the last.

    What an assistant said is left to the template, which may change it: reasoning of earlier turns is often dropped.
    With `generate` the pieces end with the last message's words and the text that closes its turn.
    """
    said = [message["content"] for message in messages]
    theirs = [index for index, message in enumerate(messages) if message["role"] != "assistant"]
    for index in theirs:
        _check_characters(said[index])
    marks = dict(zip(stand_ins(len(theirs), _source(tokenizer), *said), theirs, strict=True))
    standing = {index: mark for mark, index in marks.items()}
    marked = [{**message, "content": standing.get(index, message["content"])} for index, message in enumerate(messages)]
    # The text between marks and the marks take turns.
    parts = _split(render(tokenizer, marked, generate=generate), list(marks))
    for mark, index in marks.items():
        if (times := parts.count(mark)) != 1:
            does = "repeats" if times else "leaves out or changes"
            raise BadPrompt(f"the model's chat template {does} what {_who(messages, index)} says: {_ELSE}")
    rendered, at = render(tokenizer, messages, generate=generate), 0
    pieces, held = [Piece(parts[0])], ""
    if not rendered.startswith(parts[0]):
        raise BadPrompt(f"the model's chat template writes other text around other words: {_ELSE}")
    at = len(parts[0])
    for mark, after in zip(parts[1::2], parts[2::2], strict=True):
        content = said[marks[mark]]
        # Many templates drop space around what is said.
        variants = dict.fromkeys((content, content.lstrip(), content.rstrip(), content.strip()))
        words = next(
            (each for each in variants if rendered.startswith(after, at + len(each)) and rendered.startswith(each, at)),
            None,
        )
        if words is None:
            raise BadPrompt(f"the model's chat template changes what {_who(messages, marks[mark])} says: {_ELSE}")
        at += len(words) + len(after)
        pieces += [Piece(words, words=True), Piece(after)]
        held = content[len(content.rstrip()) :] if len(words) < len(content) and words == words.rstrip() else ""
    if at != len(rendered):
        raise BadPrompt(f"the model's chat template writes other text around other words: {_ELSE}")
    if generate and marks.get(parts[-2]) != len(messages) - 1:
        raise BadPrompt(
            f"the model's chat template does not end with what {_who(messages, len(messages) - 1)} says: {_ELSE}"
        )
    return pieces, held


@dataclass(frozen=True)
class _Frame:
    """A template's text after a user's first words up to the answer, between an answer and the next question, and
    after that question; whether it drops space at either end of the words.
    """

    after: str
    between: str
    later: str
    trims_left: bool
    trims_right: bool

    def trimmed(self, words: str, *, left: bool = True) -> str:
        """Words that end a turn, and begin it if `left`, as the template writes them."""
        words = words.rstrip() if self.trims_right else words
        return words.lstrip() if left and self.trims_left else words


def _frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    asked, answered, then = stand_ins(3, _source(tokenizer))
    opening = _opening(tokenizer, asked)
    question = {"role": "user", "content": asked}
    once = render(tokenizer, [*opening, question], generate=True)
    before, _, after = _split(once, [asked], each=True)
    spaced = render(tokenizer, [*opening, {"role": "user", "content": f" {asked} "}], generate=True)
    wide_before, _, wide_after = _split(spaced, [asked], each=True)
    talk = [question, {"role": "assistant", "content": answered}, {"role": "user", "content": then}]
    _, _, between, _, later = _split(render(tokenizer, [*opening, *talk], generate=True), [answered, then], each=True)
    return _Frame(after, between, later, wide_before == before, wide_after == after)


def _ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text after an answer that ends a conversation."""
    asked, answered = stand_ins(2, _source(tokenizer))
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    ended = render(tokenizer, [*_opening(tokenizer, asked), *talk], generate=False)
    return _split(ended, [answered], each=True)[2]


def _opening(tokenizer: PreTrainedTokenizerBase, words: str) -> list[Message]:
    """What has to stand before a user's first turn: a system message, for templates that demand one."""
    try:
        render(tokenizer, [{"role": "user", "content": words}], generate=True)
    except BadPrompt:
        system = {"role": "system", "content": "."}
        render(tokenizer, [system, {"role": "user", "content": words}], generate=True)
        return [system]
    return []


def _split(rendered: str, marks: Sequence[str], *, each: bool = False) -> list[str]:
    """A rendering cut at its marks, which stay between: [text, mark, text, ...]; each: raise unless all stand there
    once and in this order.
    """
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", rendered) if marks else [rendered]
    if each and parts[1::2] != list(marks):
        raise BadPrompt(f"the model's chat template leaves out, repeats or changes what is said: {_ELSE}")
    return parts


def _who(messages: Sequence[Message], index: int) -> str:
    return f"message {index + 1} ({quoted(messages[index]['role'], 20)})" if len(messages) > 1 else "the user"


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadPrompt(f"the text has a broken character at {error.start}: {error.reason}") from None


def _encode(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase | None, *, special: bool = False) -> Encoded:
    if tokenizer is None:
        raise BadPrompt("this session has no tokenizer: give token ids instead of text")
    for piece in pieces:
        _check_characters(piece.text)
    return encode(pieces, tokenizer, special=special)
