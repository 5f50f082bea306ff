"""Modules of a decoder whose weights are rotated: what rotates at its ends and before layers, as it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.hadamard import rotate, unrotate
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
    """The norm at a decoder's end, which undoes the rotation before it."""

    signs: Tensor

    def __init__(self, norm: nn.Module, signs: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(unrotate(x) * self.signs.to(x.dtype))
        return out


class PlainNorm(nn.Module):
    """x / rms(x): a norm whose weight has gone into the layers behind it."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)


class RotatedLinear(CompactLinear):
    """A linear layer that rotates what enters it."""

    def __init__(self, inner: nn.Linear | CompactLinear) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self.inner = inner

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        inner = self.inner
        weight = (
            inner.rows(first, last, dtype) if isinstance(inner, CompactLinear) else inner.weight[first:last].to(dtype)
        )
        return unrotate(weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(rotate(x))
        return out

    def describe(self) -> Description:
        return self.inner.describe() if isinstance(self.inner, CompactLinear) else super().describe()
