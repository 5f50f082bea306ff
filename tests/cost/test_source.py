"""What an estimate is asked of: every way to name a model, hardware as data, and one clear line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import workbench as wb
from workbench.cost import Hardware, catalogue, hardware
from workbench.cost.hardware import profiles
from workbench.errors import (
    BadBudget,
    BadParameter,
    BadRecipe,
    InputError,
    ModelNotFound,
    NotApplicable,
    WorkbenchError,
)
from workbench.models.catalog import entry

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
MINE = """
[[hardware]]
name = "mine"
kind = "gpu"
memory = { value = 16, unit = "GB", source = "its box" }
bandwidth = { value = 500, unit = "GB/s", source = "its box" }
[hardware.compute]
bfloat16 = { value = 100, unit = "TFLOP/s", source = "a guess" }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and no weights."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    return tmp_path


def test_all_names_of_a_model_give_the_same_estimate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    cached = folder / "hub" / "models--org--name"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc" / "config.json").write_text((folder / "config.json").read_text())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    asked: list[Any] = [SIZES, LlamaConfig(**SIZES), folder, str(folder / "config.json"), "org/name"]
    assert len({wb.cost(model, context=100).memory for model in asked}) == 1


def test_what_is_loaded_is_counted_in_its_own_precision() -> None:
    named, session = wb.cost("workbench-tiny", context=100), wb.Session("workbench-tiny", kv_dtype="bfloat16")
    assert wb.cost(session, context=100, dtype="bfloat16").memory == named.memory
    held = wb.cost(session, context=100).memory
    assert (held.weights, held.kv) == (2 * named.memory.weights, named.memory.kv)  # float32 here, its caches 16 bits
    assert wb.cost(session.model, context=100).memory.kv == 2 * named.memory.kv
    assert named.memory.weights == 2 * entry("workbench-tiny").parameters


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"model": "org/nothing"}, ModelNotFound, "hf download"),
        ({"model": "nothing"}, ModelNotFound, "not a packaged model"),
        ({"model": 3}, BadParameter, "give a name"),
        ({"model": {"hidden_sise": 64}}, BadParameter, "did you mean 'hidden_size'"),
        ({"model": {"model_type": "lama"}}, BadParameter, "did you mean 'llama'"),
        ({"model": {**SIZES, "num_attention_heads": "four"}}, BadParameter, "cannot be made"),
        ({"model": "t5"}, NotApplicable, "no causal language model"),
        ({"context": 0}, BadParameter, "context"),
        ({"context": 1 << 20}, BadParameter, "positions"),
        ({"batch": 1.5}, BadParameter, "batch"),
        ({"devices": 2, "hardware": "M4-Max"}, NotApplicable, "no link"),
        ({"dtype": "int4"}, BadParameter, "dtype"),
        ({"hardware": "H900"}, BadParameter, "did you mean H200"),
        ({"hardware": "NVMe-Gen4"}, NotApplicable, "computes nothing"),
        ({"recipe": ["svd", "rtn"]}, BadRecipe, "one of them at a time"),
        ({"recipe": "streaming-window"}, WorkbenchError, "streaming-window"),
        ({"recipe": "snapkv", "budget": 7}, BadBudget, "share"),
        ({"recipe": "modegpt"}, NotApplicable, "looks at the weights"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(asked: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        wb.cost(**{"model": "workbench-tiny", "context": 100, **asked})
    assert "\n" not in str(raised.value)


# -- hardware


def test_every_figure_has_a_source_and_a_device_is_found_by_any_of_its_names() -> None:
    for each in profiles():
        stated = [each.memory, each.bandwidth, each.host_link, each.device_link, each.power, *each.compute.values()]
        assert all(figure.source and figure.value > 0 for figure in stated if figure is not None)
        assert {hardware(name).name for name in (each.name, *each.aliases)} == {each.name}
        assert each.compute or each.kind == "drive"
    names = set(catalogue()["name"])
    assert {"H100", "H200", "A100-40", "A100-80", "L40S", "RTX-4090", "M2-Ultra", "M3-Max", "M4-Max", "U280"} <= names


def test_a_users_own_file_is_hardware(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    found = hardware(tmp_path / "mine.toml")
    assert isinstance(found, Hardware) and found.bandwidth.plain == 500e9 and found.memory.plain == 16e9
    told = wb.cost("workbench-tiny", hardware=f"{tmp_path}/mine.toml:mine", context=100)
    assert told.capacity == int(0.9 * 16e9)
    assert "its box" in found.summary()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no \\[\\[hardware\\]\\]"),
        ("[[hardware", "no file of hardware"),
        (MINE.replace("GB/s", "furlongs"), "bandwidth.unit is wrong"),
        (MINE.replace('kind = "gpu"', ""), "kind is wrong"),
        (MINE + "\n[[hardware]]\nnam = 3", "is wrong"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match=says) as raised:
        hardware(tmp_path / "mine.toml")
    assert "\n" not in str(raised.value)


def test_a_device_without_sixteen_bits_computes_with_eight() -> None:
    told = wb.cost("workbench-tiny", hardware="U280", context=100)
    assert any("int8 peak" in note for note in told.notes)


def test_numbers_are_json_and_name_every_figure() -> None:
    told = wb.cost("workbench-tiny", "kivi", context=100)
    found = json.loads(json.dumps(told.numbers()))
    assert found["memory"]["peak"] == told.memory.peak and found["decode_s"] == told.decode_s
    assert all(term["formula"] for term in found["decode"] + found["prefill"])
    assert told.summary().startswith("Cost of workbench-tiny under kivi")
