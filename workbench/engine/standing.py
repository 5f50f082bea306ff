"""Layers that ask the model's cache how many tokens came before theirs (Llama 4, which sharpens attention by position),
or hand it what they expand afterwards (MLA).

A pass here has no cache of the model's: a handler holds what was read before. What is asked for the position alone, or
for what it was given, gets a cache that holds nothing and knows where it stands.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from workbench.engine.latents import Noting
from workbench.errors import NotApplicable

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


class Standing(Noting):
    """What a model takes for its cache: `begin` tokens came before, int64 [], and none of their keys are here."""

    def __init__(self, begin: Tensor) -> None:
        self.begin = begin

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """Where the tokens of this pass begin."""
        return self.begin

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As without a cache: a mask's places count from this pass."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As without a cache: length and offset of this pass's keys."""
        return query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The keys and values of this pass as they come."""
        self.note(key_states, value_states)
        return key_states, value_states


def standing(model: PreTrainedModel, positions: Tensor, following: bool) -> Cache | None:
    """For a pass at positions int64 [n] of a model whose layers ask where they are, or expand latents; None where none
    does.

    following: whether the positions follow one another. Raises NotApplicable where they do not, for layers that are
    told the first take the others for those after it; unless all lie before the place from which positions count.
    """
    if not _asks(type(model).__module__):
        expands = _expands(type(model.get_decoder()).__module__)
        return cast("Cache", Standing(positions[0].to(model.device))) if expands else None
    config: Any = model.config.get_text_config()
    counts_from = getattr(config, "floor_scale", 0)  # Llama 4 sharpens by floor((position + 1) / floor_scale)
    if not following and int(positions.max()) + 1 >= counts_from:
        raise NotApplicable(
            f"{type(model).__name__} takes tokens that are read together for neighbours, which they are not here"
        )
    return cast("Cache", Standing(positions[0].to(model.device)))


@cache
def _asks(module: str) -> bool:
    """Whether layers that are written in this module do so."""
    return "get_seq_length(self.layer_idx)" in _source(module)


@cache
def _expands(module: str) -> bool:
    """Whether layers that are written in this module expand latents, and ask nothing of a cache that is not here."""
    source = _source(module)
    asked = re.findall(r"\bpast_key_values\.(\w+)", source)
    return ".expand_kv(" in source and all(hasattr(Standing, name) for name in asked)


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # written in no file
        return ""
