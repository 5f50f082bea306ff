"""A model over several devices, and one whose weights come for each pass: the same as on one device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import PreTrainedModel

import workbench as wb
from tests.readings import ids_of, session_on
from tests.second_device import ELSEWHERE, Elsewhere, divided, second_device
from workbench.engine.attention_hook import device_of, devices_of
from workbench.errors import BadParameter, ModelNotFound, NotApplicable
from workbench.models import tiny
from workbench.models.devices import layer_devices, whole_weights

PROMPT, QUESTION = ids_of(96, 0), ids_of(5, 1)


class Case(NamedTuple):
    one: wb.Session
    several: wb.Session


@pytest.fixture(scope="module")
def sessions(tiny_llama: PreTrainedModel) -> Case:
    """The same prompt, read by a model on one device and by its like on two."""
    one = session_on(tiny_llama, PROMPT, kv_dtype="float32")
    with second_device():
        several = session_on(divided(deepcopy(tiny_llama)), PROMPT, kv_dtype="float32")
        several.calibrate("sampled", samples=2, tokens=24)
    one.calibrate("sampled", samples=2, tokens=24)
    return Case(one, several)


def outcome(session: wb.Session, where: AbstractContextManager[Any], recipe: str) -> object:
    """The tokens and bytes of a run, and its quality; or why there is none."""
    with where:
        try:
            run = session.run(recipe, question=QUESTION, max_new_tokens=6)
        except wb.errors.WorkbenchError as refusal:
            return str(refusal)
        assert run.quality is not None
        return run.tokens, run.kv_nbytes


def keys_of(family: str) -> list[str]:
    frame = wb.methods()
    return list(frame[frame.family == family].key)


def test_a_mixed_operation_fails_as_it_does_on_a_gpu() -> None:
    with second_device() as device:
        there = torch.arange(4.0, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(4)
        assert torch.equal((there + torch.ones(4).to(device)).cpu(), torch.arange(1.0, 5))


def test_what_was_read_lies_where_its_layers_do(sessions: Case) -> None:
    assert sessions.one.trace is not None
    assert sessions.several.trace is not None
    assert torch.equal(sessions.one.trace.logits, sessions.several.trace.logits)
    layers = sessions.several.trace.layers
    assert [layer.device for layer in layers] == layer_devices(sessions.several.model)
    assert {layer.device for layer in layers} == {torch.device("cpu"), ELSEWHERE}
    assert isinstance(layers[-1].keys_held, Elsewhere)
    assert not isinstance(layers[0].keys_held, Elsewhere)


@pytest.mark.parametrize("key", keys_of("kv"))
def test_kv_methods_give_the_same_over_two_devices(key: str, sessions: Case) -> None:
    assert outcome(sessions.several, second_device(), key) == outcome(sessions.one, nullcontext(), key)


@pytest.mark.parametrize("key", ["block-sparse", "cca", "streaming-window", "uncomp-reading"])
def test_attention_methods_give_the_same_over_two_devices(key: str, sessions: Case) -> None:
    assert outcome(sessions.several, second_device(), key) == outcome(sessions.one, nullcontext(), key)


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "quarot", "vq-logits", "svd-llm", "rtn+snapkv+kivi"])
def test_weight_methods_give_the_same_over_two_devices(recipe: str, sessions: Case) -> None:
    assert outcome(sessions.several, second_device(), recipe) == outcome(sessions.one, nullcontext(), recipe)


def test_maps_heads_and_outliers_are_the_same_over_two_devices(sessions: Case) -> None:
    with second_device():
        heads, grid = sessions.several.heads(), sessions.several.attention_grid()
        outliers = sessions.several.outliers("keys")
    assert repr(outliers) == repr(sessions.one.outliers("keys"))
    torch.testing.assert_close(
        torch.tensor(heads.select_dtypes("number").to_numpy(float)),
        torch.tensor(sessions.one.heads().select_dtypes("number").to_numpy(float)),
        equal_nan=True,
    )
    assert repr(grid) == repr(sessions.one.attention_grid())


def test_a_session_over_two_devices_is_saved_and_opened_and_its_model_exported(sessions: Case, tmp_path: Path) -> None:
    with second_device():
        sessions.several.save(tmp_path / "kept")
        opened = wb.Session.load(tmp_path / "kept", model=(sessions.several.model, None))
        run = opened.run("snapkv", question=QUESTION, max_new_tokens=6)
        sessions.several.export(tmp_path / "model", "rtn")
    assert run.tokens == sessions.one.run("snapkv", question=QUESTION, max_new_tokens=6).tokens
    exported = session_on(wb.Session(tmp_path / "model").model, PROMPT, kv_dtype="float32")
    expected = sessions.one.run("rtn", question=QUESTION, max_new_tokens=6).tokens
    assert exported.run(question=QUESTION, max_new_tokens=6).tokens == expected


@pytest.fixture(scope="module")
def brought(tiny_llama: PreTrainedModel) -> wb.Session:
    """A session of a model whose weights accelerate brings for each pass."""
    return session_on(cpu_offload(deepcopy(tiny_llama), torch.device("cpu")), PROMPT, kv_dtype="float32")


@pytest.mark.parametrize("recipe", ["full", "snapkv", "kivi", "h2o", "infllm", "retrievalattention", "streaming-llm"])
def test_weights_that_come_for_each_pass_give_the_same(recipe: str, brought: wb.Session, sessions: Case) -> None:
    assert outcome(brought, nullcontext(), recipe) == outcome(sessions.one, nullcontext(), recipe)


def test_a_model_with_some_layers_on_disk_gives_the_same(
    tiny_llama: PreTrainedModel, sessions: Case, tmp_path: Path
) -> None:
    names = [name for name, _ in tiny_llama.model.named_children() if name != "layers"]
    places: dict[str, Any] = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    places |= {f"model.layers.{at}": "disk" if at else "cpu" for at in range(len(tiny_llama.model.layers))}
    model = dispatch_model(deepcopy(tiny_llama), places, main_device="cpu", offload_dir=tmp_path)
    session = session_on(model, PROMPT, kv_dtype="float32")
    assert outcome(session, nullcontext(), "snapkv") == outcome(sessions.one, nullcontext(), "snapkv")


def test_weights_that_come_for_each_pass_are_counted_kept_and_left_alone(brought: wb.Session, tmp_path: Path) -> None:
    model = brought.model
    assert device_of(model) == torch.device("cpu")
    assert len(devices_of(model)) > 1
    assert not any(weight.is_meta for _, weight in whole_weights(model))
    with pytest.raises(NotApplicable, match="come for each pass"):
        brought.run("rtn", question=QUESTION)
    brought.save(tmp_path / "kept")
    opened = wb.Session.load(tmp_path / "kept", model=(model, None))
    assert (
        opened.run(question=QUESTION, max_new_tokens=3).tokens
        == brought.run(question=QUESTION, max_new_tokens=3).tokens
    )


def test_weights_without_data_are_refused_in_one_line(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ModelNotFound, match="without data"):
        wb.Session((deepcopy(tiny_llama).to("meta"), None))


def test_a_folder_is_spread_over_devices_by_its_map(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "folder")
    spread = wb.Session(tmp_path / "folder", device_map={"": "cpu"}, dtype="float32", kv_dtype="float32")
    spread.read(PROMPT)
    expected = session_on(model, PROMPT, kv_dtype="float32").trace
    assert expected is not None
    assert spread.trace is not None
    assert torch.equal(spread.trace.logits, expected.logits)
    with pytest.raises(BadParameter, match="leave device out"):
        wb.Session(tmp_path / "folder", device="cpu", device_map="auto")
    with pytest.raises(BadParameter, match="given by name"):
        wb.Session((model, None), device_map="auto")
    with pytest.raises(BadParameter, match="device_map"):
        wb.Session(tmp_path / "folder", device_map="everywhere")
