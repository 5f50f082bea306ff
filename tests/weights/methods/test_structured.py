"""Structured pruning: whole neurons, channels and blocks go, and what stays computes what its paper says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.weights.support import IDS, RANDOM_IDS, drawn, logits, studied, with_study
from workbench.errors import BadParameter, BudgetTooSmall, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.models.depth import origins
from workbench.progress import Progress
from workbench.weights import recorded_times
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.block_gates import block_gates
from workbench.weights.compress import compressed
from workbench.weights.layers.core_mlp import CoreMLP, votes
from workbench.weights.methods.structured.cfsp import CFSP, kept_shares, neuron_scores
from workbench.weights.methods.structured.comp import COMP
from workbench.weights.methods.structured.coreinfer import CoreInfer
from workbench.weights.methods.structured.foldgpt import FoldGPT, folding
from workbench.weights.methods.structured.udfc import UDFC, gains
from workbench.weights.methods.structured.ziplm import ZipLM
from workbench.weights.solvers.least_squares import refitted
from workbench.weights.solvers.matrix_condition import leverage, remaining, tuned
from workbench.weights.solvers.random_inputs import channels, data_free_scores, overlap, rebuilt
from workbench.weights.solvers.structure_removal import removal
from workbench.weights.solvers.widths import shared_out

METHODS: tuple[type[WeightMethod], ...] = (CFSP, COMP, CoreInfer, FoldGPT, UDFC, ZipLM)


# -- sharing out


def test_widths_fill_the_limit_and_never_exceed_it() -> None:
    for limit in (30, 31, 100, 777, 1499, 1500):
        counts = shared_out([0.5, 1.0, 0.1], [100, 50, 100], lambda index, width: (5, 10, 5)[index] * width, limit)
        total = 5 * counts[0] + 10 * counts[1] + 5 * counts[2]
        assert limit - 10 < total <= limit
        assert all(1 <= count <= width for count, width in zip(counts, (100, 50, 100), strict=True))


@pytest.mark.parametrize("method", [CFSP, COMP, ZipLM])
def test_what_stays_is_smaller_and_fills_the_budget(method: type[WeightMethod]) -> None:
    model = tiny("qwen2")  # with biases
    asked = method(budget=0.7, **(QUICK if method is ZipLM else {}))
    survey, twin = asked.survey(model), compressed(model, [asked])
    held = tensor_bytes(
        parameter
        for name, parameter in twin.named_parameters()
        if name.endswith("proj.weight") and (method is COMP or "mlp" in name or ".v_" in name or ".o_" in name)
    )
    if method is CFSP:
        held -= sum(x.self_attn.v_proj.weight.nbytes + x.self_attn.o_proj.weight.nbytes for x in twin.model.layers)
    assert 0.6 * survey.full_nbytes < held <= 0.7 * survey.full_nbytes


# -- CFSP


def test_blocks_that_turn_their_input_further_keep_more() -> None:
    for kept in (0.2, 0.5, 0.9):
        shares = kept_shares(torch.tensor([0.99, 0.5, 0.9]), 25.0, kept)
        assert shares[1] > shares[2] > shares[0] >= 0
        assert sum(shares) / 3 == pytest.approx(kept) and max(shares) <= 1 + 1e-6
    assert kept_shares(torch.tensor([0.99, 0.5]), 0.0, 0.4) == pytest.approx([0.4, 0.4])


def test_neurons_are_ranked_by_activation_times_relative_weight() -> None:
    gate, up, down, squares = drawn(6, 4), drawn(6, 4, seed=1), drawn(4, 6, seed=2), drawn(6, seed=3).square()
    want = []
    for j in range(6):
        relative = 0.0
        for matrix in (gate, up, down.T):
            sizes = [sum(abs(float(x)) for x in matrix[i]) for i in range(6)]
            relative += sizes[j] / (sum(sizes) / 6)
        want.append(relative * math.sqrt(float(squares[j])))
    assert torch.allclose(neuron_scores(gate, up, down, squares), torch.tensor(want), rtol=1e-4)


def test_neurons_that_never_act_go_first_and_are_not_missed() -> None:
    model: Any = tiny("llama")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.weight[index % 2 :: 2] *= 1e-6
    twin = compressed(model, [CFSP(budget=0.5, sharpness=0)])
    assert (logits(twin) - logits(model)).norm() < 1e-3 * logits(model).norm()


# -- ZipLM


def test_structures_go_in_the_order_and_at_the_cost_of_plain_loops() -> None:
    weight, x = drawn(5, 8).double(), drawn(60, 8, seed=1) @ drawn(8, 8, seed=2)
    moment = (x.T @ x / 60).double()
    hessian = moment + 0.01 * moment.diagonal().mean() * torch.eye(8)
    columns = torch.arange(8).view(1, 4, 2)  # four structures of two columns each
    found = removal(weight, moment, columns, 0.01, keep=(3, 1))
    left, present, order, error = weight.clone(), list(range(4)), [], [0.0]
    scale = float((weight @ hessian * weight).sum())
    while present:
        kept = [c for s in present for c in (2 * s, 2 * s + 1)]
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        costs = {}
        for place, s in enumerate(present):
            own = inverse[2 * place : 2 * place + 2, 2 * place : 2 * place + 2]
            part = left[:, 2 * s : 2 * s + 2]
            costs[s] = float((part @ torch.linalg.inv(own) * part).sum()) / scale
        gone = min(costs, key=lambda s: costs[s])
        error.append(error[-1] + costs[gone])
        order.append(gone)
        present.remove(gone)
        kept = [c for s in present for c in (2 * s, 2 * s + 1)]
        left = torch.zeros_like(weight)
        if kept:  # what is left makes up for all that is gone
            left[:, kept] = weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        if len(present) in (3, 1):
            torch.testing.assert_close(found.weights[len(present)].double(), left[:, kept], rtol=1e-2, atol=1e-2)
    assert found.order[0].tolist() == order
    assert torch.allclose(found.errors, torch.tensor(error).double(), rtol=1e-6, atol=1e-9)
    assert float(found.errors[-1]) == pytest.approx(1.0)  # nothing is left


def test_no_weights_on_what_stays_err_less_than_refitted_ones() -> None:
    weight, x = drawn(4, 10), drawn(80, 10, seed=1)
    moment, kept = x.T @ x / 80, torch.tensor([0, 3, 4, 8])
    best = refitted(weight, moment, kept, 1e-9).float()

    def error(part: Tensor) -> float:
        return float((x @ weight.T - x[:, kept] @ part.T).square().sum())

    assert error(best) < error(weight[:, kept])
    for seed in range(5):
        assert error(best) < error(best + 0.01 * drawn(4, 4, seed=seed))


SHAPES = [(o, i) for o in (1, 16, 32, 64, 128) for i in (1, 16, 32, 64, 128)]
QUICK = {"starts": 2, "patience": 1, "texts": 2, "tokens": 16}


def test_a_target_speed_is_reached_by_multiply_adds_and_an_impossible_one_refused(tiny_llama: PreTrainedModel) -> None:
    twin: Any = compressed(tiny_llama, [ZipLM(budget=1.0, speedup=2.0, **QUICK)])
    pruned = ("gate_proj", "up_proj", "down_proj", "v_proj", "o_proj")
    sizes = [
        sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in pruned)
        for model in (tiny_llama, twin)
    ]
    assert sizes[1] <= sizes[0] / 2 < sizes[1] * 1.1
    alike = json.dumps({f"{o}x{i}": 1e-5 for o, i in SHAPES})
    with pytest.raises(NotApplicable, match="at most 1 times as fast"):
        compressed(tiny_llama, [ZipLM(speedup=2.0, table=alike, **QUICK)])


def test_layers_that_take_no_time_are_not_pruned(tiny_llama: PreTrainedModel) -> None:
    def seconds(outputs: int, inputs: int) -> float:
        return outputs * inputs * (1e-9 if max(outputs, inputs) == 64 else 1e-3)  # attention takes next to none

    table = json.dumps({f"{o}x{i}": seconds(o, i) for o, i in SHAPES})
    twin: Any = compressed(tiny_llama, [ZipLM(budget=0.9, table=table, **QUICK)])
    assert all(layer.self_attn.v_proj.out_features == 32 for layer in twin.model.layers)
    assert any(layer.mlp.up_proj.out_features < 128 for layer in twin.model.layers)


def test_a_search_loses_no_more_than_the_dynamic_programme_alone_and_is_the_same_again() -> None:
    model = tiny("llama")
    study = studied(model)
    kl = []
    for settings in ({"starts": 0, "patience": 0}, {"starts": 8, "patience": 4}):
        twins = [with_study(model, ZipLM(budget=0.6, texts=4, tokens=64, **settings), studied(model)) for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*(twin.parameters() for twin in twins), strict=True))
        p, q = (logits(each, study.ids).log_softmax(-1) for each in (model, twins[0]))
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert kl[1] < kl[0]


_IN_A_PROCESS = """
import hashlib, torch
from workbench.models import tiny
from workbench.weights import ZipLM, compressed
twin = compressed(tiny("llama"), [ZipLM(budget=0.6, starts=6, patience=2, texts=2, tokens=16)])
print(hashlib.sha256(b"".join(p.numpy().tobytes() for p in twin.parameters())).hexdigest())
"""


def test_three_processes_make_the_same_model() -> None:
    """Nothing is measured on the clock, and nothing depends on what a process did before."""
    command = [sys.executable, "-c", _IN_A_PROCESS]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert len(said[0].strip()) == 64 and said[0] == said[1] == said[2]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("fast", "is JSON"),
        ("[1]", "a JSON object is expected"),
        ('{"64": 1}', "outputs and inputs"),
        ('{"64x-1": 1}', "outputs and inputs"),
        ('{"64x64": 0}', "takes some seconds"),
        ('{"64x64": true}', "takes some seconds"),
        ('{"64x64": "1"}', "takes some seconds"),
        ('{"64x64": NaN}', "takes some seconds"),
    ],
)
def test_what_is_no_table_of_times_is_refused(table: str, problem: str) -> None:
    with pytest.raises(BadParameter, match=problem):
        ZipLM(table=table)


def test_a_table_that_knows_other_shapes_is_refused_and_one_recorded_for_the_model_serves(
    tiny_llama: PreTrainedModel,
) -> None:
    with pytest.raises(NotApplicable, match="no shapes between which"):
        compressed(tiny_llama, [ZipLM(table='{"3x3": 1.0}', **QUICK)])
    table = recorded_times(tiny_llama)
    assert {f"{width}x64" for width in (128, 1)} | {"64x128"} <= set(json.loads(table))
    method = ZipLM(budget=0.7, table=table, **QUICK)
    survey, twin = method.survey(tiny_llama), compressed(tiny_llama, [method])
    held = tensor_bytes(twin.get_parameter(f"{name}.weight") for name in survey.linears)
    assert held <= 0.7 * survey.full_nbytes


def test_narrower_values_make_the_cache_narrower_and_any_cache_method_works(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    run = session.run([ZipLM(budget=0.5, **QUICK), wb.kv.SnapKV(budget=0.5, window=8)], max_new_tokens=3)
    assert len(run.tokens) == 3 and run.plan.share < 0.5


# -- COMP


def test_leverage_is_what_the_determinant_loses() -> None:
    down, squares = drawn(4, 9), drawn(9, seed=1).square()
    scaled = down.double() * squares.double().sqrt()
    regular = scaled @ scaled.T
    regular = regular + regular.diagonal().mean() * torch.eye(4)
    for j, value in enumerate(leverage(down, squares).tolist()):
        without = regular - torch.outer(scaled[:, j], scaled[:, j])
        assert 1 - value == pytest.approx(float(torch.det(without) / torch.det(regular)))


def test_no_other_mask_errs_less_than_the_tuned_one() -> None:
    down, x, kept = drawn(5, 8), drawn(90, 8, seed=1) @ drawn(8, 8, seed=2), torch.tensor([1, 2, 5, 7])
    mask = tuned(down, x.T @ x / 90, kept, 1e-9).float()

    def error(mask: Tensor) -> float:
        return float((x @ down.T - (x[:, kept] * mask) @ down[:, kept].T).square().sum())

    assert error(mask) < error(torch.ones(4))
    for seed in range(5):
        assert error(mask) < error(mask + 0.01 * drawn(4, seed=seed))


def test_blocks_go_in_order_up_to_the_coarse_share_and_further_where_they_must() -> None:
    assert remaining([2, 0, 1], [10, 10, 10], [8, 8, 8], 30, 1.0) == [0, 1, 2]
    assert remaining([2, 0, 1], [10, 10, 10], [8, 8, 8], 20, 1.0) == [0, 1]
    assert remaining([2, 0, 1], [10, 10, 10], [8, 8, 8], 20, 0.5) == [0, 1, 2]
    assert remaining([2, 0, 1], [10, 10, 10], [2, 2, 2], 12, 0.0) == [1]
    assert remaining([2, 0, 1], [10, 10, 10], [2, 2, 2], 1, 1.0) == [1]


# -- fewer blocks


def test_unimportant_blocks_fold_onto_the_nearest_earlier_one_of_their_kind_or_go() -> None:
    importance, sizes = [0.9, 0.1, 0.8, 0.2, 0.3], [1] * 5
    assert folding(importance, sizes, "aaaaa", 5, 0.5, 3) == [0, 1, 2, 3, 4]
    assert folding(importance, sizes, "aaaaa", 3, 0.5, 3) == [0, None, 2, 2, 4]
    assert folding(importance, sizes, "aaaaa", 3, 0.0, 3) == [0, None, 2, None, 4]
    assert folding(importance, sizes, "aaaaa", 2, 1.0, 3) == [0, 0, 2, 2, 2]
    assert folding(importance, sizes, "aaaaa", 2, 1.0, 2) == [0, 0, 2, 2, None]
    assert folding(importance, sizes, "abbab", 2, 1.0, 3) == [0, None, 2, 0, 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_without_a_block_is_the_model_with_that_block_left_out(architecture: str) -> None:
    model: Any = tiny(architecture)
    twin: Any = compressed(model, [FoldGPT(budget=0.67, folded=0.0)])
    (gone,) = set(range(3)) - set(origins(twin))
    block = model.model.layers[gone]
    handle = block.register_forward_hook(lambda module, args, kwargs, out: args[0], with_kwargs=True)
    try:
        want = logits(model)
    finally:
        handle.remove()
    assert torch.allclose(logits(twin), want, atol=1e-5)
    assert len(twin.model.layers) == twin.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in twin.model.layers] == [0, 1]


def test_folded_blocks_share_their_weights_and_keep_their_norms(tiny_llama: PreTrainedModel) -> None:
    twin: Any = compressed(tiny_llama, [FoldGPT(budget=0.67, folded=1.0)])
    layers = twin.model.layers
    shared = [i for i in (1, 2) if layers[i].mlp.up_proj.weight is layers[i - 1].mlp.up_proj.weight]
    if not shared:  # the first block is the least important: there is none before it
        assert len(layers) == 2
        return
    (index,) = shared
    assert layers[index].self_attn.q_proj.weight is layers[index - 1].self_attn.q_proj.weight
    assert layers[index].input_layernorm.weight is not layers[index - 1].input_layernorm.weight


@pytest.mark.parametrize("recipe", [[], [wb.kv.SnapKV(budget=0.5, window=8)], [wb.kv.KIVI(bits=4)], ["pyramidkv"]])
def test_runs_with_fewer_blocks_work_with_any_cache_method(tiny_llama: PreTrainedModel, recipe: list[Any]) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(IDS)
    run = session.run([FoldGPT(budget=0.67, folded=0.0), *recipe], max_new_tokens=3)
    full = session.run("full", max_new_tokens=3)
    assert len(run.tokens) == 3 and run.plan.full_nbytes == full.plan.full_nbytes
    assert run.plan.share <= 0.67
    errors = run.verdict.output_error
    gone = errors.isnan().all(dim=1)
    assert errors.shape == (3, 4) and int(gone.sum()) == 1 and bool(errors[~gone].isfinite().all())
    assert len(run.ask(IDS[:3], max_new_tokens=2).tokens) == 2


def test_less_than_one_block_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(tiny_llama, [FoldGPT(budget=0.2)])
    assert refusal.value.smallest == pytest.approx(1 / 3, abs=2e-4)


def gated_loss(model: Any, ids: Tensor, gates: Sequence[float]) -> float:
    """The loss of the next token where each block's change of the hidden states counts by its gate."""
    handles = [
        block.register_forward_hook(
            lambda _, args, kwargs, out, gate=gate: args[0] + gate * (out - args[0]), with_kwargs=True
        )
        for block, gate in zip(model.model.layers, gates, strict=True)
    ]
    said = logits(model, ids)
    for handle in handles:
        handle.remove()
    return float(torch.nn.functional.cross_entropy(said[:-1], ids[1:]))


def test_gates_learn_from_the_loss_and_from_what_they_cost(tiny_llama: PreTrainedModel) -> None:
    ids, eps = RANDOM_IDS[:24], 1e-2
    slopes = [
        (gated_loss(tiny_llama, ids, [1.0] * 3) - gated_loss(tiny_llama, ids, [1.0 - eps * (i == j) for j in range(3)]))
        / eps
        for i in range(3)
    ]
    for penalty in (0.0, 3 * max(map(abs, slopes)) * 3):
        found = block_gates(tiny_llama, ids[None], steps=1, rate=0.1, penalty=penalty, progress=Progress()).tolist()
        want = [0.9 if slope + penalty / 3 > 0 else 1.0 for slope in slopes]  # Adam's first step is as long as its rate
        assert found == pytest.approx(want, abs=1e-4)
    again = [block_gates(tiny_llama, ids[None], steps=5, rate=0.1, penalty=1.0, progress=Progress()) for _ in range(2)]
    assert torch.equal(*again) and not any(p.requires_grad for p in tiny_llama.parameters())


def test_a_block_that_adds_nothing_has_the_lowest_gate_and_goes() -> None:
    model: Any = tiny("llama", layers=4)
    idle = model.model.layers[2]
    idle.self_attn.o_proj.weight.zero_()
    idle.mlp.down_proj.weight.zero_()
    twin = compressed(model, [FoldGPT(budget=0.75, folded=0.0, steps=8)])
    assert list(origins(twin)) == [0, 1, 3]
    assert torch.allclose(logits(twin), logits(model), atol=1e-4)


# -- UDFC


def test_products_of_neurons_are_those_of_many_random_inputs() -> None:
    gate, up, scale = 0.4 * drawn(5, 12), drawn(5, 12, seed=1), drawn(12, seed=2).abs()
    act = torch.nn.functional.silu
    found = channels(gate, up, scale.square(), act)
    x = drawn(400_000, 12, seed=3) * scale
    line = (found.level + found.slope * (x @ gate.T)) * (x @ up.T)  # the model's own assumption: a line for act
    want = line.T @ line / len(x)
    got = overlap(found, found, scale.square())
    assert torch.allclose(got, want, atol=0.03 * float(want.diagonal().max()))
    real = act(x @ gate.T)
    for j in range(5):  # and no line is closer to the activation
        g = (x @ gate.T)[:, j]
        assert float(found.slope[j]) == pytest.approx(float((real[:, j] * g).mean() / g.square().mean()), abs=0.02)
        assert float(found.level[j]) == pytest.approx(float(real[:, j].mean()), abs=0.02)


def test_rebuilding_errs_less_than_leaving_out_and_changes_nothing_where_nothing_is_lost() -> None:
    gate, up, down, squares = 0.3 * drawn(24, 8), drawn(24, 8, seed=1), drawn(8, 24, seed=2), torch.ones(8)
    whole = channels(gate, up, squares, torch.nn.functional.silu)
    every, kept = torch.arange(24), torch.arange(0, 24, 2)
    gram = overlap(whole, whole, squares)
    assert torch.allclose(rebuilt(down, every, gram, gram, 0.01).float(), down, atol=1e-4)
    better = rebuilt(down, kept, gram[:, kept], gram[kept][:, kept], 0.001).float()
    x = drawn(4000, 8, seed=3)
    acts = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    want = acts @ down.T
    left_out, made_up = acts[:, kept] @ down[:, kept].T, acts[:, kept] @ better.T
    assert (made_up - want).norm() < 0.9 * (left_out - want).norm()


def test_without_data_the_neurons_with_the_highest_peaks_stay() -> None:
    gate, up, down = torch.full((3, 4), 0.1), torch.full((3, 4), 0.1), torch.ones(2, 3)
    gate[1, 2], up[1, 0] = 3.0, -2.0  # one large weight in each, while neuron 2 has the larger norms
    gate[2], up[2] = 1.6, 1.2
    assert data_free_scores(gate, up, down).argsort().tolist() == [0, 2, 1]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_gains_are_what_the_norm_before_the_mlp_does(architecture: str) -> None:
    model: Any = tiny(architecture)
    block = model.model.layers[1]
    norm = block.pre_feedforward_layernorm if architecture == "gemma3" else block.post_attention_layernorm
    norm.weight.copy_(torch.linspace(0.1, 2, 64))
    x = drawn(9, 64)
    want = norm(x) / (x / x.square().mean(-1, keepdim=True).sqrt())
    assert torch.allclose(gains(model, "model.layers.1.mlp", 64), want[0].abs(), rtol=1e-3)


def test_eight_bits_of_all_neurons_lose_little(tiny_llama: PreTrainedModel) -> None:
    twin = compressed(tiny_llama, [UDFC(budget=1.0)])
    assert (logits(twin) - logits(tiny_llama)).norm() < 0.05 * logits(tiny_llama).norm()


# -- CoreInfer


def test_neurons_get_the_votes_of_tokens_that_activate_them_most() -> None:
    acts = torch.tensor([[5.0, 4, -1, 0], [0, 9, 1, 2], [-3, 1, 0, 2]])  # 2, 3 and 2 positive: 7 / 3 on average
    assert votes(acts, 0.9).floor().tolist() == [1, 3, 0, 2]
    assert votes(acts, 0.5).floor().tolist() == [1, 1, 0, 1]
    assert votes(acts, 0.5)[1] > votes(acts, 0.5)[0] > votes(acts, 0.5)[3]  # the same votes, but larger


def test_a_text_decodes_with_the_neurons_of_the_texts_that_are_like_it() -> None:
    model: Any = tiny("llama", layers=2)
    ids = torch.stack([IDS[:24] if text % 2 else RANDOM_IDS[:24] for text in range(6)])
    study = studied(model, samples=6, tokens=24)
    study.ids = ids
    method = CoreInfer(share=0.25, first=0, last=0, prediction="similarity", groups=2)
    twin: Any = with_study(model, method, study)
    judge = twin.model.layers[1].mlp
    assert judge.groups.centres is not None and twin.model.layers[0].mlp.groups.centres is None
    own = []
    for text in (IDS[:24], RANDOM_IDS[:24]):
        inside: list[Tensor] = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, inside=inside: inside.append(inputs[0][0])
        )
        logits(model, text)
        handle.remove()
        counts = votes(inside[0], method.token_share)
        group = judge.groups.judged(counts)
        assert judge.groups.neurons[group].tolist() == sorted((3 * counts).topk(32).indices.tolist())  # three like it
        own.append(int(group))
    assert own[0] != own[1]
    session = wb.Session((twin, None), kv_dtype="float32")
    session.read(IDS[:24])
    run = session.run("full", max_new_tokens=3)
    assert int(run.decoder.memory["group"]) == own[0]
    assert torch.equal(run.decoder.memory["core", 0][0], model.model.layers[0].mlp.gate_proj.weight[
        twin.model.layers[0].mlp.groups.neurons[own[0]]
    ])  # fmt: skip


def core_logits(model: PreTrainedModel, ids: Tensor) -> tuple[Any, Any]:
    session = wb.Session((model, None), kv_dtype="float32")
    session.read(ids)
    return session, session.run(CoreInfer(share=0.25, first=0, last=0), question=torch.tensor([5, 6]), max_new_tokens=4)


def test_decoding_uses_the_core_neurons_of_its_own_run_only(tiny_llama: PreTrainedModel) -> None:
    session, run = core_logits(tiny_llama, IDS)
    other = core_logits(tiny_llama, IDS.flip(0))[1]
    held = run.decoder.memory
    assert set(held) == {(what, layer) for what in ("votes", "core") for layer in range(3)}
    assert held["core", 0][0].shape == (32, 64) and held["core", 0][2].shape == (64, 32)
    assert not torch.equal(held["votes", 1], other.decoder.memory["votes", 1])
    again = session.run(CoreInfer(share=0.25, first=0, last=0), question=torch.tensor([5, 6]), max_new_tokens=4)
    assert again.tokens == run.tokens and again.decoder.memory is not held
    assert all(torch.equal(again.decoder.memory["votes", i], held["votes", i]) for i in range(3))
    assert run.memory.samples[-1].categories["core neurons"] == run.decoder.memory_nbytes > 0
    twin = session.readings.variants.get([CoreInfer(share=0.25, first=0, last=0)])
    assert not any("votes" in vars(module) or "memory" in vars(module) for module in twin.modules())


def test_all_neurons_are_the_model_itself(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None), kv_dtype="float32")
    session.read(IDS)
    run = session.run(CoreInfer(share=1.0), max_new_tokens=6)
    assert run.tokens == session.run("full", max_new_tokens=6).tokens
    assert run.quality.kl < 1e-6
    assert session.run(CoreInfer(share=0.1, first=0, last=0), max_new_tokens=6).quality.kl > 1e-4


def test_a_step_computes_what_the_core_neurons_alone_give(tiny_llama: PreTrainedModel) -> None:
    class Remembering:
        def __init__(self) -> None:
            self.memory: dict[Any, Any] = {}

    from workbench.engine import attention_hook

    mlp: Any = tiny_llama.get_submodule("model.layers.0.mlp")
    core, handler = CoreMLP(mlp, mlp.act_fn, 0, 0.4, 0.25), Remembering()
    token = attention_hook._passing.set(attention_hook._Passing(handler, None, plain=True, positions=torch.arange(9)))  # type: ignore[arg-type]
    try:
        read, x = drawn(1, 9, 64), drawn(1, 1, 64, seed=1)
        assert torch.allclose(core(read), mlp(read))
        inside = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        chosen = handler.memory["votes", 0].topk(32).indices
        want = inside[..., chosen] @ mlp.down_proj.weight[:, chosen].T
        assert torch.allclose(core(x), want, atol=1e-5)
    finally:
        attention_hook._passing.reset(token)
    assert torch.allclose(core(x), mlp(x))  # outside of a run: all neurons


def test_stored_weights_do_not_shrink_and_a_budget_says_so(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(tiny_llama, [CoreInfer(budget=0.5)])
    assert refusal.value.smallest == 1.0
    assert "40% of the MLPs' neurons" in CoreInfer().note(tiny_llama)
    twin = compressed(tiny_llama, [CoreInfer()])
    assert all(one is other for one, other in zip(twin.parameters(), tiny_llama.parameters(), strict=True))


# -- what is left alone


def test_what_is_in_no_gated_mlp_is_listed_with_the_reason(tiny_llama: PreTrainedModel) -> None:
    left = CFSP().left_alone(tiny_llama)
    assert "no gated MLP (gate_proj, up_proj, down_proj)" in left["model.layers.0.self_attn.q_proj"]
    for architecture in ("phi3", "mixtral"):
        with pytest.raises(NotApplicable, match="no linear layer left"):
            compressed(tiny(architecture), [CFSP()])
