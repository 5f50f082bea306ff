"""SliM-LLM: more bits for groups of columns that matter, fewer for as many that do not."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.bases.sequential import Sequential
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import CompactLinear, PackedLinear, Parts, packed_nbytes
from workbench.weights.solvers.bit_exchange import bits_by_divergence, bits_exchanged, drawn_inputs
from workbench.weights.solvers.compensation import removal_cost
from workbench.weights.solvers.gptq import Rounded, gptq
from workbench.weights.solvers.group_grids import binary, near_grid, salient_grid
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid, fit, squares


@register
class SliMLLM(Sequential, Quantiser):
    """Give the most salient groups of columns a bit more, as many of the least salient a bit less, and round by GPTQ.

    Which groups exchange a bit is found layer by layer on weights rounded to nearest: as many as leave the layer's
    outputs closest to those of the weight, both taken as the logits of distributions. The paper keeps the
    layer's inputs for that; here they are drawn with the second moments of those. With `exchange="loss"` it is as many
    as leave least of the error that the columns after each cannot make up for, which is what GPTQ changes in the
    outputs. Groups of equal bits are one part of the layer, and say which columns they have. A shorter last group keeps
    the usual bits. At 2 bits the less salient groups have one: a mean, and a distance from it. Grids are those of the
    authors' code, or with `ranges="salient"` wider ones that salient weights shape (`salient_grid`), which is ours.
    """

    key = "slim-llm"
    title = "SliM-LLM"
    paper = Paper(
        "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models",
        "Huang et al. 2024",
        "2405.14917",
    )
    claim = "LLaMA-7B at 2 bits: perplexity 48 % lower than other methods without gradients"
    fidelity = Fidelity("deviates", "outputs are compared for drawn inputs with the moments of those that were seen")
    presets = (
        Preset(
            "authors",
            "Aaronhuang-778/SliM-LLM, slim-llm/run.py and slim_gptq.py, cfdf5ff",
            exchange="divergence",
            ranges="near",
            damping=0.01,
            sequential=True,
        ),
        Preset("script", "the same, slim-llm/scripts/llama.sh", bits=2, group_size=128),
    )
    needs_hessian = True
    symmetric: ClassVar[bool] = False  # type: ignore[misc]  # no choice here

    bits: Literal[2, 3, 4] = param(
        3, help="bits of each weight on average", own="the script's first is 2, at which small models are lost"
    )
    exchange: Literal["divergence", "loss"] = param(
        "divergence", help="what tells how many groups exchange a bit: outputs, or what GPTQ cannot make up for"
    )
    ranges: Literal["near", "salient"] = param("near", help="within a tenth of a group's own, or shaped by salience")
    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")

    def nbytes(self, linear: nn.Linear) -> int:
        out_features, in_features, group = linear.out_features, linear.in_features, self.group(linear)
        places = (2 if in_features <= 2**15 else 4) * in_features  # which columns each part takes
        wider = out_features * (in_features // group // 2) if self.bits == 2 else 0  # zeros of one-bit groups: 16 bits
        return packed_nbytes(out_features, in_features, self.bits, group, zero_bytes=1) + places + wider

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> CompactLinear:
        assert inputs is not None
        weight, hessian, group = linear.weight.detach().float(), inputs.hessian, self.group(linear)
        factor = inverse_factor(hessian, self.damping)
        bits = self.bits + self._exchanged(weight, hessian, factor, group)  # [g], the last group's too
        done = gptq(
            weight,
            hessian,
            lambda part, number: self._fitted(
                part, factor[:, number * group : (number + 1) * group], int(bits[number])
            ),
            group,
            damping=self.damping,
        )
        owners = torch.arange(weight.shape[1], device=weight.device) // group
        used = bits.unique().tolist()
        if len(used) == 1:
            return self._part(done, bits, owners, self.bits, linear.bias)
        parts = [self._part(done, bits, owners, width, None) for width in used]
        columns = [(bits == width)[owners].nonzero()[:, 0] for width in used]
        return Parts(parts, columns, weight.shape[1], linear.bias)

    def _fitted(self, part: Tensor, factor: Tensor, bits: int) -> Grid:
        return near_grid(part, bits) if self.ranges == "near" else salient_grid(part, factor, bits)

    def _exchanged(self, weight: Tensor, hessian: Tensor, factor: Tensor, group: int) -> Tensor:
        """How many bits more than usual each group gets [g], also a shorter last one."""
        whole = weight.shape[1] // group
        weight, pivots = weight[:, : whole * group], factor.diagonal()[: whole * group]
        salience = removal_cost(weight, pivots).unflatten(1, (whole, group)).sum(dim=(0, 2))
        widths = range(self.bits - 1, self.bits + 2)
        grids = [binary(weight, group) if bits == 1 else fit(weight, bits, group) for bits in widths]
        rounded = torch.stack([grid.nearest(weight) for grid in grids])
        if self.exchange == "divergence":
            more = bits_by_divergence(weight, rounded, drawn_inputs(hessian)[:, : whole * group], salience)
        else:
            losses = [squares((made - weight) / pivots, group).sum(dim=0) for made in rounded]
            more = bits_exchanged(torch.stack(losses), salience)
        return torch.cat([more, more.new_zeros(-(-len(factor) // group) - whole)])

    def _part(self, done: Rounded, bits: Tensor, owners: Tensor, width: int, bias: nn.Parameter | None) -> PackedLinear:
        """The groups of this many bits."""
        groups = bits == width  # [g]
        zero = done.zero[:, groups]
        return PackedLinear(
            done.codes[:, groups[owners]],
            done.scale[:, groups],
            zero if width == 1 else zero.to(torch.uint8),
            width,
            bias,
            group=int(owners.eq(0).sum()),
        )
