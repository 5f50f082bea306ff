"""The rotary parameters that a GGUF file's metadata and factor tensors stand for."""

from __future__ import annotations

import math
from typing import Any

from workbench.errors import CheckpointRefused
from workbench.models.gguf.header import Header
from workbench.models.gguf.settings import Settings, shortened
from workbench.models.gguf.tensors import tensor

_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rotary_tensors(header: Header) -> set[str]:
    """The tensors of a file that its config has taken in."""
    return {name for name in _TENSORS if name in header.tensors}


def rope(s: Settings, head_dim: int, *, own_factors: bool = False) -> dict[str, Any]:
    """The rotary parameters: base, scaling, and Llama 3's factors. own_factors: the caller sees to rope_factors_*."""
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": s.number("rope.freq_base", 10000.0)}
    rotated = s.count("rope.dimension_count", head_dim)
    if rotated != head_dim and not own_factors:
        raise s.refusal("rope.dimension_count", f"is {rotated}, and heads of {head_dim} channels turn as a whole")
    kind, factor = s.take("rope.scaling.type", None), s.number("rope.scaling.factor", 1.0)
    s.take("rope.scaling.finetuned", None)  # says how the model was made, not what it computes
    original = s.count("rope.scaling.original_context_length", None)
    stretch = s.number("rope.scaling.attn_factor", 1.0)
    if (legacy := s.number("rope.scale_linear", 1.0)) != 1.0:
        kind, factor = "linear", legacy
    if own_factors:
        return {**rotary, "kind": kind, "original": original, "stretch": stretch, "rotated": rotated}
    if kind == "linear" and factor > 0:
        rotary |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor > 0 and original:
        rotary |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := s.number(f"rope.scaling.{theirs}", None)) is not None:
                rotary[ours] = value
        if stretch != 1.0:
            rotary["attention_factor"] = stretch * (0.1 * math.log(factor) + 1.0)
            stretch = 1.0
    elif kind not in (None, "none"):
        raise s.refusal("rope.scaling.type", f"is {shortened(kind)}, and only none, linear and yarn are read here")
    if stretch != 1.0:
        raise s.refusal("rope.scaling.attn_factor", f"is {stretch}, which belongs to no scaling that is read here")
    if "rope_freqs.weight" in s.header.tensors:
        if rotary["rope_type"] != "default":
            raise s.refusal("rope.scaling.type", "stands beside rope_freqs.weight, and one of them would be lost")
        rotary |= _llama3(s, rotary["rope_theta"], head_dim)
    return rotary


def _llama3(s: Settings, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling whose factors rope_freqs.weight [d / 2] holds: each frequency is divided by its own.

    The file has the factors and not what they were made from, so those of the Llama 3 family are tried.
    """
    import torch

    factors = tensor(s.header, "rope_freqs.weight").double()
    if factors.shape != (head_dim // 2,):
        raise CheckpointRefused(
            f"{s.header.path}: rope_freqs.weight has {factors.numel()} factors for {head_dim} channels"
        )
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    low, high, original, factor = 1.0, 4.0, 8192, round(factors.max().item(), 3)
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise CheckpointRefused(
            f"{s.header.path}: the factors in rope_freqs.weight are not those of Llama 3's scaling; use a safetensors "
            "folder of the same model"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
