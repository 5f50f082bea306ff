"""Random attention inputs, and a method run on them."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext
from workbench_kernels import Scoring

Inputs = tuple[Tensor, Tensor, Tensor]
"""query [h, n, d], key [k, n, d], value [k, n, dv]"""

SCORING = Scoring(0.4)


def drawn(
    tokens: int, heads: int = 4, kv_heads: int = 2, d: int = 8, dv: int = 6, sharpness: float = 1.0, seed: int = 0
) -> Inputs:
    """Normally distributed inputs; sharpness: what queries are multiplied with."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    shapes = ((heads, tokens, d), (kv_heads, tokens, d), (kv_heads, tokens, dv))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query * sharpness, key, value


def sharp(tokens: int, heads: int = 4, kv_heads: int = 2, d: int = 8, dv: int = 6) -> Inputs:
    """Inputs whose attention is not far from picking single keys."""
    return drawn(tokens, heads, kv_heads, d, dv, sharpness=2)


def alike(tokens: int, heads: int = 4, kv_heads: int = 2, d: int = 8, dv: int = 6) -> Inputs:
    """Inputs of which neighbouring keys are alike."""
    query, key, value = drawn(tokens, heads, kv_heads, d, dv)
    return query, key.cumsum(1) / (1 + torch.arange(tokens)).sqrt()[:, None], value


def attend(method: AttentionMethod, inputs: Inputs, scoring: Scoring = SCORING) -> tuple[Tensor, int]:
    """A method's output over a whole prompt, and how many score entries it computed."""
    context = PassContext(1, inputs[0].shape[1])
    return method.attend(*inputs, scoring, context), context.computed[0]
