"""Single tokens on a CPU read without the model's modules: what they give, when they are used, what they hold."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import workbench as wb
from workbench.runtime.decode import Decoder
from workbench.runtime.fused_token import FusedToken
from workbench.runtime.single_tokens import SingleTokens

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
}
METHODS = [
    ("full", {}), ("snapkv", {"budget": 0.5}), ("kivi", {"bits": 2, "group": 16, "residual": 16}),
    ("h2o", {"budget": 0.5}), ("streaming-llm", {"budget": 0.5}), ("mustafar", {}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))


def session(family: str, *, bfloat: bool = False) -> wb.Session:
    torch.manual_seed(3)
    model = FAMILIES[family]().eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.2)
        if bfloat:
            weight.copy_(weight.bfloat16())
    opened = wb.Session((model, None), kv_dtype="float32", trust=True)
    opened.read(torch.randint(0, 96, (60,)))
    return opened


def fed(
    opened: wb.Session, method: str, parameters: dict[str, float], *, fused: bool, compiled: bool = True
) -> torch.Tensor:
    plan = opened.plan(method, **parameters)
    evicting = plan.stages.evict if plan.evicts else None
    decoder = Decoder(opened.model, plan.stores(), plan.position, evicting, fusing=SingleTokens())
    if fused:
        decoder.fuse()
        assert decoder.fused is not None
        if not compiled:
            decoder.fused = FusedToken(opened.model, None)
    return torch.cat([decoder.feed(torch.tensor([token])) for token in range(5, 45)])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model(family: str, compiled: bool) -> None:
    opened = session(family)
    wanted = opened.model(torch.cat([opened.trace.ids, torch.arange(5, 45)])[None]).logits[0, 60:]
    torch.testing.assert_close(fed(opened, "full", {}, fused=True, compiled=compiled), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_every_store_answers_alike(method: str, parameters: dict[str, float]) -> None:
    opened = session("llama", bfloat=True)
    got, wanted = (fed(opened, method, parameters, fused=fused) for fused in (True, False))
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=5e-4)


def test_runs_are_the_same_tokens_and_count_what_they_hold() -> None:
    opened = session("llama", bfloat=True)
    run = opened.run("full", max_new_tokens=40)
    fused = opened.readings.fusing.of(opened.model)
    assert fused is not None
    assert run.memory.peaks.get("weights in fewer bytes", 0) == fused.nbytes
    opened.graphs = False
    plain = opened.run("full", max_new_tokens=40)
    assert run.tokens == plain.tokens
    assert "weights in fewer bytes" not in plain.memory.peaks


def test_weights_that_were_written_into_are_taken_again() -> None:
    opened, fusing = session("llama"), SingleTokens()
    first = fusing.of(opened.model)
    assert fusing.of(opened.model) is first
    with torch.no_grad():
        opened.model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert fusing.of(opened.model) is not first


def test_models_that_do_something_else_are_left_to_their_modules() -> None:
    model = session("llama").model
    assert FusedToken.fits(model)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not FusedToken.fits(model)
    handle.remove()
    model.model.layers[0].self_attn.q_proj = nn.Sequential(model.model.layers[0].self_attn.q_proj)
    assert not FusedToken.fits(model)
