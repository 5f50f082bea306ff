"""A model over a GPU and the CPU, and one larger than what it may take of the GPU: the same tokens as on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb
from tests.readings import ids_of, session_on

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPT, QUESTION = ids_of(300, 0), ids_of(7, 1)
RECIPES = ["full", "snapkv", "kivi", "h2o", "retrievalattention", "kcache", "streaming-llm", "rtn"]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(session: wb.Session, recipe: str) -> tuple[int, ...]:
    return session.run(recipe, question=QUESTION, max_new_tokens=12).tokens


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, ...]]:
    """By recipe, what the model answers on the GPU alone."""
    session = session_on(model().cuda(), PROMPT, kv_dtype="float32")
    return {recipe: tokens(session, recipe) for recipe in RECIPES}


@pytest.fixture(scope="module")
def spread() -> wb.Session:
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{at}": 0 if at % 2 else "cpu" for at in range(4)}
    made = model()
    for name, place in places.items():
        made.get_submodule(name).to(place)
    # As two GPUs are: weights stay where they are (accelerate by itself would bring those of the CPU to the GPU).
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for name, place in places.items():
        if name != "model.rotary_emb":
            add_hook_to_module(made.get_submodule(name), AlignDevicesHook(place, skip_keys="past_key_values"))
    return session_on(made, PROMPT, kv_dtype="float32")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_on_a_gpu_and_the_cpu_gives_the_same(
    recipe: str, spread: wb.Session, expected: dict[str, tuple[int, ...]]
) -> None:
    assert spread.trace is not None
    assert {layer.keys_held.device.type for layer in spread.trace.layers} == {"cpu", "cuda"}
    assert tokens(spread, recipe) == expected[recipe]


@pytest.mark.parametrize("recipe", RECIPES[:-1])
def test_layers_that_come_from_host_memory_give_the_same(recipe: str, expected: dict[str, tuple[int, ...]]) -> None:
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{at}": 0 if at < 1 else "cpu" for at in range(4)}
    session = session_on(dispatch_model(model(), places), PROMPT, kv_dtype="float32")
    assert tokens(session, recipe) == expected[recipe]


def test_a_model_larger_than_its_share_of_the_gpu_is_opened(
    tmp_path: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    model().save_pretrained(tmp_path / "folder")
    session = wb.Session(tmp_path / "folder", max_memory={0: "5MB", "cpu": "1GB"}, dtype="float32", kv_dtype="float32")
    assert any(weight.is_meta for weight in session.model.parameters())
    session.read(PROMPT)
    assert tokens(session, "snapkv") == expected["snapkv"]
