"""What tests that read something share: token ids, a session that has read them, and decoders over what was planned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from workbench.kv.plan import Plan
from workbench.runtime.decode import Decoder


def ids_of(count: int, seed: int | None = None, *, low: int = 0, high: int = 256) -> Tensor:
    """Random ids [count] of a tiny model's vocabulary."""
    generator = torch.Generator().manual_seed(count + low if seed is None else seed)
    return torch.randint(low, high, (count,), generator=generator)


def session_on(model: PreTrainedModel, prompt: Any, **options: Any) -> wb.Session:
    """A session of a model without a tokenizer that has read a prompt."""
    session = wb.Session((model, None), **options)
    session.read(prompt)
    return session


def decoder_of(model: PreTrainedModel, plan: Plan) -> Decoder:
    """A decoder over what was planned, that evicts where the plan does."""
    return Decoder(model, plan.stores(), plan.position, plan.stages.evict if plan.evicts else None)


def answering(model: PreTrainedModel, recipe: object, tokens: int = 150) -> tuple[Decoder, int]:
    """A decoder that has read a prompt and a question, and the first token of its answer."""
    session = session_on(model, ids_of(tokens, 0), kv_dtype="float32")
    decoder = decoder_of(model, session.plan(recipe))
    return decoder, int(decoder.feed(ids_of(9, 1))[-1].argmax())


def plain(decoder: Decoder, token: int, count: int) -> list[int]:
    """The next `count` tokens after `token`, by the decoder itself; all but the last are read."""
    found = []
    for _ in range(count):
        token = int(decoder.feed(torch.tensor([token]))[-1].argmax())
        found.append(token)
    return found
