"""What a model is shown beside its token ids: images, as its processor prepared them, and where their tokens stand.

A model puts what it sees of an image in the place of the embeddings of the image's tokens. A pass over a whole prompt
is given the images themselves; a pass over some of its tokens gets the embeddings that enter the decoder, which the
model computes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from workbench.engine.masks import AnnouncedMask
from workbench.errors import NotApplicable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What decoders are given in any pass; tensors under other names are what some see of images between their layers.
_USUAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "cache_position")


class Entered(NamedTuple):
    """What enters a decoder: embeddings [n, c]; coordinates int64 [3, n], or None where positions are places; whether
    the model adds what it sees between layers too.
    """

    embeddings: Tensor
    coordinates: Tensor | None
    between: bool


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a prompt, and which of its tokens stand for them.

    inputs: what the model's processor made of them (pixel values, grids), by the names of the model's arguments. ids:
    the prompt, int64 [n]. which: the image that each token stands for, counted from 0, int64 [n]; -1: it is text.
    coordinates: where tokens are turned to in time, height and width (M-RoPE), int64 [3, n]; None: to their places.
    """

    inputs: Mapping[str, Tensor]
    ids: Tensor
    which: Tensor
    coordinates: Tensor | None = None
    _entered: WeakKeyDictionary[PreTrainedModel, Entered] = field(default_factory=WeakKeyDictionary, repr=False)

    @property
    def tokens(self) -> int:
        """The length of the prompt."""
        return int(self.ids.numel())

    @property
    def mask(self) -> Tensor:
        """Which tokens stand for images, bool [n]."""
        return self.which >= 0

    @property
    def counts(self) -> list[int]:
        """How many tokens stand for each image."""
        return torch.bincount(self.which[self.mask]).tolist()

    @property
    def nbytes(self) -> int:
        """Bytes held: of the prepared images, and of embeddings that were computed for passes over parts."""
        entered = sum(entered.embeddings.nbytes for entered in self._entered.values())
        return sum(tensor.nbytes for tensor in self.inputs.values()) + entered

    def among(self, ids: Tensor) -> bool:
        """Whether some of token ids [q] stand for parts of an image, whatever image."""
        return bool(torch.isin(ids.cpu(), self.ids[self.mask]).any())

    def labels(self) -> dict[int, str]:
        """How views name the tokens of images, by place: "[image 1, 12]" is the twelfth of the first."""
        seen = [0] * len(self.counts)
        named = {}
        for place, image in enumerate(self.which.tolist()):
            if image >= 0:
                seen[image] += 1
                named[place] = f"[image {image + 1}, {seen[image]}]"
        return named

    def placed(self, coordinates: Tensor | None) -> Images:
        """The same with the coordinates that a pass showed."""
        return replace(self, coordinates=coordinates)

    def turned_to(self, positions: Tensor) -> Tensor:
        """What positions int64 [q] are rotated by: [3, q] within a prompt with coordinates, else [q]."""
        if self.coordinates is None:
            return positions
        after = positions + (int(self.coordinates.max()) + 1 - self.tokens)
        if bool((positions >= self.tokens).all()):
            return after  # text, alike on all axes
        inside = self.coordinates[:, positions.clamp_max(self.tokens - 1)]
        return torch.where(positions < self.tokens, inside, after)

    def given(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        positions: Tensor,
        places: Tensor | None,
        enter: Callable[[], Entered],
    ) -> dict[str, Tensor]:
        """What a pass over token ids [q] at positions int64 [q] is given, by the names of the model's arguments.

        places: which tokens of the prompt, and after it, they are, int64 [q] (None: those of their positions). enter:
        computes what enters the decoder of the whole prompt. Raises NotApplicable for images in parts where the model
        adds to them between its layers, or where tokens do not stand at their places in the prompt.
        """
        device = cast("Tensor", model.get_input_embeddings().weight).device
        where = positions if places is None else places
        if self._whole(ids, where):
            return {"input_ids": ids.to(device)[None], **{name: x.to(device) for name, x in self.inputs.items()}}
        said = self.turned_to(positions).to(device)
        given = {"position_ids": said[:, None] if said.ndim == 2 else said[None]}
        inside = where < self.tokens
        here = inside & self.mask[where.clamp_max(self.tokens - 1)]
        if not bool((self.ids[where[inside]] == ids[inside].cpu()).all()) or (
            self.coordinates is not None and bool(here.any()) and not torch.equal(where, positions)
        ):
            raise NotApplicable("the tokens of images cannot be read elsewhere than where they stand in the prompt")
        if not bool(here.any()):
            return {"input_ids": ids.to(device)[None], **given}
        if model not in self._entered:
            self._entered[model] = enter()
        entered = self._entered[model]
        if entered.between:
            raise NotApplicable(
                f"{type(model).__name__} adds what it sees of images between its layers too, so a prompt with images "
                "is read at once and not in parts"
            )
        embeddings = model.get_input_embeddings()(ids.to(device))
        embeddings[here.to(device)] = entered.embeddings[where[here].to(device)]
        return {"inputs_embeds": embeddings[None], **given}

    def _whole(self, ids: Tensor, where: Tensor) -> bool:
        return torch.equal(where, torch.arange(self.tokens)) and torch.equal(ids.cpu(), self.ids)


def image_token(model: PreTrainedModel) -> int | None:
    """The token id that stands for a part of an image in a model's prompts; None where it reads text alone."""
    names = ("image_token_id", "image_token_index")
    found = next((getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None), None)
    return None if found is None else int(found)


class _Entered(Exception):
    """The pass has come to the decoder."""


@contextmanager
def noting(model: PreTrainedModel, *, stop: bool = False) -> Iterator[list[Entered]]:
    """Until the block ends, note what enters the model's decoder; stop: let no pass go further."""
    noted: list[Entered] = []

    def hook(_module: Any, _args: Any, given: Mapping[str, Any]) -> None:
        for mask in tree_leaves(given.get("attention_mask")):
            if isinstance(mask, AnnouncedMask) and mask.span.refusal is not None:
                raise NotApplicable(f"{type(model).__name__} {mask.span.refusal}: it cannot be read exactly")
        more = [value for name, value in given.items() if name not in _USUAL]
        between = any(isinstance(x, Tensor) for x in tree_leaves(more))
        noted.append(Entered(given["inputs_embeds"][0], _coordinates(given.get("position_ids")), between))
        if stop:
            raise _Entered

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield noted
    except _Entered:
        pass
    finally:
        handle.remove()


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Let a model forget, when the block ends, what it noted of a text: some keep how far images moved positions."""
    kept = [(module, dict(vars(module))) for module in (model, model.base_model)]
    try:
        yield
    finally:
        for module, before in kept:
            vars(module).update({name: value for name, value in before.items() if vars(module)[name] is not value})


def _coordinates(position_ids: Tensor | None) -> Tensor | None:
    """The last three axes of positions [3 or 4, 1, n], [3, n]; None for one axis, or three that count tokens."""
    if position_ids is None or position_ids.ndim < 3:
        return None
    axes = position_ids[-3:, 0].long().cpu()
    return None if bool((axes == torch.arange(axes.shape[1])).all()) else axes
