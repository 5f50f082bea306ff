"""Files that never end, claim what cannot be, or contradict each other: refused in a line, before anything heavy.

Nothing here is timed: on a reader that believes a file, a test hangs or takes all memory.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench as wb
from workbench.errors import CheckpointRefused, InputError, ModelNotFound
from workbench.files import paths, strict_json
from workbench.models import load, tiny
from workbench.models.gguf.header import read_header

NO_PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(place: str | Path, match: str | None = None) -> str:
    with pytest.raises((CheckpointRefused, ModelNotFound), match=match) as caught:
        load(place, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


# --- Paths


@pytest.mark.parametrize("name", ["~nosuch/model", "~nosuch", "a\0b", "/dev/zero", "/dev/stdin"])
def test_a_name_that_leads_nowhere_is_no_model(name: str) -> None:
    refused(name)


def test_a_place_is_a_path_or_an_error_of_the_system() -> None:
    assert paths.place("~") == Path.home()
    for name in ("~nosuch/x", "a\0b"):
        with pytest.raises(OSError, match=r"home|NUL"):
            paths.place(name)


@pytest.mark.parametrize("name", ["~nosuch/x", "a\0b"])
def test_a_session_is_not_saved_where_there_is_no_place(name: str) -> None:
    session = wb.Session((tiny("llama"), None))
    with pytest.raises(InputError) as caught:
        session.save(name)
    assert "\n" not in str(caught.value)


@NO_PIPES
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "special_tokens_map.json",
    ],
)
def test_a_pipe_named_like_a_part_of_a_model_is_never_opened(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, "pipe")


@NO_PIPES
def test_a_pipe_named_like_a_model_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "x.gguf", tmp_path / "x.safetensors", tmp_path / "folder" / "x.gguf"):
        os.mkfifo(place)
        refused(place if place.parent == tmp_path else place.parent, "pipe")


@NO_PIPES
@pytest.mark.parametrize("name", ["session.json", "trace.safetensors"])
def test_a_pipe_in_a_saved_session_is_never_opened(tmp_path: Path, name: str) -> None:
    model = tiny("llama")
    session = wb.Session((model, None))
    session.read(torch.arange(3, 20))
    session.save(tmp_path / "saved")
    (tmp_path / "saved" / name).unlink()
    os.mkfifo(tmp_path / "saved" / name)
    with pytest.raises((InputError, CheckpointRefused), match="pipe"):
        wb.Session.load(tmp_path / "saved", model=(model, None))


# --- JSON


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"a":' + "[" * 500 + "]" * 500 + "}", "[1]", "7", "{", "9" * 5000]
)
def test_json_from_outside_is_an_object_of_bounded_depth(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        strict_json.read(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_json_from_outside_is_of_bounded_size(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on the disk
    with pytest.raises(OSError, match="bytes"):
        strict_json.read(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' + "[" * 500 + "]" * 500 + "}", "{", "[]"])
def test_a_broken_or_bottomless_file_beside_the_weights_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    refused(folder, name)


# --- Configs


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**40},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 200},
        {"num_hidden_layers": 2},
        {"vocab_size": 10**12},
        {"vocab_size": 100_000},
        {"hidden_size": 10**9},
        {"hidden_size": 1 << 20, "intermediate_size": 1 << 20},
        {"intermediate_size": 10**11},
        {"max_position_embeddings": 10**15},
        {"num_attention_heads": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 10**9},
        {"text_config": "x"},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"model_type": ["llama"]},
        {"model_type": "mixtral", "num_local_experts": 10**9},
        {"model_type": "deepseek_v3", "n_routed_experts": 10**7},
        {"dtype": "weird"},
        {"dtype": 5},
        {"quantization_config": 5},
        {"quantization_config": {"quant_method": "unheard-of"}},
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    refused(folder)


# --- Weights


def test_a_tensor_that_the_model_does_not_take_is_named(folder: Path) -> None:
    reweigh(folder, **{"model.layers.3.mlp.up_proj.weight": torch.ones(128, 64)})
    refused(folder, r"layers\.3\.mlp\.up_proj")


def test_tables_that_every_model_makes_for_itself_are_no_reason_to_refuse(folder: Path) -> None:
    reweigh(folder, **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)})
    assert load(folder, device="cpu").facts.layers == 3


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    reweigh(folder, **{"model.layers.1.mlp.up_proj.weight": torch.ones(100, 64)})
    assert "[100, 64]" in refused(folder, r"layers\.1\.mlp\.up_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    weight = load_file(folder / "model.safetensors")["model.layers.2.self_attn.o_proj.weight"]
    weight[3, 5] = value
    reweigh(folder, **{"model.layers.2.self_attn.o_proj.weight": weight})
    refused(folder, r"layers\.2\.self_attn\.o_proj.*1 values")


def test_large_weights_that_are_finite_are_numbers_like_others(folder: Path) -> None:
    reweigh(folder, **{"model.layers.1.mlp.up_proj.weight": torch.full((128, 64), 3e38)})  # their sum is not
    assert load(folder, device="cpu").facts.layers == 3


def test_a_weight_that_float16_cannot_hold_is_named_with_the_way_out(folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")["model.norm.weight"]
    weight[0] = 7e4
    reweigh(folder, **{"model.norm.weight": weight})
    with pytest.raises(CheckpointRefused, match=r"model\.norm.*bfloat16"):
        load(folder, device="cpu", dtype="float16")
    assert load(folder, device="cpu", dtype="bfloat16").facts.layers == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_that_need_a_scale_are_not_taken_as_they_are(folder: Path, dtype: torch.dtype) -> None:
    reweigh(folder, **{"model.layers.1.mlp.up_proj.weight": torch.ones(128, 64).to(dtype)})
    refused(folder, r"layers\.1\.mlp\.up_proj.*quantization_config")


def test_two_weights_that_the_config_ties_must_be_equal(folder: Path) -> None:
    edit(folder, tie_word_embeddings=True)
    refused(folder, r"ties lm_head\.weight")
    reweigh(folder, **{"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()})
    assert load(folder, device="cpu").facts.layers == 3


def shards(folder: Path, *, also_in_both: str | None = None) -> dict[str, str]:
    """The folder's weights in two files, with the index that names them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        held = {name: weights[name] for name in names if places[name] == file or name == also_in_both}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards_hold_every_tensor_once(folder: Path) -> None:
    ids = torch.arange(3, 20)[None]
    expected = load(folder, device="cpu").model(ids).logits
    places = shards(folder)
    assert torch.equal(load(folder, device="cpu").model(ids).logits, expected)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {**places, "more": places["lm_head.weight"]}})
    )
    refused(folder, "more")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shards(folder, also_in_both="model.norm.weight")
    refused(folder, r"model\.norm\.weight is in both")


def test_weights_in_two_forms_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(whole)
    refused(folder, "twice")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hostname", ["a"], 7])
def test_an_index_names_files_of_its_own_folder(folder: Path, shard: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    refused(folder)


def test_an_adapter_is_not_dropped_in_silence(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter")


def test_weights_under_another_name_are_not_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(folder, r"neither model\.safetensors")


# --- GGUF headers


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(keys: list[bytes], tensors: list[bytes] | None = None, **counts: int) -> bytes:
    entries = tensors or []
    start = struct.pack("<4sIQQ", b"GGUF", 3, counts.get("of_tensors", len(entries)), counts.get("of_keys", len(keys)))
    return start + b"".join(keys) + b"".join(entries) + bytes(64)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


LLAMA = key(b"general.architecture", 8, text(b"llama"))
ARRAY, UINT8, TEXT = 9, 0, 8


@pytest.mark.parametrize(
    "content",
    [
        header([key(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 60))]),
        header([key(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 21)), LLAMA]),
        header([key(b"a", ARRAY, struct.pack("<IQ", UINT8, 1 << 60))]),
        header([key(b"a", ARRAY, struct.pack("<IQ", UINT8, 1 << 20))]),
        header([key(b"a", ARRAY, struct.pack("<IQ", TEXT, 1 << 60))]),
        header([key(b"a", ARRAY, struct.pack("<IQ", 99, 1 << 20))]),
        header([key(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000)]),
        header([key(b"a", TEXT, struct.pack("<Q", 1 << 62))]),
        header([key(b"a", 99, b"")]),
        header([], of_keys=1 << 63),
        header([], of_tensors=1 << 63),
        header([LLAMA, LLAMA]),
        header([key(b"\xff\xfe", 4, b"1234")]),
        header([key(b"general.alignment", 4, struct.pack("<I", 0)), LLAMA]),
        header([key(b"general.alignment", 4, struct.pack("<I", 24)), LLAMA]),
        header([key(b"general.alignment", 4, struct.pack("<I", 1 << 31)), LLAMA]),
        header([key(b"general.alignment", TEXT, text(b"32")), LLAMA]),
        header([key(b"general.architecture", 4, b"1234")]),
        header([]),
        header([LLAMA], [tensor([4], offset=1 << 40)]),
        header([LLAMA], [tensor([4], offset=7)]),
        header([LLAMA], [tensor([1 << 32, 1 << 32])]),
        header([LLAMA], [tensor([0, 1 << 62])]),
        header([LLAMA], [tensor([])]),
        header([LLAMA], [tensor([1] * 5)]),
        header([LLAMA], [text(b"t") + struct.pack("<I", 1 << 31)]),
        header([LLAMA], [tensor([4], kind=4)]),
        header([LLAMA], [tensor([4], kind=12_345)]),
        header([LLAMA], [tensor([31], kind=8)]),
        header([LLAMA], [tensor([4]), tensor([4])]),
        header([LLAMA], [tensor([8]), tensor([8], name=b"u")]),
        b"GGUF" + bytes(45),
        struct.pack(">4sIQQ", b"GGUF", 3, 0, 0),
        struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", "GGUF")


def test_every_cut_of_a_header_is_refused(tmp_path: Path) -> None:
    whole = header([LLAMA, key(b"a", ARRAY, struct.pack("<IQ", TEXT, 2) + text(b"b") + text(b"c"))], [tensor([4])])
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert read_header(path).metadata["a"] == ["b", "c"]
    for length in range(len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointRefused):
            read_header(path)
