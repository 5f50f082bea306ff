"""Whether a model goes on from its layers' states by several tokens at once, or has to be given one after another.

The code of some architectures (Jamba's in transformers) takes up the recurrent state of a layer only where a single
token follows, and begins from nothing where several do. What is decoded here has to be what one token after another
gives, so the model is asked: if its state is replaced by noise and several tokens come out the same, it forgot it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.engine.images import Images
from workbench.engine.states import States, keeps_states, states_of
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEFORE, _AFTER = 4, 3  # tokens read first, and on from there
_SAME = 0.02  # of the logits' norm: what a pass may differ from itself; noise changes them by about as much as they are


def fresh_states(model: PreTrainedModel) -> States | None:
    """States before anything is read, which know whether several tokens may follow at once; None where there are none.

    Costs four passes over a few tokens where layers keep a state that a token changes.
    """
    states = states_of(model)
    if states is None or not keeps_states(model):
        return states
    vocabulary = len(cast("Tensor", model.get_input_embeddings().weight))
    ids = torch.randint(0, vocabulary, (_BEFORE + _AFTER,), generator=_generator())
    before, after = ids[:_BEFORE], ids[_BEFORE:]
    positions = torch.arange(len(ids))
    begun = states.clone()
    forward(model, _Here(), before, positions[:_BEFORE], cache=begun)

    def logits(kind: str | None) -> Tensor:
        tried = begun.clone()
        for tensor in () if kind is None else tried.kinds().get(kind, ()):
            tensor.copy_(torch.randn(tensor.shape, generator=_generator()))
        return forward(model, _Here(), after, positions[_BEFORE:], cache=tried, logits=_AFTER)

    with torch.inference_mode():
        known = logits(None)
        states.singly = any(bool((logits(kind) - known).norm() <= _SAME * known.norm()) for kind in begun.kinds())
    return states


def states_after(model: PreTrainedModel, ids: Tensor, images: Images | None = None) -> States | None:
    """The states after ids [n] were read with exact attention; None for a model without any.

    images: those of the prompt that begins with them.
    """
    states = fresh_states(model)
    if states is not None and ids.numel():
        forward(model, _Here(), ids, torch.arange(ids.numel()), cache=states, images=images)
    return states


def restored(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> States | None:
    """The states that `States.saved` gave, on the model's device; None for a model without any.

    Raises ValueError where they are not those of this model.
    """
    states = fresh_states(model)
    if states is None:
        if saved:
            raise ValueError("states of layers that this model does not have")
        return None
    like = states.clone()
    forward(model, _Here(), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), cache=like)
    wanted = like.saved()
    if _sizes(saved) != _sizes(wanted):
        raise ValueError("the states of layers do not have the sizes of this model's")
    with torch.inference_mode():
        states.restore({name: x.to(wanted[name].device, wanted[name].dtype) for name, x in saved.items()})
    return states


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _sizes(saved: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shapes of saved states, without the number of tokens in those that grow."""
    return {name: [*x.shape[:1], *x.shape[2 if ".indexer." in name else 1 :]] for name, x in saved.items()}


class _Here:
    """Attention among the tokens of a pass: what came before matters to the states alone."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return causal_attention(query, key, value, scoring)
