"""TurboMind, the part that concerns the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting
from workbench.kv.stores.format import DenseFormat, Format, PackedFormat, Shape
from workbench.kv.stores.packed import WHOLE
from workbench.registry import Fidelity, Paper, Preset, param, register

_BITS = (WHOLE, 8, 4, 2)
_OPEN = "a budget decides; without one it is the engine's int4"


@register
class TurboMind(KVMethod):
    """Keep every token, keys and values each at as many bits as they are given.

    A token's key has one scale and one zero for each head, from its minimum and maximum over the head's channels, and
    so has its value; both are quantised as soon as the token has attended, and nothing stays exact. Keys and values
    need not have the same precision, and 16 bits leave a side as it is. On a GPU attention reads codes of either width
    as they lie, and no cache is written out for it (the paper's attention pipeline, which is about the kernel: our own
    shares the idea, not the layout). Queries have the model's precision, as in the authors' engine, LMDeploy.

    That engine has 16, 8 and 4 bits for keys and values together; the paper's pipeline takes any pair, of which 2 bits
    are ours. There a token sees itself rounded too, here each token's own pass and the reading of the prompt are exact.
    With a budget, "auto" takes the most bits that fit, the uncompressed cache included; without one it is 4. Where both
    are open, keys get one step more before values do: with 8 bits for keys and 4 for values the default model's answers
    diverge by 0.009 nats, the other way round by 0.085 (4 and 4: 0.108, 8 and 8: 0.0005).
    """

    key = "turbomind"
    title = "TurboMind"
    paper = Paper(
        "Efficient Mixed-Precision Large Language Model Inference with TurboMind", "Zhang et al. 2025", "2508.15601"
    )
    claim = "up to 61 % lower latency than other mixed-precision frameworks"
    fidelity = Fidelity(
        "deviates", "the cache's numbers only: the claim is about kernels for GPUs, which are not these"
    )
    presets = (
        Preset("int4", "InternLM/lmdeploy, docs/en/quantization/kv_quant.md, 0bf868e", key_bits=4, value_bits=4),
        Preset("int8", "the same", key_bits=8, value_bits=8),
    )
    of_entries = True

    key_bits: Literal["auto", 2, 4, 8, 16] = param(
        "auto", help="bits of the keys, or the most that fit the budget", own=_OPEN
    )
    value_bits: Literal["auto", 2, 4, 8, 16] = param(
        "auto", help="bits of the values, or the most that fit the budget", own=_OPEN
    )

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        widest = max(width for shape in shapes for width in (shape.key_width, shape.value_width))
        if limit is None:
            keys, values = (4 if bits == "auto" else bits for bits in (self.key_bits, self.value_bits))
            return _format(dtype, keys, values, widest)
        return first_fitting((_format(dtype, *pair, widest) for pair in self._pairs()), shapes, limit)

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Bits of keys and values that a budget may choose, best first."""
        both = self.key_bits == self.value_bits == "auto"
        for keys in _BITS if self.key_bits == "auto" else (self.key_bits,):
            for values in _BITS if self.value_bits == "auto" else (self.value_bits,):
                if not both or _BITS.index(values) - _BITS.index(keys) in (0, 1):
                    yield keys, values


def _format(dtype: torch.dtype, key_bits: int, value_bits: int, group: int) -> Format:
    if key_bits == value_bits == WHOLE:
        return DenseFormat(dtype)
    return PackedFormat(dtype, key_bits, group, 0, key_axis="token", value_bits=value_bits)
