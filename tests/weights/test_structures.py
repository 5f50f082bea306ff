"""Weight methods and reports on models of other structures: they work, or say in one line why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import workbench as wb
from tests.weights.support import logits
from workbench.errors import BudgetTooSmall, InputError, NotApplicable
from workbench.inspection.channels import channel_table
from workbench.models import UNLIMITED, max_positions, tiny
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of
from workbench.progress import Progress
from workbench.registry import registered
from workbench.weights import PBLLM, RTN, SVD, DenseShift, Magnitude
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.block_runner import BlockRunner
from workbench.weights.calibration.model_head import ModelHead
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.compress import compressed
from workbench.weights.layers import PackedLinear
from workbench.weights.reports.census import census_of
from workbench.weights.reports.rounding import rounding_of
from workbench.weights.reports.sensitivity import sensitivity_of
from workbench.weights.reports.spectra import spectra_of
from workbench.weights.surgery.prunable import PrunableMLP, prunable_modules
from workbench.weights.variants import Variants

_IDS: dict[str, Any] = {"vocab_size": 64, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
_MHA: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GQA: dict[str, Any] = {**_MHA, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _llava() -> Any:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION), text_config=tf.LlamaConfig(**_GQA), image_token_index=63
    )
    return tf.LlavaForConditionalGeneration(config)


def _opt() -> Any:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    return tf.OPTForCausalLM(tf.OPTConfig(**_IDS, **sizes, num_attention_heads=4, max_position_embeddings=128))


def _gemma3n() -> Any:
    own = {"num_kv_shared_layers": 1, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    sparse = {"laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0]}
    return tf.Gemma3nForCausalLM(tf.Gemma3nTextConfig(**_GQA, **own, **sparse, head_dim=8))


def _dbrx() -> Any:
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}
    return tf.DbrxForCausalLM(tf.DbrxConfig(**_IDS, **sizes, attn_config=attention, ffn_config=experts))


def _deepseek() -> Any:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = {**_GQA, "num_key_value_heads": 4, **ranks, **experts, "moe_intermediate_size": 16}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**config, first_k_dense_replace=1))


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),  # Conv1D: weights lie transposed
    "gpt1": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**_GPT2)),  # no cache, blocks return lists
    "opt": _opt,
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(**_IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**_MHA)),  # a linear layer of its own class
    "bert": lambda: tf.BertLMHeadModel(tf.BertConfig(**_MHA, is_decoder=True)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GQA)),  # fused projections
    "gemma3n": _gemma3n,  # several streams of hidden states
    "dbrx": _dbrx,
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GQA, num_local_experts=4)),
    "deepseek_v3": _deepseek,  # dense and expert layers
    "ctrl": lambda: tf.CTRLLMHeadModel(tf.CTRLConfig(**_GPT2, dff=64)),  # scales its embedding in place
    "llava": _llava,  # as many vision layers as decoder layers
}
_QUICK: dict[str, dict[str, Any]] = {
    "evopress": {"of": "rtn", "generations": 1, "offspring": 2, "texts": 2, "tokens": 16, "slopes": 0},
    "foldgpt": {"steps": 2},
    "ziplm": {"starts": 2, "patience": 1, "texts": 2, "tokens": 16},
    "evopress-depth": {"generations": 1, "offspring": 2, "beginnings": 2, "texts": 2, "tokens": 16},
    "transact": {"texts": 2},
    "cospadi": {"rounds": 1},
    "easyquant": {"steps": 2},
    "hqq": {"group_size": 8},
    "vq-logits": {"budget": 0.5},
}
_TEXTS = Calibration(SAMPLED, samples=2, tokens=16)
_TOKENS = torch.arange(3, 27).view(2, 12)


@cache
def model(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = MODELS[name]()
    made.eval()
    made.requires_grad_(False)
    return made


def one_line(error: InputError) -> bool:
    return bool(str(error)) and "\n" not in str(error)


def or_refusal(make: Callable[[], Any]) -> Any:
    """What was made, or the error that refused it."""
    try:
        return make()
    except InputError as refusal:
        return refusal


# --- Every method on every structure


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_method_works_or_says_in_one_line_why_not(name: str) -> None:
    plain, worked = model(name), []
    variants = Variants(plain, None, _TEXTS)
    before = logits(plain, _TOKENS)
    for cls in registered("weights"):
        key, method = cls.key, cls(**_QUICK.get(cls.key, {}))
        made = or_refusal(lambda method=method: variants.get((method,)))
        if isinstance(made, InputError):
            assert one_line(made), key
            continue
        assert logits(made, _TOKENS).isfinite().all(), key
        assert method.note(plain).startswith(key)
        worked.append(key)
    assert {"rtn", "hqq", "easyquant"} <= set(worked)
    assert name == "gemma3n" or {"gptq", "awq", "owq", "vptq"} <= set(worked)
    assert torch.equal(logits(plain, _TOKENS), before)


@pytest.mark.parametrize("name", MODELS)
def test_every_report_has_rows_or_says_in_one_line_why_not(name: str) -> None:
    plain = model(name)
    variants = Variants(plain, None, _TEXTS)
    twin = variants.get((RTN(group_size=8),))
    packed = [path for path, module in twin.named_modules() if isinstance(module, PackedLinear)]
    inside = [path for path in packed if path.startswith(tuple(f"{layer}." for layer in decoder_layers(plain)))]
    reports: dict[str, Callable[[], Any]] = {
        "census": lambda: census_of(plain, twin, variants.study()),
        "sensitivity": lambda: sensitivity_of(plain, twin, _TOKENS),
        "rounding": lambda: rounding_of(twin, _TOKENS),
    }
    for key, report in reports.items():
        rows = or_refusal(report)
        if isinstance(rows, InputError):
            assert isinstance(rows, NotApplicable) and name == "gemma3n" and one_line(rows), key
        else:
            assert len(rows) > 0, key
    assert len(spectra_of(plain)) == len(spectra_of(twin)) == len(inside)
    rows = census_of(plain, twin)
    assert sorted(rows.loc[rows["form"] == "PackedLinear", "name"]) == sorted(packed)
    matrices = {id(parameter) for parameter in plain.parameters() if parameter.ndim >= 2}
    assert len(rows) == len(matrices)  # tied ones come once; no mask, no table of positions that is a buffer
    table = channel_table("weights", plain)
    assert table["layer"].max() == len(decoder_layers(plain)) - 1
    placed = table.dropna(subset=["layer"])
    assert placed.groupby(["layer", "module"], observed=True).ngroups == len(inside)


# --- Where things are


def test_the_decoders_layers_are_found_whatever_they_are_called() -> None:
    want = {"gpt2": "transformer.h", "mpt": "transformer.blocks", "opt": "model.decoder.layers"}
    want |= {"bert": "bert.encoder.layer", "llava": "model.language_model.layers", "gemma3n": "model.layers"}
    for name, path in want.items():
        assert list(decoder_layers(model(name))) == [f"{path}.0", f"{path}.1"]


def test_a_model_without_such_a_list_is_refused_by_name() -> None:
    broken = tiny("llama", layers=2)
    broken.config.num_hidden_layers = 7
    with pytest.raises(NotApplicable, match="LlamaForCausalLM has no list of 7 decoder layers"):
        decoder_layers(broken)


def test_tables_of_positions_that_begin_behind_their_padding_are_shorter() -> None:
    roberta = tf.RobertaForCausalLM(tf.RobertaConfig(**{**_MHA, "pad_token_id": 1}, is_decoder=True))
    assert max_positions(roberta) == 126
    assert logits(roberta.eval(), torch.full((1, 126), 5)).isfinite().all()
    assert max_positions(model("bloom")) == UNLIMITED and max_positions(model("mpt")) == 128


def test_conv1d_and_subclasses_that_compute_the_same_are_linear_layers() -> None:
    x = torch.randn(3, 32)
    for name, path in (("gpt2", "transformer.h.0.attn.c_attn"), ("falcon", "transformer.h.1.mlp.dense_h_to_4h")):
        module = model(name).get_submodule(path)
        linear = linear_of(module)
        assert linear is not None and type(module) is not nn.Linear
        torch.testing.assert_close(linear(x), module(x))
        assert linear.weight.data_ptr() == module.weight.data_ptr()  # nothing was copied

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert linear_of(Doubled(4, 4)) is None and linear_of(nn.Embedding(4, 4)) is None


def test_a_gated_mlp_that_also_keeps_only_the_largest_is_none_whose_neurons_can_go() -> None:
    gated = [module.name for module in prunable_modules(model("gemma3n")) if isinstance(module, PrunableMLP)]
    assert gated == []  # one class, and the first of its layers is sparse
    assert (
        len([module for module in prunable_modules(tiny("gemma3", layers=2)) if isinstance(module, PrunableMLP)]) == 2
    )


# --- What comes out is right


def test_transposed_weights_are_rounded_as_linear_ones_are() -> None:
    plain = model("gpt2")
    twin = compressed(plain, [RTN(group_size=8)])
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        weight = plain.get_submodule(name).weight
        alike = nn.Sequential(nn.Linear(weight.shape[0], weight.shape[1], bias=False))
        alike[0].weight = nn.Parameter(weight.T.clone())  # type: ignore[union-attr]
        want = RTN(group_size=8).compress(alike[0])  # type: ignore[arg-type]
        assert torch.equal(twin.get_submodule(name).dequantised(), want.dequantised())  # type: ignore[operator]
    errors = census_of(plain, twin, WeightStudy(plain, calibration=_TEXTS))
    within = errors[errors["form"] == "PackedLinear"]
    assert within[["weight_error", "output_error"]].max().max() < 0.2


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gemma3n"])
def test_blocks_one_after_another_and_the_ending_are_the_model(name: str) -> None:
    plain = model(name)
    ids = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(1))
    runner = BlockRunner(plain, ids, batch=24)
    for block, _ in runner:
        for _ in runner.run(block):
            pass
    torch.testing.assert_close(ModelHead(plain).logits(runner.hidden), logits(plain, ids), rtol=1e-3, atol=1e-4)


def test_blocks_that_are_told_about_the_text_are_refused() -> None:
    class Told(nn.Module):
        """A layer that adds what the model looked up for these ids."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor, looked_up: Tensor, **kwargs: Any) -> Tensor:
            found = self.inner(hidden_states, **kwargs)
            return (found[0] if isinstance(found, tuple) else found) + looked_up

    plain = tiny("llama", layers=2)
    core: Any = plain.model
    core.layers[1] = Told(core.layers[1])
    core.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"looked_up": core.looked_up, **kwargs}), with_kwargs=True
    )
    core.embed_tokens.register_forward_hook(lambda module, args, out: setattr(core, "looked_up", 5 * out))
    runner = BlockRunner(plain, torch.arange(24).view(3, 8))
    list(runner.run("model.layers.0"))
    with pytest.raises(NotApplicable, match=r"model\.layers\.1 is given more than hidden states"):
        list(runner.run("model.layers.1"))


# --- Budgets beside experts


def share_left(plain: Any, twin: Any) -> float:
    """What is left of the 16-bit bytes of the matrices in the decoder's layers."""
    rows = census_of(plain, twin)
    rows = rows[rows["layer"].notna()]
    return float(rows["bytes"].sum() / (rows["bytes"] / rows["share"]).sum())


@pytest.mark.parametrize("method", [RTN(budget=0.4), SVD(budget=0.4), Magnitude(budget=0.4)], ids=lambda m: m.key)
def test_a_budget_that_experts_leave_no_room_for_is_refused_and_names_them(method: WeightMethod) -> None:
    plain = model("mixtral")
    with pytest.raises(BudgetTooSmall, match=r"experts\.gate_up_proj and 3 more \(fused experts") as refusal:
        compressed(plain, [method])
    smallest = refusal.value.smallest
    assert one_line(refusal.value) and 0.8 < smallest < 1
    asked = method.with_budget(smallest)
    assert share_left(plain, compressed(plain, [asked])) <= smallest
    with pytest.raises(BudgetTooSmall):
        compressed(plain, [method.with_budget(smallest - 0.01)])


def test_a_budget_beside_experts_is_used() -> None:
    plain = model("mixtral")
    for budget in (0.92, 0.96):
        assert budget - 0.02 < share_left(plain, compressed(plain, [SVD(budget=budget)])) <= budget
    size = sum(2 * weight.numel() for layer in decoder_layers(plain).values() for weight in layer.parameters())
    with pytest.raises(BudgetTooSmall, match="fused experts"):
        compressed(plain, [RTN(budget=f"{size // 2} bytes")])
    assert compressed(plain, [RTN(budget=f"{size} bytes")]) is not None


def test_where_everything_is_taken_budgets_mean_what_they_did() -> None:
    plain = tiny("llama", layers=2)
    survey = SVD(budget=0.5).survey(plain)
    assert not survey.fixed and survey.method == SVD(budget=0.5)
    assert survey.nbytes <= 0.5 * survey.full_nbytes


# --- Matrices of zeros


def test_errors_of_a_matrix_of_zeros_are_missing() -> None:
    plain = tiny("llama", layers=2)
    name = "model.layers.1.mlp.up_proj"
    plain.get_submodule(name).weight.data.zero_()  # type: ignore[union-attr,operator]
    for method in (DenseShift(), PBLLM(), RTN(), SVD()):
        variants = Variants(plain, None, _TEXTS)
        rows = census_of(plain, variants.get((method,)), variants.study()).set_index("name")
        assert rows.loc[[name], ["weight_error", "output_error"]].isna().all().all()
        assert (rows[["weight_error", "output_error"]].fillna(0) < 10).all().all()
    found = next(spectrum for spectrum in spectra_of(plain) if spectrum.name == name)
    assert found.effective_rank != found.effective_rank and found.rank_for(0.9) == 0
    frame = spectra_of(plain).to_frame()
    assert frame["effective_rank"].isna().sum() == frame["stable_rank"].isna().sum() == 1


@pytest.mark.parametrize("key", ["comp", "evopress-depth", "foldgpt"])
def test_blocks_with_inputs_of_their_own_are_refused_before_anything_is_learned(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightStudy, "once", lambda *_: pytest.fail("learned something first"))
    monkeypatch.setattr(WeightStudy, "similarity", lambda *_: pytest.fail("measured something first"))
    progress = Progress(lambda *_: pytest.fail("began"))
    with pytest.raises(NotApplicable, match="an input of its own, so none can be left out"):
        compressed(model("gemma3n"), [wb.method(key, budget=0.7)], progress)
    if key != "comp":  # which finds no gated MLP there either
        assert wb.method(key, budget=1).survey(model("gemma3n")).linears
