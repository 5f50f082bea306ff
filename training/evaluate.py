"""What a trained model can do: held-out perplexity, needles by depth and length, lookups, copies, sums, variables."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from training.architecture import CONTEXT
from training.corpus import KINDS, Corpus
from training.tasks import ANSWER, Row, Sources, copying, lookups, variables
from training.vocabulary import ASSISTANT, END, USER
from training.wordings import HELD_OUT_THINGS, sums
from workbench.examples import needle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (256, 512, 1024, 1900)
_FRAME = 48  # tokens that question, answer and template take
_TRAINED_ON = 20  # windows of each kind of training text, to tell how much of it is remembered


def evaluate(
    model: PreTrainedModel, corpus: Corpus, tries: int = 40, lengths: tuple[int, ...] = LENGTHS
) -> dict[str, Any]:
    """Every figure of the model card, JSON-able.

    Perplexities are of the held-out documents, and of some that were trained on. Accuracies are shares of `tries` tasks
    whose answer would be generated greedily, token by token and with its end: the answer is fed, and each of its tokens
    must be the model's first choice. Rows with several answers count each; of copied spans every token counts.
    """
    sources = Sources(corpus.tokenizer, {kind: corpus.tokens(kind, "held-out") for kind in KINDS})
    found: dict[str, Any] = {
        "held_out": {kind: perplexity(model, corpus, kind) for kind in KINDS},
        "trained_on": {kind: perplexity(model, corpus, kind, "train", most=_TRAINED_ON) for kind in KINDS},
        "tries": tries,
    }
    things: dict[str, Callable[[str, int], str]] = {
        "needle": lambda text, _: text,
        "needle_of_untrained_names": lambda _, seed: HELD_OUT_THINGS[seed % len(HELD_OUT_THINGS)],
    }
    for name, renamed in things.items():
        cells = []
        for length in lengths:
            for depth in DEPTHS:
                rows = [_needle_row(length, depth, seed, sources, renamed) for seed in range(tries)]
                cells.append({"tokens": length, "depth": depth, "accuracy": _exact(model, rows)})
        found[name] = cells
    draw = random.Random("evaluation")
    found["lookup"] = _exact(model, [lookups(draw, length, sources) for length in _spread(lengths, tries)], each=True)
    found["variables"] = _exact(
        model, [variables(draw, length, sources) for length in _spread(lengths, tries)], each=True
    )
    found["copied_tokens"] = _copied(model, [copying(draw, length, sources) for length in _spread(lengths, tries)])
    found["sums"] = _exact(model, [_sum_row(draw, sources) for _ in range(8 * tries)])
    return found


def _spread(lengths: tuple[int, ...], tries: int) -> list[int]:
    return [lengths[index % len(lengths)] for index in range(tries)]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, corpus: Corpus, kind: str, part: str = "held-out", most: int | None = None
) -> dict[str, float]:
    """Per token, over windows of 2,048 that do not overlap: all, or `most` evenly spread; with bits per byte."""
    tokens = torch.from_numpy(corpus.tokens(kind, part).astype("int64"))
    windows = [window for window in tokens.split(CONTEXT) if len(window) > 1]
    if most is not None:
        windows = windows[:: max(1, len(windows) // most)][:most]
    total, count = 0.0, 0
    for window in windows:
        logits = model(window[None].to(model.device)).logits[0, :-1]  # [n - 1, vocabulary]
        total += functional.cross_entropy(logits.float(), window[1:].to(model.device), reduction="sum").item()
        count += len(window) - 1
    bits_per_token = total / count / math.log(2)
    return {
        "tokens": count,
        "perplexity": round(2**bits_per_token, 3),
        "bits_per_byte": round(bits_per_token / corpus.bytes_per_token(kind, part), 4),
    }


def _needle_row(length: int, depth: float, seed: int, sources: Sources, renamed: Callable[[str, int], str]) -> Row:
    ready = needle(length - _FRAME, depth, seed + 10_000, count=lambda text: len(sources.remembered(text)))
    thing = ready.question.removeprefix("What is the secret number of the ").removesuffix("?")
    other = renamed(thing, seed)
    text, question = (part.replace(f"of the {thing}", f"of the {other}") for part in (ready.text, ready.question))
    row = Row()
    row.add([USER, *sources.encode(text), *sources.encode("\n\n" + question), END, ASSISTANT], 0)
    row.add([*sources.encode(f"The secret number of the {other} is {ready.answer}."), END], ANSWER)
    return row


def _sum_row(draw: random.Random, sources: Sources) -> Row:
    fact = sums(draw, held_out=True)
    row = Row()
    row.add([USER, *sources.encode(fact.question), END, ASSISTANT], 0)
    row.add([*sources.encode(fact.lead), *sources.encode(fact.value), END], ANSWER)
    return row


@torch.no_grad()
def _right(model: PreTrainedModel, row: Row) -> tuple[Tensor, Tensor]:
    """(right, asked), bool [n - 1]: whether each token is the model's first choice, and belongs to an answer."""
    ids = torch.tensor(row.ids[:CONTEXT])
    choice = model(ids[None, :-1].to(model.device)).logits[0].argmax(dim=-1).cpu()
    return choice == ids[1:], torch.tensor(row.worth[1:CONTEXT]) == ANSWER


def _exact(model: PreTrainedModel, rows: Iterable[Row], each: bool = False) -> float:
    """The share of rows whose answer is right as a whole; each: of all answers, where a row has several."""
    verdicts: list[bool] = []
    for row in rows:
        right, asked = _right(model, row)
        starts = torch.nonzero(asked & ~functional.pad(asked, (1, 0))[:-1])[:, 0].tolist()
        answers = [right[start:][: int((~functional.pad(asked[start:], (0, 1))).nonzero()[0])] for start in starts]
        verdicts += [bool(answer.all()) for answer in answers] if each else [all(bool(a.all()) for a in answers)]
    return round(sum(verdicts) / len(verdicts), 4)


def _copied(model: PreTrainedModel, rows: Iterable[Row]) -> float:
    """The share of repeated tokens that are the model's first choice."""
    right = asked = 0
    for row in rows:
        hit, wanted = _right(model, row)
        right, asked = right + int((hit & wanted).sum()), asked + int(wanted.sum())
    return round(right / asked, 4)
