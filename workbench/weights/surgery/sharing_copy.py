"""Copies of models that share every tensor."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from workbench.engine.attention_hook import exclusive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the tree of modules that shares all parameters and buffers with the model."""
    with exclusive(model):  # not while a run has another attention implementation set
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, dict(shared))
