"""What the tests of KV methods and of their stores share: prompts, numbers and attention by plain loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.readings import ids_of
from workbench import testing
from workbench.errors import BudgetTooSmall
from workbench.kv.ranking import Ranking
from workbench.models import facts
from workbench.prompt import Prompt
from workbench.runtime.prefill import read
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.core.rope import Rotation
    from workbench.kv.plan import Plan

TOKENS = testing.TOKENS
reading = testing.Subjects().reading  # made when first asked for, and shared by all tests of KV methods
SHORT: dict[str, dict[str, Any]] = {
    "evopress-kv": {"window": 8, "generations": 1, "offspring": 2},
    "snapkv": {"window": 8},
    "cake": {"window": 8},
    "capkv": {"n_future_positions": 32},
    "dynamickv": {"window": 8},
    "qfilters": {"window": 8},
    "r-kv": {"queries": 4},
    "simlayerkv": {"sinks": 2, "recent": 8, "threshold": 0.3},
    "chunkkv": {"window": 8, "chunk": 4},
    "criticalkv": {"window": 8},
    "compactor": {"first": 4, "last": 2, "chunk": 16, "sketch": 8},
    "pyramidkv": {"window": 8},
    "adakv": {"window": 8},
    "lagkv": {"lag": 16},
    "kivi": {"group": 8, "residual": 16},
    "kvtuner": {"group": 8, "residual": 16, "window": 8, "budget": 0.5},
    "mustafar": {"recent": 8},
    "deltallm": {"window": 8, "group": 16},
    "think": {"window": 8, "recent": 8},
    "vkv-1bit": {"recent": 8},
    "zipcache": {"budget": 0.5},  # its default is for heads of 64 channels and more
    "scalekv": {"window": 8, "current": 16},
    "uncomp": {"rank": 8},
    "hack": {"probes": 16, "recent": 8},
    "headkv": {"window": 8, "tasks": 2, "task_tokens": 64},
    "headkv-r2": {"window": 8, "tasks": 2, "task_tokens": 64},
    "expected-attention": {"n_future_positions": 32},
    "ems": {"window": 8},
    "cskv": {"window": 8},
    "lazyeviction": {"window": 8},
    "epicache": {"segment": 8},
    "streammem": {"frame": 8},
    "tailorkv": {"budget": 0.5, "threshold": 0.35, "group": 8, "residual": 16, "fetch": 16},
    "video-xl-2": {"marks": 1, "chunk": 8},
    "livevlm": {"sinks": 2, "window": 4, "recent": 8, "page": 4},
    "infllm": {"sinks": 2, "block": 4},
    "ilre": {"query": 8, "window": 16, "chunk": 8},
    "xl3m": {"segment": 8, "query": 8},
    "sentencekv": {"sinks": 4, "fetch": 8, "longest": 8, "window": 8},
}
"""Parameters that suit prompts of a few dozen tokens, by method."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed float32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def traced(model: PreTrainedModel, prompt: Prompt | int = TOKENS) -> Trace:
    """What a model recorded of a prompt, or of so many random ids."""
    return read(model, facts(model), Prompt(ids_of(prompt), chat=False) if isinstance(prompt, int) else prompt)


def trace_of(architecture: str = "llama", tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Trace:
    """What a tiny model recorded of random ids, read once; `model_of` gives the model."""
    made = reading(architecture, tokens, dtype)
    made.trace.once("model", lambda: made.model)
    return made.trace


def model_of(trace: Trace) -> PreTrainedModel | None:
    """The model that read a trace of `trace_of`, for methods that let it read again."""
    return trace.once("model", lambda: None)


def random_layer(
    tokens: int = 60, key_width: int = 20, value_width: int = 18, *, seed: int = 0, rotation: Rotation | None = None
) -> LayerTrace:
    """Two KV heads of two query heads each, with sizes that no byte or group divides; its number is the seed."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, tokens, width, generator=generator) for width in (key_width, value_width))
    queries = torch.randn(4, tokens, key_width, generator=generator)
    rotary = None if rotation is None else lambda _: rotation
    return LayerTrace(seed, keys, values, queries, torch.device("cpu"), Scoring(key_width**-0.5), rotary=rotary)


def random_ranking(layers: int, heads: int, tokens: int, window: int = 0) -> Ranking:
    """Scores that concentrate more from head to head; the last `window` positions are certain to stay."""
    uniform = torch.rand(layers, heads, tokens, generator=torch.Generator().manual_seed(1))
    scores = uniform ** torch.arange(1, heads + 1)[:, None]
    scores[..., tokens - window :] = torch.inf
    return Ranking(scores)


def tiers_of(counts: list[int], tokens: int = 60, rest: int = 0) -> Tensor:
    """The first counts [k] of shuffled positions in tier 1, the others in tier `rest`: uint8 [k, tokens]."""
    order = torch.rand(len(counts), tokens, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return torch.where(order < torch.tensor(counts)[:, None], 1, rest).to(torch.uint8)


def feasible(plan: Callable[[float], Plan], budget: float) -> Plan:
    """The plan at this budget, or at the smallest one that its refusal names."""
    try:
        return plan(budget)
    except BudgetTooSmall as refusal:
        smallest = refusal.smallest
    assert budget < smallest <= 1
    made = plan(smallest)
    assert made.nbytes <= smallest * made.full_nbytes
    return made


def kept_sets(plan: Plan) -> list[set[int]]:
    """The positions on the device of each head of each layer, one layer after another."""
    layers, heads = plan.tiers.shape[:2]
    return [
        set((plan.tiers[layer, head] == 1).nonzero()[:, 0].tolist()) for layer in range(layers) for head in range(heads)
    ]


def softmax_rows(layer: LayerTrace) -> Tensor:
    """The whole causal softmax, float64 [h, n, n], without any of our attention code."""
    rows = torch.zeros(layer.heads, layer.tokens, layer.tokens, dtype=torch.float64)
    for head in range(layer.heads):
        logits = layer.queries[head].double() @ layer.keys[head // layer.groups].double().T * layer.scale
        rows[head] = logits.masked_fill(torch.ones_like(rows[head], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    return rows
