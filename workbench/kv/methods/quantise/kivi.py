"""KIVI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from workbench.errors import BadParameter
from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting
from workbench.kv.stores.format import DenseFormat, Format, PackedFormat, Shape
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class KIVI(KVMethod):
    """Keep every token at few bits: keys quantised per channel, values per token, the newest tokens exact.

    Keys share a scale and zero over `group` tokens of a channel, values over `group` channels of a token, both from
    the group's minimum and maximum. The newest tokens stay at full precision: of n tokens the keys of the last n %
    residual, which are quantised all together once there are `residual` of them, and the values of the last
    `residual`, which leave one at a time. A token leaves after its own pass (section 3.3, algorithm 1).

    With a budget, "auto" takes the most bits that fit, the uncompressed cache included, and 2 without one, as
    published. Where the residual does not fit into the budget it is lowered, a group at a time; at 0, keys wait for
    one group. Other differences from the published code: scale and zero are float16 for models of any precision, and
    the scale belongs to the rounded zero; a group of equal numbers is kept as it is (the code divides by zero); groups
    need not divide the head size; several tokens may be read at once.
    """

    key = "kivi"
    title = "KIVI"
    paper = Paper("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "Liu et al. 2024", "2402.02750")
    claim = "2 bits with almost the same quality, 2.6 times less peak memory"
    fidelity = Fidelity("as published")
    presets = (
        Preset("longbench", "jy-yuan/KIVI, docs/long_bench.md, 6ceef73", bits=2, group=32, residual=128),
        Preset("longbench, 4 bits", "the same, for models with few KV heads", bits=4, group=32, residual=128),
        Preset("example", "jy-yuan/KIVI, example.py, deacd55", bits=2, group=32, residual=32),
    )
    of_entries = True

    bits: Literal["auto", 2, 4, 8] = param(
        "auto",
        help="bits of each number, or the most that fit into the budget",
        own="a budget decides; without one it is the published 2",
    )
    group: int = param(32, ge=4, le=256, unit="numbers", help="how many numbers share a scale and a zero")
    residual: int = param(
        128, ge=0, le=4096, unit="tokens", help="newest tokens that stay exact; a multiple of the group"
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.residual % self.group:
            nearest = max(round(self.residual / self.group), 1) * self.group
            raise BadParameter(
                f"kivi: residual={self.residual} is not a multiple of group={self.group}, in which keys are quantised; "
                f"use residual={nearest}"
            )

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is None:
            return PackedFormat(dtype, 2 if self.bits == "auto" else self.bits, self.group, self.residual)
        return first_fitting(self._formats(dtype), shapes, limit)

    def _formats(self, dtype: torch.dtype) -> Iterator[Format]:
        """What a budget may choose from, best first: more bits before a longer residual."""
        if self.bits == "auto":
            yield DenseFormat(dtype)
        for bits in (8, 4, 2) if self.bits == "auto" else (self.bits,):
            for residual in range(self.residual, -1, -self.group):
                yield PackedFormat(dtype, bits, self.group, residual)
