"""TransAct: narrower inside, whole outside, chosen by activations, in the bytes it claims."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import workbench as wb
from tests.weights.support import IDS, logits
from workbench.errors import BadBudget, BudgetTooSmall, Cancelled, InputError, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.measure.quality import output_error
from workbench.models import tiny
from workbench.progress import Progress
from workbench.weights import HQQ, TransAct, compressed
from workbench.weights.calibration.sampled_texts import sampled_texts
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.compress import SHORT
from workbench.weights.layers.narrow_attention import NarrowAttention
from workbench.weights.surgery.narrow import narrowed

NARROWED = ("llama", "mqa", "mha", "qwen2", "qwen3", "mistral", "mixtral", "qwen3-moe")


def live_bytes(twin: nn.Module, names: list[str]) -> int:
    return tensor_bytes(twin.get_submodule(name).weight for name in names)  # type: ignore[misc]


def masked(model: PreTrainedModel, method: TransAct, channels: int, neurons: int) -> Any:
    """The model with what method prunes in one round set to zero instead, found with plain loops."""
    twin: Any = copy.deepcopy(model)
    ids = WeightStudy(model, calibration=SHORT).ids[: method.texts, : method.tokens]
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].double()}))
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj"))
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    for name, inside in seen.items():
        weight = twin.get_submodule(name).weight
        if name.endswith("down_proj"):
            order = [float(inside[..., j].square().mean()) for j in range(inside.shape[-1])]
            ranked = sorted(range(len(order)), key=lambda j: order[j], reverse=True)
            weight[:, ranked[neurons:]] = 0
            continue
        width = config.head_dim
        for kv_head in range(config.num_key_value_heads):
            heads = range(kv_head * groups, (kv_head + 1) * groups)
            order = [sum(float(inside[..., h * width + j].square().mean()) for h in heads) for j in range(width)]
            ranked = sorted(range(width), key=lambda j: order[j], reverse=True)
            for head in heads:
                weight[:, [head * width + j for j in ranked[channels:]]] = 0
    return twin


# -- what is pruned


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha"])
def test_the_narrow_model_computes_what_the_model_without_the_quietest_dimensions_does(architecture: str) -> None:
    model, method = tiny(architecture), TransAct(budget=0.5, rounds=1, texts=4)
    twin = compressed(model, [method])
    want = logits(masked(model, method, channels=8, neurons=64))
    assert torch.allclose(logits(twin), want, atol=1e-4 * float(want.abs().max()))
    attention: Any = twin.get_submodule("model.layers.1.self_attn")
    assert attention.v_proj.out_features == 8 * model.config.num_key_value_heads
    assert attention.o_proj.in_features == 8 * model.config.num_attention_heads
    assert attention.value_channels.shape == (model.config.num_key_value_heads, 8)


def test_the_quiet_dimensions_go_and_are_hardly_missed() -> None:
    model: Any = tiny("llama")
    draw = torch.Generator().manual_seed(5)
    quiet = torch.rand(3, 2, 16, generator=draw).argsort(dim=-1)[..., :6]  # of 16 channels of each head
    for index, layer in enumerate(model.model.layers):
        for head in range(2):
            layer.self_attn.v_proj.weight[head * 16 + quiet[index, head]] *= 1e-3
        layer.mlp.up_proj.weight[index::4] *= 1e-3  # a quarter of the neurons
    twin: Any = compressed(model, [TransAct(budget=0.75, texts=4)])
    for index, layer in enumerate(twin.model.layers):
        for head in range(2):
            gone = set(range(16)) - set(layer.self_attn.value_channels[head].tolist())
            assert len(gone) == 4 and gone <= set(quiet[index, head].tolist())
        assert layer.mlp.up_proj.out_features == 96 and bool((layer.mlp.up_proj.weight.norm(dim=1) > 0.1).all())
    assert (logits(twin) - logits(model)).norm() < 0.02 * logits(model).norm()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", NARROWED)
def test_narrow_attention_with_all_channels_is_the_attention_it_replaces(
    architecture: str, implementation: str
) -> None:
    model = tiny(architecture)
    twin: Any = copy.deepcopy(model)
    for index, layer in enumerate(twin.model.layers):
        attention = layer.self_attn
        channels = torch.arange(16).expand(model.config.num_key_value_heads, -1)
        twin.set_submodule(
            f"model.layers.{index}.self_attn",
            NarrowAttention(attention, attention.v_proj, attention.o_proj, channels),
        )
    for each in (model, twin):
        each.set_attn_implementation(implementation)
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("architecture", NARROWED)
def test_reading_at_once_and_token_by_token_agree(architecture: str) -> None:
    model = tiny(architecture)
    survey = TransAct().survey(model)  # 0.6 of what can be narrowed; fused experts cannot, and count whole
    whole = survey.full_nbytes + survey.fixed_nbytes
    budget = (0.6 * survey.full_nbytes + survey.fixed_nbytes) / whole + 1e-6
    twin = compressed(model, [TransAct(budget=budget, texts=2)])
    cache = DynamicCache(config=twin.config)
    with torch.no_grad():
        steps = [twin(token[None, None], past_key_values=cache, use_cache=True) for token in IDS[:24]]
    rows = [step.logits[0, -1] for step in steps]
    assert torch.allclose(torch.stack(rows), logits(twin, IDS[:24]), atol=2e-3)
    assert cache.layers[0].values.shape[-1] == 9 and cache.layers[0].keys.shape[-1] == 16


def test_rounds_measure_again_and_end_at_the_same_widths(tiny_llama: PreTrainedModel) -> None:
    twins = [compressed(tiny_llama, [TransAct(budget=0.4, rounds=rounds, texts=4)]) for rounds in (1, 3)]
    shapes = [{name: tuple(weight.shape) for name, weight in twin.named_parameters()} for twin in twins]
    assert shapes[0] == shapes[1]
    assert not torch.equal(logits(twins[0]), logits(twins[1]))


def test_narrowed_layers_keep_rows_or_columns_and_their_bias() -> None:
    linear, kept = nn.Linear(5, 4), torch.tensor([0, 3])
    x = torch.randn(2, 5)
    assert torch.allclose(narrowed(linear, kept, 0)(x), linear(x)[:, kept])
    assert torch.allclose(narrowed(linear, kept, 1)(x[:, kept]), x[:, kept] @ linear.weight[:, kept].T + linear.bias)
    assert narrowed(linear, kept, 1).bias is linear.bias


# -- bytes


def test_the_budget_is_met_with_live_bytes_and_used(tiny_llama: PreTrainedModel) -> None:
    sizes = []
    for budget in (0.1, 0.25, 0.5, 0.77, 0.9, 1.0):
        method = TransAct(budget=budget, texts=2, rounds=1)
        survey, twin = method.survey(tiny_llama), compressed(tiny_llama, [method])
        held = live_bytes(twin, list(survey.linears))
        full = tensor_bytes(linear.weight for linear in survey.linears.values())
        assert held == survey.nbytes <= budget * full == budget * survey.full_nbytes
        assert held > (budget - 0.02) * full
        sizes.append(held)
    assert sizes == sorted(set(sizes))
    assert torch.equal(logits(twin), logits(tiny_llama))


def test_the_smallest_budget_is_named_and_works(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(tiny_llama, [TransAct(budget=0.001)])
    method = TransAct(budget=refusal.value.smallest, texts=2)
    survey = method.survey(tiny_llama)
    assert (
        live_bytes(compressed(tiny_llama, [method]), list(survey.linears))
        <= refusal.value.smallest * survey.full_nbytes
    )
    with pytest.raises(BadBudget, match="tokens"):
        compressed(tiny_llama, [TransAct(budget="64 tokens")])


def test_two_budgets_on_one_model_do_not_meet(tiny_llama: PreTrainedModel) -> None:
    small, large = TransAct(budget=0.3), TransAct(budget=0.8)
    surveys = small.survey(tiny_llama), large.survey(tiny_llama)
    assert surveys[0].nbytes < 0.31 * surveys[0].full_nbytes
    assert 0.75 * surveys[1].full_nbytes < surveys[1].nbytes
    narrow = compressed(tiny_llama, [TransAct(budget=0.5, texts=2)])
    assert TransAct(budget=1.0).survey(narrow).nbytes < 0.51 * surveys[0].full_nbytes


def test_the_cache_of_a_run_is_narrower(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    plain, narrow = session.run("full", max_new_tokens=4), session.run(TransAct(budget=0.5), max_new_tokens=4)
    # Keys of 16 channels and values of 16, against values of 8.
    assert narrow.plan.nbytes == plain.plan.nbytes * 3 // 4 and narrow.plan.full_nbytes == plain.plan.full_nbytes
    assert narrow.decoder is not None and sum(store.nbytes for store in narrow.decoder.stores) > 0
    held = [run.memory.samples[-1].categories["weights"] for run in (plain, narrow)]
    assert held[1] < held[0] and narrow.quality.kl > 0
    assert any("transact: 15 linear layers" in note and "50.0% of their size" in note for note in narrow.notes)


def test_heads_of_other_widths_have_no_error_that_is_a_number() -> None:
    assert bool(output_error(torch.ones(3, 5, 8), torch.ones(3, 5, 6)).isnan().all())
    with pytest.raises(InputError):
        output_error(torch.ones(3, 5, 8), torch.ones(2, 5, 8))


# -- what is not pruned


def test_queries_keys_and_unknown_modules_are_left_alone_with_the_reason(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    left = TransAct().left_alone(tiny_model("llama"))
    assert left["model.layers.0.self_attn.q_proj"] == "queries and keys stay whole"
    gemma = TransAct(texts=2)
    assert "model.layers.0.self_attn.v_proj" in gemma.left_alone(tiny_model("gemma3"))
    assert set(gemma.survey(tiny_model("gemma3")).linears) == {
        f"model.layers.{layer}.mlp.{name}_proj" for layer in range(3) for name in ("gate", "up", "down")
    }
    assert "fused experts" in TransAct().note(tiny_model("mixtral"))
    with pytest.raises(NotApplicable, match="no linear layer left"):
        compressed(tiny_model("phi3"), [TransAct()])


def test_what_is_not_pruned_is_shared(tiny_llama: PreTrainedModel) -> None:
    twin = compressed(tiny_llama, [TransAct(texts=2)])
    own = {name for name, weight in twin.named_parameters()} - {
        name for name, weight in twin.named_parameters() if any(weight is other for other in tiny_llama.parameters())
    }
    assert own == {f"{name}.weight" for name in TransAct().survey(tiny_llama).linears}


# -- calibration


def test_texts_are_the_models_own_and_the_same_every_time(tiny_llama: PreTrainedModel) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (sampled_texts(tiny_llama, 3, 12, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (3, 12) and torch.equal(first, again) and not torch.equal(first, other)
    # Drawn from the model's own chances: what it says is likelier than what it does not.
    drawn = sampled_texts(tiny_llama, 40, 20, 0)
    with torch.no_grad():
        chances = tiny_llama(drawn).logits[:, :-1].log_softmax(-1)
    said = chances.gather(-1, drawn[:, 1:, None]).mean()
    assert said > chances.mean() + 1


def test_a_cancelled_pruning_leaves_the_model_as_it_was(tiny_llama: PreTrainedModel) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("compressing") and done == 3:
            progress.cancel()

    progress, before = Progress(stop), logits(tiny_llama)
    with pytest.raises(Cancelled):
        compressed(tiny_llama, [TransAct(texts=2)], progress)
    assert torch.equal(logits(tiny_llama), before)
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


# -- together


def test_it_goes_together_with_quantisation_after_it_and_with_eviction(tiny_llama: PreTrainedModel) -> None:
    twin = compressed(tiny_llama, [TransAct(budget=0.5, texts=2), HQQ(bits=8, group_size=32)])
    assert bool(logits(twin).isfinite().all())
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    run = session.run([TransAct(budget=0.6, texts=2), wb.kv.SnapKV(budget=0.5, window=8)], max_new_tokens=4)
    assert len(run.tokens) == 4 and run.plan.share <= 0.5


@pytest.mark.model
def test_the_default_model_loses_little_where_little_goes(default_session: wb.Session) -> None:
    text = "The sky was grey. " * 6 + "The code of the safe is 4711. " + "Rain fell on the roof. " * 6
    default_session.read(text)
    run = default_session.run(
        TransAct(budget=0.95, texts=4, rounds=1), question="What is the code of the safe?", max_new_tokens=14
    )
    assert run.quality.kl < 0.5
    assert run.memory.samples[-1].categories["weights"] < default_session.facts.weight_bytes
