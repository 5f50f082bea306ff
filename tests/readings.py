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
