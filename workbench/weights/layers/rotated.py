"""Modules of a decoder whose weights are rotated: what rotates at its ends and before layers, as it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.core.hadamard import rotate, unrotate
from workbench.measure.memory import tensor_bytes
from workbench.weights.layers.compact import CompactLinear, Description


class RotatedEmbedding(nn.Embedding):
    """An embedding whose vectors are looked up in the original's own table and then rotated."""

    signs: Tensor

    def __init__(self, original: nn.Embedding, signs: Tensor) -> None:
        super().__init__(original.num_embeddings, original.embedding_dim, original.padding_idx, device="meta")
        self.weight = original.weight
        self.register_buffer("signs", signs)

    def forward(self, input: Tensor) -> Tensor:
        vectors = super().forward(input)
        return rotate(vectors * self.signs.to(vectors.dtype))


class UnrotatedNorm(nn.Module):
    """The norm at a decoder's end, x / rms(x) * weight, which undoes the rotation before it; the weight is the
    original's own.
    """

    signs: Tensor
    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, eps: float, signs: Tensor) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.eps = eps
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * _normalised(unrotate(x) * self.signs.to(x.dtype), self.eps)


class PlainNorm(nn.Module):
    """x / rms(x): a norm whose weight has gone into the layers behind it."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self.eps)


def _normalised(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


class RotatedLinear(CompactLinear):
    """A linear layer that rotates what enters it: all numbers together; or, of several heads side by side, those that
    have the same place in their heads.
    """

    heads: int = 1

    def __init__(self, inner: nn.Linear | CompactLinear, heads: int = 1) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self.inner, self.heads = inner, heads

    @property
    def nbytes(self) -> int:
        """Live bytes of everything that stands for the weight, which may still be plain."""
        return tensor_bytes([*(w for w in self.inner.parameters() if w is not self.inner.bias), *self.buffers()])

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        inner = self.inner
        weight = (
            inner.rows(first, last, dtype) if isinstance(inner, CompactLinear) else inner.weight[first:last].to(dtype)
        )
        return across(weight, self.heads, unrotate)

    def forward(self, x: Tensor) -> Tensor:
        turned = across(x, self.heads, rotate)
        if isinstance(self.inner, nn.Linear) and self.inner.weight.dtype != x.dtype:
            bias = None if self.inner.bias is None else self.inner.bias.to(x.dtype)
            return linear(turned, self.inner.weight.to(x.dtype), bias)
        out: Tensor = self.inner(turned)
        return out

    def describe(self) -> Description:
        return self.inner.describe() if isinstance(self.inner, CompactLinear) else super().describe()


def across(x: Tensor, heads: int, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """x [..., d] rotated or back by `turn`: all of it together; or, with several heads, across them."""
    if heads == 1:
        return turn(x)
    return turn(x.unflatten(-1, (heads, -1)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)
