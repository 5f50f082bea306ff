"""Layers that keep another state than keys and values: linear attention, gated delta nets, Mamba, short convolutions,
indexers of sparse attention.

Such a state is not compressed here: it has one size however long the text is, but for an indexer's, which is a small
key of every token. The model's own kind of cache keeps it, and of a pass no more than that: keys and values are handed
back as they come, and the lengths reported are those of a pass without a cache, since a handler holds what was read
before. Only indexers look at tokens of earlier passes by themselves: for them lengths count from the text's start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, Self, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from workbench.engine.latents import Noting
from workbench.errors import NotApplicable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMPTY = ("moe", "mlp")  # layers without attention that keep nothing either


class States(Noting):
    """The states of a model's layers after what has been read. Mixed into the model's own kind of cache (`states_of`).

    places: the number of each layer that attends among those that do, by its number in the model. keeping: the numbers
    of those that keep a state. singly: whether tokens have to follow one by one, for the model forgets its state where
    several do (see `runtime/continuing.py`).
    """

    layers: list[Any]
    places: Mapping[int, int]
    keeping: tuple[int, ...] = ()
    singly: bool = False
    _caller: int | None = None

    # -- what a model's cache is asked

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The keys and values of this pass, which the handler adds to those before."""
        self._caller = layer_idx
        self.note(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No keys of attention are held here."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As without a cache, without indexers: a mask's places count from this pass."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Likewise: length and offset of this pass's keys, for indexers of all keys."""
        return self.seen + query_length, 0

    # -- what the workbench asks

    @property
    def seen(self) -> int:
        """How many tokens of earlier passes a mask has to show: all where there are indexers, else none."""
        keys = (getattr(layer, "indexer_keys", None) for layer in self.layers)
        return next((held.shape[1] for held in keys if held is not None), 0)

    def caller(self, said: int | None) -> int | None:
        """The number of the layer whose keys came last, else the one that the layer says: modules that several layers
        share (Zamba) do not know theirs.
        """
        layer, self._caller = self._caller, None
        return said if layer is None else layer

    def clone(self) -> Self:
        """A copy that goes on by itself."""
        with torch.inference_mode():
            return deepcopy(self)

    def on(self, who: str) -> Self:
        """A copy for one pass over several tokens. Raises NotApplicable, in the name of `who`, where the model forgets
        its states in one.
        """
        if self.singly and self.begun:
            raise NotApplicable(
                f"{who} lets the model read on by several tokens at once, where this one forgets the states that its "
                "layers keep beside keys and values (it reads on token by token)"
            )
        return self.clone()

    def kinds(self) -> dict[str, tuple[Tensor, ...]]:
        """All that is held, by what cache or layers call it (conv_states, recurrent_states)."""
        held: dict[str, tuple[Tensor, ...]] = {}
        for keeper in (self, *self.layers):
            for name, value in vars(keeper).items():
                # What a layer keeps under a private name is a constant (the width of a window).
                if not name.startswith("_") and (tensors := tuple(_tensors([value]))):
                    held[name] = (*held.get(name, ()), *tensors)
        return held

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return tuple(tensor for tensors in self.kinds().values() for tensor in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def untouched(self) -> tuple[int, ...]:
        """Layers of the model whose state no pass has written, although they should keep one here."""
        return tuple(
            index
            for index, layer in enumerate(self.layers)
            if index in self.keeping and not any(layer.has_previous_state.values())
        )

    @property
    def begun(self) -> bool:
        """Whether something has been read."""
        return any(True for _ in self.tensors())

    def saved(self) -> dict[str, Tensor]:
        """The states by name, for `restore`. Raises NotApplicable for a cache of a kind that only its model knows."""
        found = {
            f"{index}.{kind}.{number}": tensor
            for index, layer in enumerate(self.layers)
            for kind in ("conv", "recurrent")
            for number, tensor in getattr(layer, f"{kind}_states", {}).items()
            if tensor is not None
        }
        keys = ((index, getattr(layer, "indexer_keys", None)) for index, layer in enumerate(self.layers))
        found |= {f"{index}.indexer.0": held for index, held in keys if held is not None}
        if sum(tensor.nbytes for tensor in found.values()) != self.nbytes:
            raise NotApplicable("this model keeps its state in a cache of a kind of its own, which cannot be saved")
        return found

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `saved` gave, on this fresh cache; tensors on their device."""
        source: Any = self
        for name, tensor in saved.items():
            index, kind, number = name.split(".")
            if kind == "indexer":
                source.update_indexer(tensor, int(index))
                continue
            update = source.update_conv_state if kind == "conv" else source.update_recurrent_state
            update(tensor, int(index), state_idx=int(number))


def keeps_states(model: nn.Module) -> bool:
    """Whether some of a model's layers keep another state than keys and values in its cache."""
    return any(_kinds(model)[1])


def has_indexer(model: nn.Module) -> bool:
    """Whether layers of the model choose by keys of their own which positions each token attends to."""
    source: Any = model
    return "indexed_attention" in (getattr(source.config.get_text_config(decoder=True), "layer_types", None) or ())


def attending(model: nn.Module) -> tuple[int, ...]:
    """The numbers of a model's layers that attend, ascending: all where none keeps another state."""
    attends, states = _kinds(model)
    if not any(states):
        source: Any = model
        return tuple(range(source.config.get_text_config(decoder=True).num_hidden_layers))
    return tuple(index for index, does in enumerate(attends) if does)


def states_of(model: PreTrainedModel) -> States | None:
    """States that are still empty; None for a model whose layers keep none."""
    if not keeps_states(model) and not has_indexer(model):
        return None
    own = _own_cache(model)
    made: Any = type("StatesOfAPass", (States, own), {})
    config = model.config.get_text_config(decoder=True)
    states = made(config=config) if "config" in signature(own).parameters else made()
    states.places = {layer: place for place, layer in enumerate(attending(model))}
    states.keeping = tuple(index for index, keeps in enumerate(_kinds(model)[1]) if keeps)
    return cast("States", states)


def _kinds(model: nn.Module) -> tuple[list[bool], list[bool]]:
    """Of each layer that a config describes: whether it attends, and whether it keeps another state."""
    from transformers import cache_utils

    source: Any = model
    names = getattr(source.config.get_text_config(decoder=True), "layer_types", None) or ()
    kinds = [cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.get(name, cache_utils.DynamicLayer) for name in names]
    attends = [
        n not in _EMPTY and issubclass(k, cache_utils.CacheLayerMixin) for n, k in zip(names, kinds, strict=True)
    ]
    mixin = cache_utils.LinearAttentionCacheLayerMixin
    return attends, [n not in _EMPTY and issubclass(k, mixin) for n, k in zip(names, kinds, strict=True)]


def _own_cache(model: PreTrainedModel) -> type:
    """The kind of cache that a model makes for itself, as its decoder's signature names it."""
    from transformers import DynamicCache

    named = get_type_hints(type(model.get_decoder()).forward).get("past_key_values")
    kinds = [kind for kind in get_args(named) or (named,) if isinstance(kind, type) and issubclass(kind, DynamicCache)]
    return kinds[0] if kinds else DynamicCache


def _tensors(held: Iterable[Any]) -> Iterator[Tensor]:
    for value in held.values() if isinstance(held, Mapping) else held:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple):
            yield from _tensors(value)
