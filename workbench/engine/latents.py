"""Latent attention (MLA): a layer's cache holds one latent and one rotated row a token, and every head makes its keys
and values of them.

Such a layer hands both rows to the model's cache and expands what comes back (`expand_kv`). A pass here has no cache of
the model's, so what is handed to it is noted, for handlers that hold rows in place of keys and values.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}  # of a row's norm, by precision
_TRIED = 4  # rows with which it is tried whether the expansion is linear


@dataclass(frozen=True, repr=False)
class Expansion:
    """How a layer makes keys and values of its rows, in the model's own way and precision `dtype`."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [h, n, d] and values [h, n, dv] of latent [1, n, r] and rotated [1, n, w]."""
        layer: Any = self.module
        with torch.no_grad():
            keys, values = layer.expand_kv(latent[None].to(self.dtype), rotated[None].to(self.dtype))
        return keys[0].to(latent.dtype), values[0].to(latent.dtype)

    def maps(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """What rows like latent [1, n, r] and rotated [1, n, w] are multiplied with: [h, r + w, d] for the keys, where
        the latent comes first, and [h, r, dv] for the values.
        """
        rank, width = latent.shape[-1], rotated.shape[-1]
        units = torch.eye(rank + width, dtype=latent.dtype, device=latent.device)[None]
        keys, values = self(units[..., :rank], units[..., rank:])
        return keys, values[:, :rank]


@dataclass(frozen=True, repr=False)
class Latents:
    """The rows of a layer's tokens, of which all its heads make their keys and values.

    latent [1, n, r], rotated [1, n, w]: in the model's precision, wherever the recording rests.
    """

    latent: Tensor
    rotated: Tensor
    expansion: Expansion

    def to(self, device: torch.device) -> Self:
        return replace(self, latent=self.latent.to(device), rotated=self.rotated.to(device))

    def blank(self, tokens: int) -> Self:
        """As many rows without data."""
        rows = (torch.empty(1, tokens, x.shape[-1], dtype=x.dtype, device="meta") for x in (self.latent, self.rotated))
        latent, rotated = rows
        return replace(self, latent=latent, rotated=rotated)

    @property
    def kind(self) -> str:
        """What the layer's cache holds, in words: the numbers of a latent and of a rotated row."""
        return f"MLA, latent {self.latent.shape[-1]} + {self.rotated.shape[-1]}"

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.latent.nbytes + self.rotated.nbytes

    def makes(self, keys: Tensor, values: Tensor, close: float | None = None) -> bool:
        """Whether keys [h, n, d] and values [h, n, dv] are these rows times the expansion's maps, and no more: up to
        rounding, or to `close` of their norm.
        """
        to_keys, to_values = self.expansion.maps(self.latent, self.rotated)
        if to_values.shape[-1] != values.shape[-1] or to_keys.shape[-1] != keys.shape[-1]:
            return False
        latent, rotated = self.latent[:, :_TRIED].float(), self.rotated[:, :_TRIED].float()
        pairs = (
            (torch.cat([latent, rotated], dim=-1) @ to_keys.float(), keys[:, :_TRIED].float()),
            (latent @ to_values.float(), values[:, :_TRIED].float()),
        )
        limit = close or _CLOSE.get(keys.dtype, 1e-4)
        return all(bool((made - known).norm() <= limit * known.norm()) for made, known in pairs)


class Noting:
    """A model's cache that notes what a layer hands it. Mixed into those that a pass here has."""

    _noted: tuple[Tensor, Tensor] | None = None

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Remember what a layer handed, [1, k, n, d] each, until it attends."""
        self._noted = keys, values

    def taken(self, module: nn.Module, key: Tensor) -> Latents | None:
        """The rows of which the layer that attends with key [1, h, n, d] made its keys; None where it made none."""
        noted, self._noted = self._noted, None
        if noted is None or not hasattr(module, "expand_kv"):
            return None
        latent, rotated = noted
        rows = latent.shape[1] == rotated.shape[1] == 1 and latent.shape[2] == rotated.shape[2] == key.shape[2]
        if not rows or latent.data_ptr() == key.data_ptr():  # what comes expanded is no latent
            return None
        return Latents(latent[0], rotated[0], Expansion(module, latent.dtype))


def expands(model: PreTrainedModel) -> bool:
    """Whether layers of the model expand latents."""
    return _expanding(type(model.get_decoder()).__module__)


def expansions(model: PreTrainedModel) -> dict[int, Expansion]:
    """How each layer that can expand latents does it, by its number in the model."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    return {cast("int", layer.layer_idx): Expansion(layer, model.dtype) for layer in layers}


@cache
def _expanding(module: str) -> bool:
    """Whether layers that are written in this module do so."""
    try:
        return ".expand_kv(" in inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # written in no file
        return False
