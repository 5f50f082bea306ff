"""Needle tasks by which a model's heads are measured: a haystack, a question, and the answer given.

Made of the packaged haystack, or of random ids for a session without a tokenizer; the same for the same model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.examples import needle
from workbench.models import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATEMENT = 12  # ids of a needle that is made without a tokenizer
_CUE = 4  # ids by which such a needle is asked for


@dataclass(frozen=True)
class Task:
    """A haystack with a question and its answer, which stands at `start` too: ids [n], answer [a].

    The ids end with all of the answer but its last token, so that row n - a + i is the one that predicts answer[i].
    """

    ids: Tensor
    start: int
    answer: Tensor


def needle_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, tokens: int, *, reasoning: bool
) -> Iterator[Task]:
    """`count` tasks of about `tokens` tokens, their needles spread over the depths; the same for the same model."""
    config = model.config.get_text_config()
    tokens = min(tokens, max_positions(model) * 3 // 4)
    for index in range(count):
        depth = (index + 0.5) / count
        if tokenizer is None:
            yield _of_ids(config.vocab_size, tokens, depth, index, reasoning=reasoning)
        else:
            yield _of_text(tokenizer, tokens, depth, index, reasoning=reasoning)


def _of_text(tokenizer: PreTrainedTokenizerBase, tokens: int, depth: float, seed: int, *, reasoning: bool) -> Task:
    hay = needle(tokens, depth, seed)
    thing = hay.question.removeprefix("What is the secret number of the ").removesuffix("?")
    fact = f"The secret number of the {thing} is {hay.answer}."
    before, after = (part.strip() for part in hay.text.split(fact))
    question = hay.question
    if reasoning:
        other, decoy = random.Random(seed).choice(("bakery", "windmill", "harbour")), 99_999 - int(hay.answer or 0)
        decides = f" The secret number of the {other} is {decoy}. The {thing} is older than the {other}."
        after = f"{decides} {after}"
        question = f"What is the secret number of the older of the two, the {other} or the {thing}?"
    answer = _encoded(tokenizer, f" {fact}")
    opening = _encoded(tokenizer, before)
    rest = _encoded(tokenizer, f" {after.strip()}\n\nQuestion: {question}\nAnswer:")
    ids = torch.cat([opening, answer, rest, answer[:-1]])
    return Task(ids, len(opening), answer)


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _of_ids(vocabulary: int, tokens: int, depth: float, seed: int, *, reasoning: bool) -> Task:
    """A needle of random ids behind a cue; for reasoning the question is a link that leads to the cue elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    hay = torch.randint(vocabulary, (tokens,), generator=draw)
    answer = torch.randint(vocabulary, (_STATEMENT,), generator=draw)
    cue, link, decoy_cue = torch.randint(vocabulary, (3, _CUE), generator=draw)
    decoy = torch.randint(vocabulary, (_STATEMENT,), generator=draw)
    cut = int(depth * tokens)
    opening = torch.cat([hay[:cut], cue])
    decides = [decoy_cue, decoy, link, cue] if reasoning else []
    question = link if reasoning else cue
    ids = torch.cat([opening, answer, *decides, hay[cut:], question, answer[:-1]])
    return Task(ids, len(opening), answer)
