"""Double Rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import PackedLinear, packed_nbytes
from workbench.weights.solvers.double_rounding import MASTER, coarser, rounded
from workbench.weights.solvers.greedy_allocation import Size, growth_order, sizes_within
from workbench.weights.solvers.quantisation_grid import Grid, fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTHS = (2, 3, 4, 5, 6, 8)
_GROUPS = "the paper trains one step for each layer; untrained, whole rows lose far more"


@register
class DoubleRounding(WeightMethod):
    """Round weights to 8 bits once, and round those codes again for every lower width: one stored model serves all.

    On symmetric grids (equations 1 to 3) a code of 8 bits is divided by 2 ** (8 - b), rounded, halves up, and cut to
    the range of b bits; a step is as many times as wide, and zero weights stay zero. Without `symmetric`, which is not
    the paper's and loses less, it becomes one of b bits by a shift: of each 2 ** (8 - b) neighbouring codes one is
    left, which stands for their middle, so that the whole range stays in use and no code is cut off. A change of size
    never touches floating-point weights again. The 8-bit codes are made once and stay in the session, outside of what a
    run counts as weights, which are the codes at the widths that are loaded, with their scales and zeros.

    Without a budget every layer has `bits`. With one, that is the widest, and single layers get fewer (the paper's
    mixed precision): bytes go where they lower the error of a layer's outputs most, relative to the outputs and
    measured by Hessians, in place of the paper's traces of Hessians and integer programs (section 3.3). The paper
    trains the widths together (with learning rates of their own for the steps); here nothing is trained, which is felt
    at 3 bits and below.
    """

    key = "double-rounding"
    title = "Double Rounding"
    paper = Paper("Nearly Lossless Adaptive Bit Switching", "Huang et al. 2025", "2502.01199")
    claim = "one stored integer model switches between bit-widths nearly without loss"
    fidelity = Fidelity("untrained part of a trained method", "the widths are not trained together")
    presets = (Preset("paper", "equations 1 to 3; its widest integers", symmetric=True, bits=8),)
    needs_hessian: ClassVar[bool] = True
    every_size: ClassVar[bool] = True

    bits: Literal[2, 3, 4, 5, 6, 8] = param(8, help="bits of each weight; with a budget, the most of any layer")
    group_size: int = param(
        64, ge=8, le=1024, multiple_of=8, unit="columns", help="how many columns share a scale", own=_GROUPS
    )
    symmetric: bool = param(True, help="levels from minus to plus the largest magnitude, without a zero of their own")

    def refuses(self, linear: nn.Linear) -> str | None:
        if not linear.weight.is_floating_point():
            return f"its weight is {linear.weight.dtype}, not floating point"
        return None

    def nbytes(self, linear: nn.Linear) -> int:
        return self._nbytes(linear, self.bits)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        whole = sum(map(self.nbytes, linears.values()))
        smallest = sum(self._nbytes(linear, _WIDTHS[0]) for linear in linears.values())
        return max(smallest, min(whole, self._limit(linears)))

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        master = study.once(self._master_key(), lambda: self._master(linears, study, progress))
        widths = [width for width in _WIDTHS if width <= self.bits]
        if self.budget is None:
            chosen = dict.fromkeys(linears, len(widths) - 1)
        else:
            sizes = {name: layer[: len(widths)] for name, layer in master.sizes.items()}
            chosen = sizes_within(sizes, growth_order(sizes), self._limit(linears))
        for name, linear in progress.track(linears.items(), f"compressing by {self.key}", len(linears)):
            with self.naming(name):
                small = narrower(*master.stored[name], widths[chosen[name]], linear.bias, symmetric=self.symmetric)
                twin.set_submodule(name, small)

    def _master(self, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress) -> _Master:
        stored: dict[str, tuple[Tensor, Grid]] = {}
        sizes: dict[str, list[Size]] = {}
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for name in (name for name in linears if name in inputs):
                progress.update(f"rounding by {self.key}", len(stored), len(linears))
                linear = linears[name]
                weight = linear.weight.detach().float()
                group = min(self.group_size, linear.in_features)
                with self.naming(name):
                    grid = fit(weight, MASTER, group, symmetric=self.symmetric)
                stored[name] = grid.codes(weight), grid
                errors = (lost(weight, *stored[name], b, inputs[name], symmetric=self.symmetric) for b in _WIDTHS)
                sizes[name] = [Size(self._nbytes(linear, b), e) for b, e in zip(_WIDTHS, errors, strict=True)]
        progress.update(f"rounding by {self.key}", len(linears), len(linears))
        return _Master(stored, {name: sizes[name] for name in linears})

    def _master_key(self) -> tuple[object, ...]:
        return type(self), self.group_size, self.symmetric

    def _limit(self, linears: Mapping[str, nn.Linear]) -> int:
        """The bytes that the budget allows; those of all layers at `bits` where there is none."""
        whole = sum(map(self.nbytes, linears.values()))
        limit = None if self.budget is None else self.budget.nbytes(sum(map(self.full_nbytes, linears.values())))
        return whole if limit is None else limit

    def _nbytes(self, linear: nn.Linear, bits: int) -> int:
        group = min(self.group_size, linear.in_features)
        zero_bytes = 0 if self.symmetric else 1 if bits == MASTER else 2
        return packed_nbytes(linear.out_features, linear.in_features, bits, group, zero_bytes=zero_bytes)


class _Master(NamedTuple):
    """The 8-bit codes [o, i] of every layer with their grid, and what each width of it takes and loses."""

    stored: dict[str, tuple[Tensor, Grid]]
    sizes: dict[str, list[Size]]


def narrower(
    codes: Tensor, grid: Grid, bits: int, bias: nn.Parameter | None = None, *, symmetric: bool = False
) -> PackedLinear:
    """The layer at `bits` bits that 8-bit codes [o, i] give."""
    coarse = coarser(grid, bits, symmetric=symmetric)
    zero = None if symmetric else coarse.zero.to(torch.uint8 if bits == MASTER else torch.float16)
    few = rounded(codes, bits, symmetric=symmetric)
    return PackedLinear(few, coarse.scale, zero, bits, bias, group=grid.group)


def lost(weight: Tensor, codes: Tensor, grid: Grid, bits: int, inputs: InputStats, *, symmetric: bool = False) -> float:
    """The share of the mean square of a layer's outputs that is lost at `bits` bits of its codes."""
    rounded_weight = coarser(grid, bits, symmetric=symmetric).dequantised(rounded(codes, bits, symmetric=symmetric))
    whole = inputs.output_error(weight).sum()
    return float(inputs.output_error(rounded_weight - weight).sum() / whole) if whole > 0 else 0.0
