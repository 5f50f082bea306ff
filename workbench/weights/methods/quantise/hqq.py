"""HQQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from workbench.errors import MissingExtra, NotApplicable
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear, packed_nbytes

_MULTIPLE = 8  # hqq takes groups of multiples of 8


@register
class HQQ(WeightMethod):
    """Round weights in small groups, with zero points that minimise a robust error, without any calibration data.

    Each group of `group_size` neighbouring input columns has a scale and a zero point. Half-quadratic splitting moves
    the zero point so that an l_p norm of the rounding error with p < 1 shrinks: outliers weigh less than in a
    least-squares fit. The work is done by the hqq library (extra `weights`), at every width that it has but 1.58.
    Codes are packed at just these bits (the library holds 3, 5 and 6 in wider fields), scales and zeros at 16.
    """

    key = "hqq"
    title = "HQQ"
    paper = Paper(
        "Half-Quadratic Quantization of Large Machine Learning Models", "Badri and Shaji 2023, Mobius Labs blog"
    )
    claim = "quality of calibrated 4-bit methods without calibration, quantised over 50 times faster"

    fidelity = Fidelity("as published")
    presets = (Preset("library", "hqq 0.2.8, hqq/core/quantize.py, hqq_base_quant_config", bits=4, group_size=64),)

    bits: Literal[1, 2, 3, 4, 5, 6, 8] = param(4, help="bits of each weight")
    group_size: int = param(
        64, ge=8, le=1024, multiple_of=8, unit="columns", help="how many columns share a scale and a zero"
    )

    def refuses(self, linear: nn.Linear) -> str | None:
        if linear.in_features % _MULTIPLE:
            return f"its {linear.in_features} input columns are not a multiple of {_MULTIPLE}"
        if not linear.weight.is_floating_point():
            return f"its weight is {linear.weight.dtype}, not floating point"
        return None

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        uneven = [name for name, linear in linears.items() if linear.in_features % self.group_size]
        if uneven:
            fitting = [
                size
                for size in range(_MULTIPLE, self.group_size, _MULTIPLE)
                if not any(linear.in_features % size for linear in linears.values())
            ]
            # Groups could run on into the next row, but then no two rows would be alike.
            raise NotApplicable(
                f"hqq: group_size={self.group_size} does not divide the input columns of {_named(uneven, linears)}; "
                f"the next smaller that fits all layers is {fitting[-1]}"
            )
        _library()

    def nbytes(self, linear: nn.Linear) -> int:
        return packed_nbytes(linear.out_features, linear.in_features, self.bits, self.group_size)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> PackedLinear:
        quantise = _library()
        config = quantise.BaseQuantizeConfig(nbits=self.bits, group_size=self.group_size, axis=1)
        config["weight_quant_params"]["bitpack"] = False  # our layer packs the codes, in an order of its own
        done = quantise.HQQLinear(
            linear,
            config,
            del_orig=False,
            compute_dtype=torch.float32,  # of scales and zeros, until our layer rounds them
            device=str(linear.weight.device),
        )
        codes = done.W_q.to(torch.uint8).view(linear.out_features, linear.in_features)
        scale, zero = (done.meta[name].view(linear.out_features, -1) for name in ("scale", "zero"))
        return PackedLinear(codes, scale, zero, self.bits, linear.bias)


def _library() -> Any:
    try:
        from hqq.core import quantize
    except ImportError as error:
        raise MissingExtra("hqq needs the hqq library: pip install 'inference-workbench[weights]'") from error
    return quantize


def _named(names: list[str], linears: Mapping[str, nn.Linear]) -> str:
    shown = ", ".join(f"{name} ({linears[name].in_features})" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
