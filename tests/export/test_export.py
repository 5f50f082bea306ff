"""Exported models: as small on disk as in memory, and the same again when they are opened, here or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import workbench as wb
from workbench.cli import main
from workbench.errors import BadRecipe, CheckpointRefused, InputError, MissingExtra, NotApplicable, OutOfRange
from workbench.export import compressed_tensors, model
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights.layers import PackedLinear

IDS = torch.arange(3, 67)
SYMMETRIC = {"symmetric": True, "group_size": 32}
CASES = [("rtn", {}), ("rtn", {"bits": 3}), ("hqq", {}), ("svd", {"budget": 0.5}), ("flashsvd", {}), ("transact", {})]


def session(model: PreTrainedModel | None = None) -> wb.Session:
    made = wb.Session((model or tiny("llama"), None))
    made.calibrate("sampled", samples=2, tokens=16)
    return made


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def compressed(made: wb.Session, key: str, **parameters: Any) -> PreTrainedModel:
    return made.readings.variants.get([wb.method(key, **parameters)])


def tied() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


# -- our own format


def test_an_exported_model_that_remembers_its_prompt_is_read_as_exactly_as_others(tmp_path: Path) -> None:
    made = session()
    made.read(IDS)
    made.export(tmp_path / "small", "coreinfer")
    opened = wb.Session(tmp_path / "small")
    opened.read(IDS)
    assert opened.run("full", max_new_tokens=4).tokens == made.run("coreinfer", max_new_tokens=4).tokens


@pytest.mark.parametrize(("key", "parameters"), CASES, ids=[f"{key}-{len(p)}" for key, p in CASES])
def test_an_exported_model_is_the_compressed_one_again(key: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    made = session()
    done = made.export(tmp_path / "m", key, format="workbench", **parameters)
    twin, again = compressed(made, key, **parameters), wb.Session.load(tmp_path / "m")
    assert torch.equal(logits(again.model), logits(twin))
    assert [type(x) for x in again.model.modules()] == [type(x) for x in twin.modules()]
    live = tensor_bytes([*twin.parameters(), *twin.buffers()])
    assert tensor_bytes([*again.model.parameters(), *again.model.buffers()]) == live == again.facts.weight_bytes
    on_disk = done.compressed_nbytes + done.rest_nbytes
    assert live <= on_disk <= 1.01 * live and done.nbytes == (tmp_path / "m" / model.TENSORS).stat().st_size
    assert again.facts.parameters == made.facts.parameters


def test_scales_that_went_into_norms_are_no_obstacle_to_compressed_tensors(tmp_path: Path) -> None:
    made = session()
    made.export(tmp_path / "m", "awq", format="compressed-tensors", **SYMMETRIC)
    twin = compressed(made, "awq", **SYMMETRIC)
    norms = [x.get_submodule("model.layers.0.input_layernorm").weight for x in (twin, made.model)]
    assert not torch.equal(*norms)
    assert torch.equal(logits(wb.Session(tmp_path / "m").model), logits(twin))
    with pytest.raises(NotApplicable, match=r"is a PackedLinear|factor for each column"):
        made.export(tmp_path / "n", "awq", format="compressed-tensors", fold=False, **SYMMETRIC)


@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize(
    "recipe",
    [
        ["ostquant"],
        ["awq"],
        [wb.weights.OSTQuant(input_bits=8)],
        ["quarot", "gptq"],
        ["wanda", "gptq"],
        ["svd", "rtn", wb.weights.Activations(static=True)],
        ["quarot", "absmax", "activations"],
    ],
)
def test_recipes_of_several_weight_methods_come_back(recipe: list[Any], untied: bool, tmp_path: Path) -> None:
    made = session(tiny("llama") if untied else tied())
    done = made.export(tmp_path / "m", recipe, format="workbench")
    twin, again = made.readings.variants.get(wb.Recipe.of(recipe).methods), wb.Session.load(tmp_path / "m")
    assert torch.equal(logits(again.model), logits(twin))
    assert (again.model.lm_head.weight is again.model.get_input_embeddings().weight) is not untied
    live = tensor_bytes([*twin.parameters(), *twin.buffers()])
    assert live == again.facts.weight_bytes and live <= done.compressed_nbytes + done.rest_nbytes <= 1.01 * live


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "phi3", "mixtral"])
def test_other_architectures_come_back_too(architecture: str, tmp_path: Path) -> None:
    made = session(tiny(architecture))
    made.export(tmp_path / "m", "hqq", format="workbench")
    assert torch.equal(logits(wb.Session(tmp_path / "m").model), logits(compressed(made, "hqq")))


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    made = session(tied())
    for written in ("workbench", "compressed-tensors"):
        made.export(tmp_path / written, "rtn", format=written, **SYMMETRIC)
        again = wb.Session(tmp_path / written).model
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(logits(again), logits(compressed(made, "rtn", **SYMMETRIC)))
        with safe_open(next((tmp_path / written).glob("*.safetensors")), framework="pt") as held:
            assert sum(name in ("lm_head.weight", "model.embed_tokens.weight") for name in held.keys()) == 1  # noqa: SIM118


def test_an_opened_model_reads_runs_and_is_not_compressed_again(tmp_path: Path) -> None:
    made = session()
    made.export(tmp_path / "m", "rtn")
    again = wb.Session(tmp_path / "m")
    again.read(IDS)
    made.read(IDS)
    assert again.run("full", max_new_tokens=6).tokens == made.run("rtn", max_new_tokens=6).tokens
    with pytest.raises(NotApplicable, match="no linear layer left"):
        again.run("rtn")


def test_what_is_not_compressed_can_be_written_at_16_bits(tmp_path: Path) -> None:
    made = session()
    whole = made.export(tmp_path / "a", "rtn")
    half = made.export(tmp_path / "b", "rtn", dtype="bfloat16")
    assert half.compressed_nbytes == whole.compressed_nbytes and half.rest_nbytes < 0.52 * whole.rest_nbytes
    twin, again = compressed(made, "rtn"), wb.Session(tmp_path / "b")
    assert again.model.dtype == torch.float32  # computed in, on a CPU
    assert again.model.get_submodule("model.layers.0.mlp.up_proj").scale.dtype == torch.float16
    assert float((logits(again.model) - logits(twin)).norm() / logits(twin).norm()) < 0.05


def test_nothing_is_pickled_and_the_recipe_is_written_beside_the_weights(tmp_path: Path) -> None:
    session().export(tmp_path / "m", "hqq", bits=4)
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".safetensors"}
    described = json.loads((tmp_path / "m" / model.DESCRIPTION).read_text())
    assert described["methods"] == [wb.method("hqq", bits=4).to_dict()] and "lm_head" in described["notes"][0]


@pytest.mark.parametrize(("key", "names"), [
    ("coreinfer", {"layers.core_mlp:CoreMLP": "coreinfer:CoreMLP"}),
    ("flashsvd", {"layers.low_rank:LowRankLinear": "low_rank:LowRankLinear",
                  "layers.streamed_mlp:StreamedMLP": "low_rank:StreamedMLP"}),
    ("transact", {"layers.narrow_attention:NarrowAttention": "narrow:NarrowAttention"}),
])  # fmt: skip
def test_folders_that_name_classes_by_earlier_paths_are_read(key: str, names: dict[str, str], tmp_path: Path) -> None:
    made = session()
    made.export(tmp_path / "m", key, format="workbench")
    path = tmp_path / "m" / model.DESCRIPTION
    text = path.read_text()
    for now, then in names.items():
        assert f"workbench.weights.{now}" in text
        text = text.replace(f"workbench.weights.{now}", f"workbench.weights.{then}")
    path.write_text(text)
    assert torch.equal(logits(wb.Session(tmp_path / "m").model), logits(compressed(made, key)))


def edit(folder: Path, change: Any) -> None:
    path = folder / model.DESCRIPTION
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


def swap_class(name: str) -> Any:
    return lambda described: described["modules"]["model.layers.0.mlp.up_proj"].update({"class": name})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, swap_class("os:system")), "no layer of a weight method"),
        (lambda f: edit(f, swap_class("workbench.budget:Budget")), "no layer of a weight method"),
        (lambda f: edit(f, lambda d: d["tensors"].pop("model.norm.weight")), "lack model.norm.weight"),
        (lambda f: edit(f, lambda d: d.pop("modules")), "damaged"),
        (lambda f: edit(f, lambda d: d.update(version=99)), "newer workbench"),
        (lambda f: (f / model.TENSORS).unlink(), "damaged"),
        (lambda f: (f / model.TENSORS).write_bytes(b"x" * 40), "damaged"),
    ],
)
def test_a_damaged_or_foreign_export_is_refused_in_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    session().export(tmp_path / "m", "rtn")
    damage(tmp_path / "m")
    with pytest.raises(CheckpointRefused, match=message) as refusal:
        wb.Session(tmp_path / "m")
    assert "\n" not in str(refusal.value)


def test_only_an_earlier_export_is_overwritten(tmp_path: Path) -> None:
    made = session()
    made.export(tmp_path / "m", "rtn")
    made.export(tmp_path / "m", "svd")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="nothing was overwritten"):
        made.export(tmp_path / "other", "rtn")
    assert (tmp_path / "other" / "thesis.txt").exists()
    with pytest.raises(BadRecipe, match="snapkv"):
        made.export(tmp_path / "n", ["rtn", "snapkv"])


def test_a_layer_that_is_no_plain_data_is_named(tmp_path: Path) -> None:
    made = session()
    twin = compressed(made, "rtn")
    twin.get_submodule("model.layers.1.mlp.up_proj").odd = object()
    with pytest.raises(NotApplicable, match=r"up_proj\.odd is a object"):
        made.export(tmp_path / "m", "rtn")
    assert not list(tmp_path.iterdir())


# -- compressed-tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "phi3", "mixtral"])
def test_plain_transformers_loads_what_it_has_a_format_for(architecture: str, tmp_path: Path) -> None:
    made = session(tiny(architecture))
    done = made.export(tmp_path / "m", "rtn", **SYMMETRIC)
    assert done.format == "compressed-tensors" and not done.why
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    twin = compressed(made, "rtn", **SYMMETRIC)
    torch.testing.assert_close(logits(theirs), logits(twin), rtol=1e-5, atol=1e-5)
    ours = wb.Session(tmp_path / "m")
    assert torch.equal(logits(ours.model), logits(twin))
    assert any(isinstance(module, PackedLinear) for module in ours.model.modules())


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (8, 32), (4, 1024)])
def test_all_bit_widths_and_one_scale_a_row_load_elsewhere(bits: int, group: int, tmp_path: Path) -> None:
    made = session()
    recipe = {"bits": bits, "group_size": group, "symmetric": True}
    done = made.export(tmp_path / "m", "rtn", **recipe)
    held = tensor_bytes(compressed(made, "rtn", **recipe).get_submodule("model.layers.0").buffers()) * 3
    assert done.compressed_nbytes == held and done.nbytes < 1.1 * (done.compressed_nbytes + done.rest_nbytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(compressed(made, "rtn", **recipe)), rtol=1e-5, atol=1e-5)


def test_layers_of_different_bits_share_one_checkpoint(tmp_path: Path) -> None:
    made = session()
    mixed = {"of": "rtn symmetric=true group_size=32", "budget": 0.3, "generations": 1, "texts": 2, "tokens": 16}
    done = made.export(tmp_path / "m", "evopress", **mixed)
    groups = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert done.format == "compressed-tensors" and len(groups) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(compressed(made, "evopress", **mixed)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "parameters", "reason"),
    [
        ("rtn", {"symmetric": False}, "zeros of its own"),
        ("svd", {}, "LowRankLinear"),
        ("rtn", {"symmetric": True, "group_size": 40}, "no multiple of its groups"),
    ],
)
def test_what_has_no_place_in_the_format_is_named_and_goes_into_our_own(
    key: str, parameters: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    made = session()
    with pytest.raises(NotApplicable, match=reason):
        made.export(tmp_path / "m", key, format="compressed-tensors", **parameters)
    done = made.export(tmp_path / "m", key, **parameters)
    assert done.format == "workbench" and reason in done.why


def test_without_the_library_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_tensors, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"inference-workbench\[export\]"):
        session().export(tmp_path / "m", "rtn", format="compressed-tensors", **SYMMETRIC)
    assert session().export(tmp_path / "m", "rtn", **SYMMETRIC).format == "workbench"


# -- saved sessions, and the command line


def test_a_saved_session_keeps_the_texts_it_calibrates_on(tmp_path: Path) -> None:
    made = session()
    made.save(tmp_path / "s")
    again = wb.Session.load(tmp_path / "s", model=(tiny("llama"), None))
    assert again.calibration == made.calibration and again.calibration is not None
    assert torch.equal(again.calibrate().ids, made.calibrate().ids)
    plain = wb.Session((tiny("llama"), None))
    plain.save(tmp_path / "p")
    assert wb.Session.load(tmp_path / "p", model=(tiny("llama"), None)).calibration is None


def test_the_command_line_exports_and_measures_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    common = ["--model", str(tmp_path / "model"), "--calibration", "workbench", "--set", "group_size=32", "--json"]
    assert main(["export", "rtn", "--to", str(tmp_path / "m"), "--set", "symmetric=true", *common]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["format"] == "compressed-tensors" and Path(done["path"]) == tmp_path / "m"
    assert main(["sensitivity", "rtn", "--texts", "1", "--tokens", "16", *common]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 + 7 and {"layer", "module", "kl", "error"} == set(rows[0])
    assert main(["sensitivity", "rtn", "--each", "head", *common]) == 2
    assert "layer or module" in capsys.readouterr().err


# --- What a model has beside its weights


@pytest.mark.parametrize(
    ("settings", "mended"),
    [
        ({"temperature": 0.6}, {"temperature"}),
        ({"temperature": 0.6, "top_p": 0.9, "max_new_tokens": "many"}, {"temperature", "top_p", "max_new_tokens"}),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping", "length_penalty"}),
        ({"num_beams": 2, "num_return_sequences": 4}, {"num_return_sequences"}),
        ({"cache_implementation": "none such"}, {"cache_implementation"}),
        ({"own": object()}, {"own"}),
        ({"do_sample": True, "temperature": 0.6}, set()),
    ],
)
def test_a_generation_config_that_is_not_valid_is_mended_and_the_export_says_so(
    tmp_path: Path, settings: dict[str, Any], mended: set[str]
) -> None:
    made = session()
    for name, value in {**settings, "eos_token_id": 7}.items():
        setattr(made.model.generation_config, name, value)
    done = made.export(tmp_path / "m", "rtn")
    assert {text.partition("=")[0] for text in done.mended} == mended
    assert all(text in str(done) for text in done.mended)
    found = GenerationConfig.from_pretrained(str(tmp_path / "m"))
    found.validate(strict=True)
    kept = {name: value for name, value in settings.items() if name not in mended}
    assert all(getattr(found, name) == value for name, value in {**kept, "eos_token_id": 7}.items())
    assert all(getattr(made.model.generation_config, name) == value for name, value in settings.items())
    assert wb.Session(tmp_path / "m").facts.eos_ids == (7,)


def test_a_config_or_a_tokenizer_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    made = session()
    made.model.config.own = torch.ones(2)
    with pytest.raises(NotApplicable, match="cannot be written for its 'own'"):
        made.export(tmp_path / "m", "rtn")

    class Unwritten(PreTrainedTokenizerFast):
        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("no files")

    tokenizer = Unwritten(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(NotApplicable, match=r"Unwritten cannot be written \(NotImplementedError: no files\)"):
        wb.Session((tiny("llama", layers=2), tokenizer)).export(tmp_path / "m", "rtn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["~nobody-of-this-name/m", "a\0b", "file/m"])
def test_paths_that_cannot_be_written_to_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError) as refusal:
        session().export(path, "rtn")
    assert "\n" not in str(refusal.value)


def test_names_in_another_encoding_do_not_stop_an_export(tmp_path: Path) -> None:
    made = session()
    made.model.config._name_or_path = "models/\udc80"
    wb.Session((made.model, None)).export(tmp_path / "m", "rtn")
    assert wb.Session(tmp_path / "m").facts.name == "models/?"


def test_a_weight_that_the_exported_dtype_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", layers=2)
    model.lm_head.weight.data[3, 4] = -7e4
    with pytest.raises(OutOfRange, match=r"lm_head\.weight reach 7e\+04, and float16 ends at 65,504"):
        wb.Session((model, None)).export(tmp_path / "m", "rtn", dtype="float16")
    wb.Session((model, None)).export(tmp_path / "m", "rtn", dtype="bfloat16")
    with pytest.raises(OutOfRange, match="lm_head"):
        wb.Session(tmp_path / "m", dtype="float16")


def test_models_with_transposed_weights_are_written_in_our_own_format(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    made = wb.Session((GPT2LMHeadModel(config).eval(), None))
    done = made.export(tmp_path / "m", "rtn", symmetric=True, group_size=32)
    assert done.format == "workbench" and "stands for a Conv1D" in done.why
    again = wb.Session(tmp_path / "m").model
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, compressed(made, "rtn", symmetric=True, group_size=32)(ids).logits)
