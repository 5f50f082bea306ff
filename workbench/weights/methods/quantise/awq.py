"""AWQ: columns that meet large inputs are scaled up before rounding, and back down afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.block_pass import BlockPass
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear, packed_nbytes
from workbench.weights.solvers.activation_scales import STEPS, awq_columns, awq_scales, clipped, scaled_inputs
from workbench.weights.surgery.folding import Fold, fold, foldable, folded_layers


@register
class AWQ(Quantiser):
    """Scale the columns that meet large inputs up before rounding, so that they lose less, and clip each group's range.

    As in the authors' code layers that share an input share scales, which go into the norm or the layer before them, so
    that nothing is held for them: those of attention's queries, keys and values are judged by what leaves attention,
    those of the layers that widen an MLP by what leaves the MLP, on `texts` calibration texts; others by what leaves
    the layer. Attention's output is not scaled where heads share values. Then the range of each group is cut where that
    changes the group's own part of the output least (all layers but those of queries and keys); here by second moments
    in place of 512 tokens, and only in rows whose whole output is the better for it.

    In blocks of an unknown form, and without `fold`, every layer searches its own scales and holds them itself, two
    bytes a column, clipped as well; foretold bytes are those. Inputs are the uncompressed model's, as in the code.
    """

    key = "awq"
    title = "AWQ"
    paper = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "Lin et al. 2023",
        "2306.00978",
    )
    claim = "4 bits nearly without loss, by protecting the one percent of channels that matter"
    fidelity = Fidelity("as published")
    presets = (Preset("authors", "mit-han-lab/llm-awq, awq/quantize/pre_quant.py, 02c1dd6", clip=True, fold=True),)
    needs_hessian = True

    clip: bool = param(True, help="also search how much of each group's range to cover")
    fold: bool = param(
        True, help="layers with the same input share scales, held by what is before them; else each its own"
    )
    texts: int = param(
        4,
        ge=1,
        le=1024,
        unit="texts",
        help="calibration texts on which modules are judged",
        own="the authors' 128 take hours on a CPU",
    )

    def recast(self, model: nn.Module) -> dict[str, str]:
        linears = self.survey(model).linears if self.fold else {}
        return folded_layers(model, linears) if linears else {}

    @property
    def together(self) -> str:
        return "what is before them holds their scales (with fold=false each holds its own)" if self.fold else ""

    @property
    def texts_refined(self) -> int:
        return self.texts

    def nbytes(self, linear: nn.Linear) -> int:
        zero_bytes = 0 if self.symmetric else self.zero_bytes
        shape = linear.out_features, linear.in_features
        return packed_nbytes(*shape, self.bits, self.group(linear), zero_bytes=zero_bytes, columns=True)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        biases = sum(linear.bias.nbytes for linear in linears.values() if self.fold and linear.bias is not None)
        return super().total_nbytes(linears) + biases

    def refine(self, passed: BlockPass, linears: Mapping[str, nn.Linear]) -> Mapping[str, nn.Module]:
        places = foldable(passed.name, passed.block, linears) if self.fold else []
        inputs = dict(passed.inputs)
        scales = []
        for place in places:
            with self.naming(f"{passed.name}.{place.layers[0]}"):
                scales.append(self._searched(passed, place))
        for place, found in zip(places, scales, strict=True):
            fold(passed.block, place, found)
            for name in place.layers:
                inputs[f"{passed.name}.{name}"] = scaled_inputs(inputs[f"{passed.name}.{name}"], found)
        if not places:
            return {}
        made = {}
        for name, linear in linears.items():
            with self.naming(name):
                made[name] = self._folded(name, linear, inputs[name])
        return made

    def _searched(self, passed: BlockPass, place: Fold) -> Tensor:
        """The scales of the layers at one place that change what leaves the module there least."""
        layers: list[Any] = [passed.block.get_submodule(name) for name in place.layers]
        inputs = passed.inputs[f"{passed.name}.{place.layers[0]}"]
        plain = [layer.weight for layer in layers]
        weights = [weight.detach().float() for weight in plain]
        if place.inside is None:
            return 1 / awq_columns(weights[0], inputs, self._nearest)
        run = passed.again(passed.block.get_submodule(place.inside))
        want, errors = run().float(), []
        try:
            for step in range(STEPS):
                scales = awq_scales(inputs, step)
                for layer, weight, before in zip(layers, weights, plain, strict=True):
                    near = self._nearest(weight * scales) / scales
                    layer.weight = nn.Parameter(near.to(before.dtype), requires_grad=False)
                errors.append(float((run().float() - want).square().mean()))
        finally:
            for layer, before in zip(layers, plain, strict=True):
                layer.weight = before
        return awq_scales(inputs, min(range(STEPS), key=errors.__getitem__))

    def _nearest(self, weight: Tensor) -> Tensor:
        return self.grid(weight).nearest(weight)

    def _folded(self, name: str, linear: nn.Linear, inputs: InputStats) -> PackedLinear:
        """The layer whose scales are in its weight already."""
        weight = linear.weight.detach().float()
        grid = self.grid(weight)
        if self.clip and not name.endswith(("q_proj", "k_proj")):
            grid = clipped(weight, inputs, grid, symmetric=self.symmetric)
        return self.packed(grid.codes(weight), grid, linear.bias)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> PackedLinear:
        assert inputs is not None
        weight = linear.weight.detach().float()
        columns = awq_columns(weight, inputs, self._nearest)
        scaled = weight / columns
        grid = self.grid(scaled)
        if self.clip:
            grid = clipped(scaled, scaled_inputs(inputs, 1 / columns), grid, symmetric=self.symmetric)
        return self.packed(grid.codes(scaled), grid, linear.bias, columns)
