"""From text, chat messages or token ids to the ids a model reads, with or without its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.brief import Brief
from workbench.errors import BadPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Text = str | Sequence[Message] | Sequence[int] | np.ndarray | Tensor

# Stand-ins that no template changes: the template is rendered around them and cut where they stand.
_USER, _ASSISTANT, _NEXT = "\ue000user\ue000", "\ue000assistant\ue000", "\ue000next\ue000"


@dataclass(frozen=True, repr=False)
class Prompt(Brief):
    """What a session reads: token ids, and how a question is appended to them.

    `ids` is int64 [n]. `chat` says whether the ids end inside an open turn of the user (a question then closes that
    turn with the template); otherwise a question is appended as plain text. `tokenizer` tells views how the ids read.
    """

    ids: Tensor
    chat: bool
    open_turn: bool = False
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, text: Text, tokenizer: PreTrainedTokenizerBase | None, chat: bool | None = None) -> Prompt:
        """Read a prompt.

        text: plain text (wrapped in the model's chat template where it has one, unless `chat=False`), chat messages
        (`[{"role": ..., "content": ...}, ...]`), or token ids. Raises BadPrompt.
        """
        if isinstance(text, str):
            if not text.strip():
                raise BadPrompt("the text is empty: there is nothing to read")
            wrap = has_template(tokenizer) if chat is None else chat
            if not wrap:
                return cls(_encode(text, tokenizer, special=True), chat=False)
            before = _frame(_need_template(tokenizer))[0]
            return cls(_encode(before + text, tokenizer, special=False), chat=True, open_turn=True)
        if isinstance(text, Tensor | np.ndarray) or _is_ids(text):
            try:
                ids = torch.as_tensor(text)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise BadPrompt(f"token ids must be whole numbers in one row [n]: {reason}") from None
            if ids.ndim == 2 and ids.shape[0] == 1:
                ids = ids[0]
            if ids.numel() == 0:
                raise BadPrompt("the list of token ids is empty: there is nothing to read")
            if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise BadPrompt(f"token ids must be whole numbers in one row [n], not {ids.dtype} {list(ids.shape)}")
            return cls(ids.long().cpu(), chat=False)
        return cls._of_messages(text, tokenizer)

    @classmethod
    def _of_messages(cls, messages: Any, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
        if not isinstance(messages, Sequence) or not messages:
            raise BadPrompt("a prompt is a text, a list of chat messages, or a row of token ids")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
                raise BadPrompt(f'a chat message needs "role" and "content" (text), not {message!r}')
        last_from_user = messages[-1]["role"] == "user"
        template = _need_template(tokenizer)
        # A last message from the user is left open, so that a question can still join it.
        if last_from_user:
            marked = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _USER}]
            rendered = _render(template, marked, generate=False).split(_USER)[0]
        else:
            rendered = _render(template, messages, generate=False)
        return cls(_encode(rendered, tokenizer, special=False), chat=True, open_turn=last_from_user)

    def question_ids(self, question: str | Sequence[int] | Tensor | None, tokenizer: Any) -> Tensor:
        """The ids [q] to read after the prompt so that the model answers `question` (None: go on from here)."""
        if question is not None and not isinstance(question, str):
            return text_ids(question, tokenizer)
        _check_question(question)
        if not self.chat:
            return torch.empty(0, dtype=torch.long) if question is None else _encode(question, tokenizer, special=False)
        if self.open_turn:
            after = _frame(_need_template(tokenizer))[1]
            return _encode((f"\n\n{question}" if question else "") + after, tokenizer, special=False)
        return self.next_ids(question, tokenizer, ended=_ending(_need_template(tokenizer)))

    def next_ids(self, question: str | Sequence[int] | Tensor | None, tokenizer: Any, *, ended: str) -> Tensor:
        """The ids [q] that follow an answer: they close the assistant's turn and ask the next question.

        ended: what has been read of the turn's end already, for instance the text of the token that ended the answer.
        """
        if not isinstance(question, str):
            return Prompt.of(question, tokenizer).ids if question is not None else torch.empty(0, dtype=torch.long)
        _check_question(question)
        if not self.chat:
            return _encode(question, tokenizer, special=False)
        _, after, turn = _frame(_need_template(tokenizer))
        return _encode(turn.removeprefix(ended) + question + after, tokenizer, special=False)


def text_ids(text: str | Sequence[int] | Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The ids [t] of a text as it stands in the middle of others, without special tokens; ids stay as they are."""
    if isinstance(text, str):
        return _encode(text, tokenizer, special=False)
    return Prompt.of(text, tokenizer).ids


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


def _render(tokenizer: PreTrainedTokenizerBase, messages: Any, *, generate: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate))


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The template's text before a user's words, after them up to the answer, and between an answer and the next
    question.
    """
    once = _render(tokenizer, [{"role": "user", "content": _USER}], generate=True)
    before, after = once.split(_USER)
    talk = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "user", "content": _NEXT},
    ]
    between = _render(tokenizer, talk, generate=True).split(_ASSISTANT)[1].split(_NEXT)[0]
    return before, after, between


def _ending(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text after an answer that ends a conversation."""
    talk = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    return _render(tokenizer, talk, generate=False).split(_ASSISTANT)[1]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase | None, *, special: bool) -> Tensor:
    if tokenizer is None:
        raise BadPrompt("this session has no tokenizer: give token ids instead of text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadPrompt(f"the text has a broken character at {error.start}: {error.reason}") from None
    return torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.long)
