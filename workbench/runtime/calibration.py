"""What an attention method learns of a model before it reads: two passes over a text that is not the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, within_a_chunk
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.examples import example
from workbench.models import max_positions
from workbench.progress import Progress
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS = ("code", "dialogue")


@dataclass
class _Exact:
    """A pass with exact attention that keeps its output [h, n, dv] in the layers that a method learns from."""

    method: AttentionMethod
    layers: int
    progress: Progress
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.update("calibrating", layer, 2 * self.layers)
        out = causal_attention(query, key, value, scoring)
        if self.method.learns_from(layer, self.layers):
            self.outputs[layer] = out
        return out


@dataclass
class _Learning:
    """A pass under the method, which learns layer after layer: each sees what those below have learnt."""

    exact: _Exact
    context: PassContext

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        exact, method = self.exact, self.exact.method
        exact.progress.update("calibrating", exact.layers + layer, 2 * exact.layers)
        self.context.layer = layer
        scoring = within_a_chunk(method.key, scoring, query.shape[1])
        span = method.span(layer, exact.layers, query.shape[1])
        widths = [width for width in (scoring.window, span) if width is not None]
        scoring = replace(scoring, window=min(widths, default=None))
        wanted = exact.outputs.pop(layer, None)
        if wanted is None:
            return method.attend(query, key, value, scoring, self.context)
        return method.learn(query, key, value, scoring, self.context, wanted)


def learnt(
    model: PreTrainedModel,
    layers: int,
    method: AttentionMethod,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> dict[Any, Any]:
    """What the method leaves in its context's state after `method.calibration` tokens of a text."""
    if not any(method.learns_from(layer, layers) for layer in range(layers)):
        return {}
    ids = calibration_ids(model, tokenizer, method.calibration)
    positions = torch.arange(ids.numel())
    exact = _Exact(method, layers, progress)
    forward(model, exact, ids, positions)
    learning = _Learning(exact, PassContext(layers, ids.numel()))
    forward(model, learning, ids, positions)
    return learning.context.state


def calibration_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int) -> Tensor:
    """The first `count` tokens of the ready examples "code" and "dialogue"; drawn ones where there is no tokenizer."""
    count = min(count, max_positions(model))
    if tokenizer is None:
        rows = cast("Tensor", model.get_input_embeddings().weight)
        return torch.randint(0, len(rows), (count,), generator=torch.Generator().manual_seed(0))
    text = "\n\n".join(example(key).text for key in _TEXTS)
    return torch.tensor(tokenizer(text)["input_ids"][:count])
