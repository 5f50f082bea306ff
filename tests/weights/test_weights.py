"""Weights: really small, never at the cost of the model that they come from."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import workbench as wb
from tests.weights.support import IDS, logits
from workbench.errors import BadBudget, BadParameter, BadRecipe, BudgetTooSmall, Cancelled, MissingExtra, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.progress import Progress
from workbench.weights.compress import compressed
from workbench.weights.layers import PackedLinear, packed_nbytes
from workbench.weights.methods.quantise.hqq import HQQ
from workbench.weights.surgery.sharing_copy import sharing_copy
from workbench.weights.survey import Survey
from workbench.weights.variants import Variants

Q_PROJ = "model.layers.0.self_attn.q_proj"


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: PreTrainedModel, before: dict[str, Tensor], said: Tensor) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(model), said)


def cancelled_after(steps: int) -> Progress:
    def count(stage: str, done: int, total: int) -> None:
        if stage.startswith("compressing") and done == steps:
            progress.cancel()

    progress = Progress(count)
    return progress


# --- The original


def test_the_original_is_bitwise_unchanged_after_a_run() -> None:  # trap W3
    model = tiny("llama")
    before, said = snapshot(model), logits(model)
    session = wb.Session((model, None))
    session.read(IDS)
    session.run(HQQ(bits=4), max_new_tokens=4)
    assert_unchanged(model, before, said)


def test_a_cancelled_compression_leaves_nothing_behind() -> None:
    model = tiny("llama")
    before, said = snapshot(model), logits(model)
    session = wb.Session((model, None))
    session.read(IDS)
    with pytest.raises(Cancelled):
        session.run(HQQ(bits=4), max_new_tokens=4, progress=cancelled_after(5))
    assert_unchanged(model, before, said)
    assert not session.runs
    assert len(session.run(HQQ(bits=4), max_new_tokens=4).tokens) == 4


def test_a_copy_shares_every_tensor_that_it_does_not_change() -> None:
    model = tiny("qwen2")  # with biases
    twin = compressed(model, [HQQ()])
    theirs = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        packed = name.rsplit(".", 1)[1] in ("plane0", "scale", "zero")
        assert (tensor.data_ptr() in theirs) is not packed, name
    assert twin.config is not model.config
    assert isinstance(twin.get_submodule(Q_PROJ), PackedLinear) and twin.get_submodule(Q_PROJ).bias is not None
    assert type(model.get_submodule(Q_PROJ)) is nn.Linear


def test_a_plain_copy_computes_the_same(tiny_llama: PreTrainedModel) -> None:
    assert torch.equal(logits(sharing_copy(tiny_llama)), logits(tiny_llama))


def test_two_sessions_on_one_model_do_not_meet() -> None:
    model = tiny("llama")
    plain, small = wb.Session((model, None)), wb.Session((model, None))
    plain.read(IDS), small.read(IDS)
    alone = plain.run("full", max_new_tokens=8).tokens, small.run(HQQ(bits=4), max_new_tokens=8).tokens
    streams = plain.stream("full", max_new_tokens=8), small.stream(HQQ(bits=4), max_new_tokens=8)
    together = list(zip(*streams, strict=True))
    assert tuple(zip(*[(a.id, b.id) for a, b in together], strict=True)) == alone


# --- Bytes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_live_bytes_are_what_the_method_claims(tiny_llama: PreTrainedModel, bits: int) -> None:
    method = HQQ(bits=bits, group_size=32)
    survey = Survey.of(tiny_llama, method)
    variants = Variants(tiny_llama)
    saved = sum(linear.weight.nbytes for linear in survey.linears.values()) - survey.nbytes
    assert variants.nbytes([method]) == variants.nbytes([]) - saved
    assert survey.nbytes == survey.full_nbytes * (bits + 1) // 16  # scale and zero: 32 bits for 32 weights


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_layers_hold_what_hqq_holds_in_as_many_bits_as_they_say(tiny_llama: PreTrainedModel, bits: int) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = tiny_llama.get_submodule("model.layers.1.mlp.down_proj")
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    theirs = HQQLinear(linear, config, del_orig=False, compute_dtype=torch.float16, device="cpu")
    ours = HQQ(bits=bits, group_size=64).compress(linear)
    held = tensor_bytes([theirs.W_q, theirs.meta["scale"], theirs.meta["zero"]])
    assert tensor_bytes(ours.buffers()) == HQQ(bits=bits, group_size=64).nbytes(linear)
    assert (tensor_bytes(ours.buffers()) == held) == (bits not in (3, 5, 6))  # which hqq holds in wider fields
    theirs.meta["compute_dtype"] = torch.float32  # theirs multiplies in the type of the scales otherwise
    torch.testing.assert_close(ours.dequantised(), theirs.dequantize().float(), rtol=1e-5, atol=1e-6)


def test_using_a_packed_model_does_not_unpack_it(tiny_llama: PreTrainedModel) -> None:
    twin = compressed(tiny_llama, [HQQ()])
    before = tensor_bytes([*twin.parameters(), *twin.buffers()])
    logits(twin)
    held = [value for module in twin.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert tensor_bytes([*twin.parameters(), *twin.buffers(), *held]) == before


def test_the_timeline_shows_the_smaller_weights(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    weights = [
        session.run(recipe, max_new_tokens=2).memory.samples[-1].categories["weights"]
        for recipe in ("full", HQQ(bits=8), HQQ(bits=4))
    ]
    assert weights[0] > weights[1] > weights[2]


# --- Packing


@pytest.mark.parametrize(("out_features", "in_features", "group"), [(5, 24, 8), (1, 8, 8), (7, 96, 32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layers_stand_for_code_minus_zero_times_scale(
    bits: int, out_features: int, in_features: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out_features, in_features // group, generator=generator).half()
    zero = (torch.rand(out_features, in_features // group, generator=generator) * 2**bits).half()
    bias = nn.Parameter(torch.rand(out_features, generator=generator))
    layer = PackedLinear(codes, scale, zero, bits, bias)
    want = torch.empty(out_features, in_features)
    for o in range(out_features):
        for i in range(in_features):
            want[o, i] = (float(codes[o, i]) - float(zero[o, i // group])) * float(scale[o, i // group])
    assert torch.equal(layer.dequantised(), want)
    x = torch.rand(3, in_features, generator=generator)
    torch.testing.assert_close(layer(x), x @ want.T + bias)
    assert tensor_bytes(layer.buffers()) == packed_nbytes(out_features, in_features, bits, group)


# --- Quality


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma3", "mixtral"])
def test_eight_bits_stay_close_and_four_bits_are_worse_but_sane(
    tiny_model: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    model = tiny_model(architecture)
    want = logits(model)
    errors = {
        bits: float((logits(compressed(model, [HQQ(bits=bits, group_size=32)])) - want).norm() / want.norm())
        for bits in (8, 4)
    }
    assert errors[8] < 0.06
    assert 2 * errors[8] < errors[4] < 0.9


def test_fitted_zero_points_beat_plain_rounding(tiny_llama: PreTrainedModel) -> None:
    linear = tiny_llama.get_submodule(Q_PROJ)
    weight = linear.weight
    groups = weight.unflatten(1, (-1, 64))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    rounded = (((groups - low) / scale).round() * scale + low).flatten(1)
    fitted = HQQ(bits=4, group_size=64).compress(linear).dequantised()
    assert (fitted - weight).abs().mean() <= (rounded - weight).abs().mean() * 1.001


@pytest.mark.model
def test_the_default_model_still_finds_the_needle(default_session: wb.Session) -> None:
    default_session.read("The sky was grey. " * 10 + "The code of the safe is 4711. " + "Rain fell on the roof. " * 10)
    run = default_session.run(HQQ(bits=8), question="What is the code of the safe?", max_new_tokens=14)
    assert "4711" in run.text
    assert run.quality.kl < 0.01
    assert run.memory.samples[-1].categories["weights"] < default_session.facts.weight_bytes / 2


# --- What is left alone


def test_tied_embeddings_stay_tied_and_exact() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    method = HQQ(group_size=32)
    twin = compressed(model, [method])
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert method.left_alone(model) == {
        "model.embed_tokens": "an embedding is looked up, not multiplied",
        "lm_head": "tied to model.embed_tokens",
    }


def test_every_weight_matrix_is_either_compressed_or_listed(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    for architecture in ("llama", "gemma3", "mixtral", "qwen3-moe"):
        model = tiny_model(architecture)
        survey = Survey.of(model, HQQ())
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
        listed = {name.removesuffix(".weight") for name in (*survey.linears, *survey.left)}
        assert listed == {name.removesuffix(".weight") for name in matrices}


def test_fused_experts_are_named_not_silently_skipped(tiny_model: Callable[[str], PreTrainedModel]) -> None:  # trap W6
    left = HQQ().left_alone(tiny_model("mixtral"))
    assert "fused experts" in left["model.layers.2.mlp.experts.down_proj"]
    assert "fused experts" in HQQ().note(tiny_model("mixtral"))


def test_layers_that_no_group_divides_are_left_alone_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(16, 8))
    survey = Survey.of(model, HQQ(group_size=8))
    assert list(survey.linears) == ["1"]
    assert "12 input columns" in survey.left["0"]


# --- Errors


def test_a_group_that_does_not_divide_names_the_layers_and_one_that_does(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(NotApplicable, match=rf"group_size=48 .*{Q_PROJ} \(64\).* and 18 more; .* is 32"):
        compressed(tiny_llama, [HQQ(group_size=48)])


def test_a_budget_is_met_or_the_smallest_is_named(tiny_llama: PreTrainedModel) -> None:  # trap W9
    def never(stage: str, done: int, total: int) -> None:
        raise AssertionError("work was started")

    for bits in (4, 8):
        with pytest.raises(BudgetTooSmall) as caught:
            compressed(tiny_llama, [HQQ(bits=bits, budget=0.2)], Progress(never))
        method = HQQ(bits=bits, budget=caught.value.smallest)
        survey = Survey.of(compressed(tiny_llama, []), method)
        twin = compressed(tiny_llama, [method])
        packed = tensor_bytes(
            tensor for layer in twin.modules() if isinstance(layer, PackedLinear) for tensor in layer.buffers()
        )
        assert packed <= caught.value.smallest * survey.full_nbytes
        with pytest.raises(BudgetTooSmall):
            compressed(tiny_llama, [HQQ(bits=bits, budget=caught.value.smallest - 2e-4)])


def test_a_budget_in_tokens_makes_no_sense_for_weights(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BadBudget, match="tokens"):
        compressed(tiny_llama, [HQQ(budget="64 tokens")])


def test_compressing_twice_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BadRecipe, match="behind hqq: they both choose how weights are held"):
        compressed(tiny_llama, [HQQ(bits=8), HQQ(bits=4)])
    with pytest.raises(NotApplicable, match="no linear layer left"):
        compressed(compressed(tiny_llama, [HQQ(bits=8)]), [HQQ(bits=4)])


@pytest.mark.parametrize("values", [{"bits": 7}, {"group_size": 12}, {"group_size": 0}])
def test_parameters_out_of_bounds_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(BadParameter, match="hqq"):
        HQQ(**values)


def test_without_the_library_the_extra_is_named(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq.core", None)
    with pytest.raises(MissingExtra, match=r"inference-workbench\[weights\]"):
        compressed(tiny_llama, [HQQ()])


def test_the_catalogue_needs_no_library() -> None:
    # transformers imports hqq by itself where it is installed, so it is taken away after that.
    code = (
        "import sys, transformers.quantizers; sys.modules['hqq.core'] = None; "
        "import workbench as wb; assert 'hqq' in set(wb.methods('weights').key)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- Together


def test_weights_go_together_with_eviction(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    run = session.run([wb.kv.SnapKV(budget=0.5, window=8), HQQ(bits=8, group_size=32)], max_new_tokens=4)
    assert len(run.tokens) == 4
    assert run.plan.share <= 0.5
    assert any(note.startswith("hqq: 21 linear layers") and "lm_head" in note for note in run.notes)
    assert run.quality.kl > 0


def test_threads_that_ask_for_the_same_copy_get_one(tiny_llama: PreTrainedModel) -> None:
    variants = Variants(tiny_llama)
    found: list[PreTrainedModel] = []
    threads = [threading.Thread(target=lambda: found.append(variants.get([HQQ()]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(model) for model in found}) == 1


def test_whoever_waits_for_another_compression_can_be_cancelled(tiny_llama: PreTrainedModel) -> None:
    variants = Variants(tiny_llama)
    inside, go_on = threading.Event(), threading.Event()

    def hold(stage: str, done: int, total: int) -> None:
        inside.set()
        go_on.wait(30)

    first = threading.Thread(target=lambda: variants.get([HQQ()], Progress(hold)))
    first.start()
    assert inside.wait(30)
    second = Progress()
    second.cancel()
    try:
        with pytest.raises(Cancelled):
            variants.get([HQQ(bits=8)], second)
    finally:
        go_on.set()
        first.join()
