"""Latent attention (MLA): a layer's cache holds one latent and one rotated row a token, and every head makes its keys
and values of them.

Such a layer hands both rows to the model's cache and expands what comes back (`expand_kv`). A pass here has no cache of
the model's, so what is handed to it is noted, for handlers that hold rows in place of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TRIED = 4  # rows with which an expansion is tried


@dataclass(frozen=True, repr=False)
class Expansion:
    """How a layer makes keys and values of its rows, in the model's own way and precision `dtype`.

    linear: whether they are rows times its `maps`, which a module that rounds what it is given has not. plain: whether
    these are one projection's weight (`kv_b_proj`), where they can be read.
    """

    module: nn.Module
    dtype: torch.dtype
    linear: bool = False
    plain: bool = False

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
        if self.plain:
            return self._of_weight(rotated.shape[-1])
        rank, width = latent.shape[-1], rotated.shape[-1]
        units = torch.eye(rank + width, dtype=latent.dtype, device=latent.device)[None]
        keys, values = self(units[..., :rank], units[..., rank:])
        return keys, values[:, :rank]

    def _of_weight(self, width: int) -> tuple[Tensor, Tensor]:
        """The same out of the projection's weight, in its precision: keys' channels of a head before the values', and
        `width` rotated ones behind those of the keys.
        """
        layer: Any = self.module
        weight = layer.kv_b_proj.weight.detach()
        size, rank = layer.v_head_dim, weight.shape[1]
        by_head = weight.view(-1, layer.qk_nope_head_dim + size, rank).transpose(1, 2)  # [h, r, d - w + dv]
        to_keys, to_values = by_head[..., :-size], by_head[..., -size:]
        rotated = torch.eye(width, dtype=weight.dtype, device=weight.device).expand(len(by_head), -1, -1)
        latent, rotated = pad(to_keys, (0, width)), pad(rotated, (to_keys.shape[-1], 0))
        return torch.cat([latent, rotated], dim=1), to_values

    def looked_at(self, latent: Tensor, rotated: Tensor) -> Expansion:
        """The same, knowing of what kind it is for rows like these: [1, n, r] and [1, n, w]."""
        latent, rotated = latent[:, :_TRIED], rotated[:, :_TRIED]
        maps = self.maps(latent, rotated)
        rows = torch.cat([latent, rotated], dim=-1).float(), latent.float()
        made = [x @ to.float() for x, to in zip(rows, maps, strict=True)]
        if not _alike(made, self(latent, rotated), _close(self.dtype)):
            return self
        plain = replace(self, linear=True, plain=True)
        projection = getattr(self.module, "kv_b_proj", None)
        if type(projection) is nn.Linear and projection.bias is None and projection.weight.device == latent.device:
            # Where sizes go by other names, or another order, it is not plain.
            with suppress(AttributeError, RuntimeError):
                if _alike(plain.maps(latent, rotated), maps, _close(torch.float32)):
                    return plain
        return replace(self, linear=True)


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

    def looked_at(self) -> Self:
        """The same, with an expansion that was looked at."""
        return replace(self, expansion=self.expansion.looked_at(self.latent, self.rotated))

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
        """Whether keys [h, n, d] and values [h, n, dv] are made of these rows: up to rounding, or to `close` of their
        norm.
        """
        made = self.expansion(self.latent[:, :_TRIED], self.rotated[:, :_TRIED])
        return _alike(made, (keys[:, :_TRIED], values[:, :_TRIED]), close or _close(self.expansion.dtype))


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


def _close(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 0.03, torch.float16: 0.01}.get(dtype, 1e-4)


def _alike(some: Sequence[Tensor], others: Sequence[Tensor], limit: float) -> bool:
    """Whether tensors differ from others by no more than `limit` of the norm of these."""
    pairs = list(zip(some, others, strict=True))
    return all(
        x.shape == y.shape and bool((x.float() - y.float()).norm() <= limit * y.float().norm()) for x, y in pairs
    )


def expansions(model: PreTrainedModel) -> dict[int, Expansion]:
    """How each layer that can expand latents does it, by its number in the model."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "expand_kv")]
    return {cast("int", layer.layer_idx): Expansion(layer, model.dtype) for layer in layers}
