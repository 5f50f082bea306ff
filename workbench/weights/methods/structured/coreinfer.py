"""CoreInfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.engine.attention_hook import passing
from workbench.progress import Progress
from workbench.registry import Paper, param, register
from workbench.weights.base import Survey
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import CompactLinear
from workbench.weights.structured import StructuredPruner, Within
from workbench.weights.surgery.prunable import activation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def votes(activations: Tensor, share: float) -> Tensor:
    """How many tokens have each neuron among their most active ones, float32 [i], plus at most a half by its size.

    activations: [n, i]. share: of all neurons, which are the most active of a token (by magnitude); at least one. The
    half, the neuron's mean magnitude relative to the largest, only decides between equal counts.
    """
    sizes = activations.float().abs()
    count = max(int(share * sizes.shape[1]), 1)
    chosen = sizes.topk(count, dim=1).indices.flatten()
    counts = torch.zeros(sizes.shape[1], device=sizes.device).index_add_(
        0, chosen, torch.ones(chosen.numel(), device=sizes.device)
    )
    mean = sizes.mean(dim=0)
    return counts + 0.5 * mean / mean.max().clamp_min(1e-12)


class CoreMLP(nn.Module):
    """A gated MLP that reads with all neurons, and decodes with those that were most active over what was read.

    What it remembers is in the run's memory, under this module's number: the votes of the tokens read so far, and the
    rows and columns of its core neurons once a token has been decoded. Passes that remember nothing use all neurons.
    """

    def __init__(self, original: Any, number: int, token_share: float, share: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj
        self.act_fn: Any = activation(original)
        self.number = number
        self.token_share, self.count = token_share, max(int(share * original.down_proj.in_features), 1)
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        memory: dict[Any, Any] | None = getattr(passing(), "memory", None)
        votes_key, core_key = ("votes", self.number), ("core", self.number)
        if memory is not None and x.shape[-2] == 1 and votes_key in memory:
            if core_key not in memory:
                memory[core_key] = self._core(memory[votes_key], x.dtype)
            gate, up, down, gate_bias, up_bias = memory[core_key]
            inside = self.act_fn(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
            return linear(inside, down, self.down_proj.bias)
        inside = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if memory is not None and x.shape[-2] > 1:
            found = votes(inside.flatten(0, -2), self.token_share)
            memory[votes_key] = memory[votes_key] + found if votes_key in memory else found
            memory.pop(core_key, None)
        return cast("Tensor", self.down_proj(inside))

    def _core(self, found: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The rows and columns of the neurons with the most votes, and their biases."""
        kept = found.topk(self.count).indices.sort().values
        biases = (layer.bias for layer in (self.gate_proj, self.up_proj))
        gate, up, down = (_weight(layer, dtype) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        return (
            gate[kept],
            up[kept],
            down[:, kept].contiguous(),
            *(None if bias is None else bias[kept] for bias in biases),
        )


def _weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer, also of one that was quantised since."""
    return layer.dequantised(dtype) if isinstance(layer, CompactLinear) else cast("Tensor", layer.weight)


@register
class CoreInfer(StructuredPruner):
    """Decode with the MLP neurons that were most active over the prompt and the question, and with no others.

    While text is read, each token votes for the `token_share` of neurons that it activates most, by magnitude; the
    `share` with the most votes are the sentence's core neurons, and while the answer is decoded only their rows and
    columns are used (Wang et al. 2024, the stability-guided prediction; the one by clusters of sentences is left out).
    Its published code counts positive activations alone, of which a token votes for a share, and leaves the first six
    and last five of 32 blocks whole; in gated MLPs products of either sign matter, and here all blocks take part. No
    predictor, no calibration. Every pass of several tokens counts as reading, and its votes are added.

    This saves the computation and the moved bytes of a decoding step, not stored ones: the next question has other core
    neurons, so all weights stay, and the core's copies come on top (the timeline shows them). A budget, which limits
    what is stored, is refused below 1 for that reason; how little a step touches is set by `share`. Core neurons belong
    to a run, never to the model: two runs do not meet. Methods that read the prompt by themselves use all neurons.
    """

    key = "coreinfer"
    title = "CoreInfer"
    paper = Paper(
        "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation",
        "Wang et al. 2024",
        "2410.18311",
    )
    claim = "10.3 times the speed of Hugging Face's implementation, without a predictor"
    default_budget: ClassVar[float | None] = None

    share: float = param(0.4, gt=0, le=1, help="of an MLP's neurons, how many a decoding step uses")
    token_share: float = param(0.4, gt=0, le=1, help="of an MLP's neurons, how many each token votes for")

    def survey(self, model: nn.Module) -> Survey:
        found = super().survey(model)
        assert isinstance(found, Within)
        return replace(found, least=found.whole)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        sites = self.sites(twin, tuple(linears))
        for number, site in enumerate(progress.track(sites, f"compressing by {self.key}", len(sites))):
            original = twin.get_submodule(site.name)
            twin.set_submodule(site.name, CoreMLP(original, number, self.token_share, self.share))

    def note(self, model: nn.Module) -> str:
        return f"{super().note(model)}; a decoding step uses {self.share:.0%} of the MLPs' neurons, stored are all"
