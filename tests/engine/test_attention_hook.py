"""The engine leaves nothing on the model, whatever happens, and sessions on one model never meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import engaged, forward
from workbench.errors import Cancelled, WorkbenchError
from workbench.models import TINY_ARCHITECTURES
from workbench.progress import Progress
from workbench_kernels import Scoring

IDS = torch.arange(40) * 7 % 251
QUESTION = [5, 9, 200, 31]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that a run might leave changed."""
    return {
        "config": model.config.to_dict(),
        "attention": {name: module.config._attn_implementation for name, module in _configured(model)},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()},
        "forwards": {name: module.forward.__func__ for name, module in model.named_modules()},
        "weights": {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()},
        "buffers": {name: b.double().sum().item() for name, b in model.named_buffers()},
        "training": model.training,
    }


def _configured(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "config")]


class Exact:
    """The simplest handler: exact attention over the pass itself, and optionally an accident at one layer."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if layer == self.fail_at:
            raise RuntimeError("accident")
        return causal_attention(query, key, value, scoring)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_a_pass_gives_the_models_own_logits_and_leaves_no_trace(
    architecture: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_model(architecture)
    before = state(model)
    with torch.inference_mode():
        want = model(IDS[None]).logits[0]
    got = forward(model, Exact(), IDS, torch.arange(IDS.numel()), logits=IDS.numel())
    assert (got - want).abs().max() < 1e-4
    assert state(model) == before


@pytest.mark.parametrize("layer", [0, 2])
def test_an_accident_in_a_layer_leaves_the_model_as_it_was(layer: int, tiny_llama: PreTrainedModel) -> None:  # trap 15
    before = state(tiny_llama)
    with pytest.raises(RuntimeError, match="accident"):
        forward(tiny_llama, Exact(fail_at=layer), IDS, torch.arange(IDS.numel()))
    assert state(tiny_llama) == before
    with torch.inference_mode():
        assert tiny_llama(IDS[None]).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_callers_own_attention_implementation_comes_back(implementation: str, tiny_llama: PreTrainedModel) -> None:
    before = tiny_llama.config._attn_implementation
    tiny_llama.set_attn_implementation(implementation)
    try:
        session = wb.Session((tiny_llama, None))
        session.read(IDS)
        session.run("h2o", budget=0.5, question=QUESTION, max_new_tokens=3)
        assert tiny_llama.config._attn_implementation == implementation
    finally:
        tiny_llama.set_attn_implementation(before)


def test_runs_cancelled_failed_and_abandoned_leave_the_model_as_it_was(tiny_llama: PreTrainedModel) -> None:  # trap 15
    before = state(tiny_llama)
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    session.run("snapkv", budget=0.5, question=QUESTION, max_new_tokens=3).ask([4, 4], max_new_tokens=2)
    stream = session.stream("tova", budget=0.5, max_new_tokens=8)
    next(stream)
    assert state(tiny_llama) == before  # between two tokens of a stream
    del stream
    cancelled = Progress()
    cancelled.cancel()
    with pytest.raises(Cancelled):
        session.read(IDS, progress=cancelled)
    with pytest.raises(Cancelled):
        session.run("kivi", progress=cancelled)
    assert state(tiny_llama) == before


def test_calling_the_model_directly_during_a_pass_is_refused_in_words(tiny_llama: PreTrainedModel) -> None:
    with engaged(tiny_llama), pytest.raises(WorkbenchError, match="called directly while a session"):
        tiny_llama(IDS[None])


def test_streams_of_two_sessions_on_one_model_may_be_interleaved(tiny_llama: PreTrainedModel) -> None:  # trap 15
    one, two = wb.Session((tiny_llama, None)), wb.Session((tiny_llama, None), kv_dtype="float32")
    one.read(IDS)
    two.read(IDS.flip(0))
    alone = [
        one.run("h2o", budget=0.5, question=QUESTION, max_new_tokens=10).tokens,
        two.run("snapkv", budget=0.5, max_new_tokens=10, window=4).tokens,
    ]
    first = one.stream("h2o", budget=0.5, question=QUESTION, max_new_tokens=10)
    second = two.stream("snapkv", budget=0.5, max_new_tokens=10, window=4)
    together = list(zip(first, second, strict=True))
    assert tuple(a.id for a, _ in together) == alone[0]
    assert tuple(b.id for _, b in together) == alone[1]


def test_two_threads_on_one_model_get_what_each_would_get_alone(tiny_llama: PreTrainedModel) -> None:  # trap 15
    before = state(tiny_llama)
    prompts = [IDS, IDS.flip(0)]
    recipes = ["streaming-llm", "kivi"]

    def work(which: int) -> tuple[int, ...]:
        session = wb.Session((tiny_llama, None))
        session.read(prompts[which])
        budget = 0.5 if which == 0 else 0.8
        return session.run(recipes[which], budget=budget, question=QUESTION, max_new_tokens=12).tokens

    alone = [work(0), work(1)]
    found: dict[int, tuple[int, ...]] = {}
    threads = [threading.Thread(target=lambda w=which: found.update({w: work(w)})) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(0), found.get(1)] == alone
    assert state(tiny_llama) == before
