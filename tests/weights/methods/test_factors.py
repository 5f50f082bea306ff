"""Weights as products: truncated, weighted, of atoms, in pairs, and behind a shared codebook."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import workbench as wb
from tests.weights.support import IDS, RANDOM_IDS, correlated, drawn, logits, seeded, stats_of, studied, with_study
from workbench.errors import BadBudget, BadParameter, BudgetTooSmall, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights import FWSVD, SVD, SVDLLM, CoSpaDi, Greenformers, MoDeGPT, VQLogits, WeightMethod, compressed
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import CodebookLinear, DictionaryLinear, codebook_nbytes, dictionary_nbytes
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.layers.narrow_attention import NarrowAttention
from workbench.weights.methods.low_rank.fwsvd import importance
from workbench.weights.methods.low_rank.greenformers import semi_nonnegative
from workbench.weights.methods.quantise.vq_logits import clusters
from workbench.weights.solvers.block_widths import shares
from workbench.weights.solvers.dictionary import learn, pursue
from workbench.weights.solvers.low_rank import row_weighted, truncated, updated, whitened
from workbench.weights.solvers.module_decompositions import leverage, mixtures, nystrom, pair_scores, value_moment
from workbench.weights.solvers.whitening import root
from workbench.weights.surgery.prunable import PrunableQueriesKeys, prunable_modules
from workbench.weights.surgery.sharing_copy import sharing_copy


def small_weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, LowRankLinear | DictionaryLinear):
        return layer.dequantised()
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def output_errors(model: PreTrainedModel, twin: PreTrainedModel, study: WeightStudy) -> dict[str, float]:
    """Of each layer the mean square of what changed in its outputs, relative to them."""
    found = {}
    for _, inputs in study.inputs(hessians=True):
        for name, stats in inputs.items():
            weight = small_weight(model.get_submodule(name))
            change = small_weight(twin.get_submodule(name)) - weight
            found[name] = float(stats.output_error(change).sum() / stats.output_error(weight).sum())
    return found


# --- Whitening


def test_the_root_of_a_second_moment_turns_output_errors_into_lengths() -> None:
    x = correlated(200, 12)
    moment, change = x.T @ x / 200, drawn(5, 12)
    outputs = (x @ change.T).square().mean(dim=0).sum()
    assert float((change @ root(moment)).square().sum()) == pytest.approx(float(outputs), rel=1e-3)


@pytest.mark.parametrize(
    "moment", [torch.zeros(6, 6), torch.diag(torch.tensor([1.0, 0, 0, 2, 0, 0])), torch.ones(6, 6)]
)
def test_inputs_that_never_came_leave_a_root_that_can_be_inverted(moment: Tensor) -> None:
    base = root(moment)
    assert bool((base.diagonal() > 0).all()) and bool(base.isfinite().all())
    down, up = whitened(drawn(4, 6), 2, moment)
    assert bool(down.isfinite().all() and up.isfinite().all())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_product_of_that_rank_changes_the_outputs_less(rank: int) -> None:
    x, weight = correlated(300, 12), drawn(20, 12)
    down, up = whitened(weight, rank, x.T @ x / 300)
    error = float((x @ (weight - up @ down).T).square().sum())
    tail = torch.linalg.svdvals((x @ weight.T).double())[rank:].square().sum()  # of the outputs themselves
    assert error == pytest.approx(float(tail), rel=1e-2)
    plain = truncated(weight, rank)
    assert error <= float((x @ (weight - plain[1] @ plain[0]).T).square().sum())


def test_svd_llm_loses_less_of_every_output_than_svd() -> None:
    model = tiny("llama")
    study = studied(model)
    by_weights, by_outputs = (
        output_errors(model, with_study(model, method, study), study)
        for method in (SVD(budget=0.6), SVDLLM(budget=0.6))
    )
    assert all(by_outputs[name] <= by_weights[name] * 1.001 for name in by_weights)
    assert sum(by_outputs.values()) < 0.9 * sum(by_weights.values())


def test_what_was_a_metric_of_svd_is_refused_with_the_name_of_the_method_it_is() -> None:
    with pytest.raises(BadParameter, match="svd-llm"):
        wb.method("svd", metric="outputs")


def test_no_left_factor_errs_less_than_the_updated_one() -> None:
    x, weight = correlated(300, 12), drawn(20, 12)
    down = whitened(weight, 4, torch.eye(12))[0]
    up = updated(weight, down, x.T @ x / 300)
    want = torch.linalg.lstsq((x @ down.T).double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(up, want.float(), rtol=1e-3, atol=1e-4)


def test_an_updated_layer_errs_less_on_what_the_compressed_blocks_before_it_give() -> None:
    model = tiny("llama", layers=2)
    study = studied(model)
    plain, updated = (with_study(model, SVDLLM(budget=0.5, update=update), study) for update in (False, True))
    half = sharing_copy(model)  # the first block compressed, the second as it was
    half.set_submodule("model.layers.0", updated.get_submodule("model.layers.0"))
    for block, inputs in study.inputs(hessians=True, behind=half):
        for name, stats in inputs.items() if block == "model.layers.1" else ():
            weight = small_weight(model.get_submodule(name))
            lost = [
                float(stats.output_error(small_weight(twin.get_submodule(name)) - weight).sum())
                for twin in (updated, plain)
            ]
            assert lost[0] < lost[1], name


# --- FWSVD


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_no_product_of_that_rank_has_a_smaller_weighted_error(rank: int) -> None:
    weight, rows = drawn(20, 12), drawn(20, seed=1).exp()
    down, up = row_weighted(weight, rank, rows)
    error = sum(float(rows[o]) * float((weight - up @ down)[o].square().sum()) for o in range(20))
    tail = torch.linalg.svdvals(rows.sqrt()[:, None].double() * weight)[rank:].square().sum()
    assert error == pytest.approx(float(tail), rel=1e-3)


def test_rows_that_count_alike_are_truncated_as_by_svd() -> None:
    weight = drawn(9, 14)
    ours, plain = row_weighted(weight, 4, torch.full((9,), 3e-7)), truncated(weight, 4)
    torch.testing.assert_close(ours[1] @ ours[0], plain[1] @ plain[0], rtol=0, atol=1e-5)


def test_the_fisher_weighted_error_of_every_layer_is_at_most_that_of_svd() -> None:
    model = tiny("llama")
    study = studied(model)
    gradients = study.gradients()
    fwsvd, svd = (with_study(model, method, study) for method in (FWSVD(budget=0.6), SVD(budget=0.6)))
    ours, theirs = [], []
    for name, gradient in gradients.items():
        weight = small_weight(model.get_submodule(name))
        for twin, errors in ((fwsvd, ours), (svd, theirs)):
            change = small_weight(twin.get_submodule(name)) - weight
            errors.append(float((importance(gradient.rows) * change.square().sum(dim=1)).sum() / gradient.rows.sum()))
        assert ours[-1] <= theirs[-1] * 1.002  # both are rounded to 16 bits
    assert sum(ours) < 0.95 * sum(theirs)


def test_a_row_without_any_gradient_is_kept_in_bounds() -> None:
    rows = torch.tensor([0.0, 1.0, 2.0, 0.0])
    assert bool((importance(rows) > 0).all()) and float(importance(rows)[2]) == 2
    assert torch.equal(importance(torch.zeros(3)), torch.ones(3))  # an expert that no token chose
    down, up = row_weighted(drawn(4, 8), 2, importance(rows))
    assert bool((up @ down).isfinite().all()) and float(up.abs().max()) < 1e3


# --- Greenformers


def test_the_default_solver_is_truncated_svd() -> None:
    model = tiny("llama")
    assert torch.equal(
        logits(compressed(model, [Greenformers()]), RANDOM_IDS), logits(compressed(model, [SVD()]), RANDOM_IDS)
    )


def test_one_update_is_that_of_the_paper() -> None:
    weight, rank = drawn(6, 5), 2
    down = torch.rand(rank, 5, generator=torch.Generator().manual_seed(0)) + 0.2
    up = torch.linalg.lstsq(down.T, weight.T).solution.T
    want = down.clone()
    for r, i in itertools.product(range(rank), range(5)):
        a = [float(up[:, q] @ weight[:, i]) for q in range(rank)]
        b = [float(up[:, r] @ up[:, q]) for q in range(rank)]
        plus = max(a[r], 0) + sum(max(-b[q], 0) * float(down[q, i]) for q in range(rank))
        minus = max(-a[r], 0) + sum(max(b[q], 0) * float(down[q, i]) for q in range(rank))
        want[r, i] = float(down[r, i]) * (plus / minus) ** 0.5
    found, _ = semi_nonnegative(weight, rank, 1)
    torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), want / want.norm(dim=1, keepdim=True))


def test_semi_nonnegative_factors_come_ever_closer_and_never_closer_than_svd() -> None:
    weight = drawn(30, 40)
    errors = []
    for iterations in (1, 2, 5, 20, 80):
        down, up = semi_nonnegative(weight, 8, iterations)
        assert bool((down >= 0).all()) and bool((up < 0).any())
        errors.append(float((weight - up @ down).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    assert errors[-1] >= float(torch.linalg.svdvals(weight)[8:].square().sum().sqrt())


# --- What ranks have in common


@pytest.mark.parametrize("method", [FWSVD, Greenformers, CoSpaDi])
def test_more_bytes_never_lose_more_and_all_of_them_lose_nothing(method: type[WeightMethod]) -> None:
    model = tiny("llama", layers=1)
    study = studied(model)
    parameters = {"rounds": 4} if method is CoSpaDi else {}
    errors = []
    for share in (0.3, 0.6, 0.9, 1.0):
        twin = with_study(model, method(budget=share, **parameters), study)
        errors.append(sum(output_errors(model, twin, study).values()))
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0
    assert torch.equal(logits(twin, RANDOM_IDS), logits(model, RANDOM_IDS))
    with pytest.raises(BudgetTooSmall, match="no rank at all"):
        compressed(model, [method(budget=0.01)])
    with pytest.raises(BadBudget, match="share of each layer's bytes"):
        method(budget="1MiB")


# --- CoSpaDi


def test_a_dictionary_layer_is_a_sparse_matrix_times_atoms_and_holds_what_it_counts() -> None:
    atoms, chosen, coefficients = drawn(11, 7), torch.zeros(5, 11, dtype=torch.bool), drawn(5, 3, seed=1)
    for o in range(5):
        chosen[o, [o, o + 2, 10 - o // 2]] = True
    layer = DictionaryLinear(atoms, chosen, coefficients, nn.Parameter(drawn(5, seed=2)))
    want = torch.zeros(5, 7)
    for o in range(5):
        for place, atom in enumerate([a for a in range(11) if chosen[o, a]]):
            want[o] += coefficients[o, place].half().float() * atoms[atom].half().float()
    torch.testing.assert_close(layer.dequantised(), want)
    x = drawn(2, 4, 7, seed=3)
    torch.testing.assert_close(layer(x), x @ want.T + layer.bias, rtol=1e-4, atol=1e-4)
    assert layer.nbytes == dictionary_nbytes(5, 7, 11, 3) == tensor_bytes(layer.buffers())


def test_of_atoms_at_right_angles_the_best_choice_is_found() -> None:
    basis = torch.linalg.qr(drawn(8, 8))[0][:6]
    rows = drawn(10, 8, seed=1)
    codes, chosen = pursue(rows, basis, None, 2)
    for o in range(10):
        best = min(
            float((rows[o] - basis[list(pair)].T @ (basis[list(pair)] @ rows[o])).square().sum())
            for pair in itertools.combinations(range(6), 2)
        )
        assert float((rows[o] - codes[o] @ basis).square().sum()) == pytest.approx(best, abs=1e-4)
        assert int(chosen[o].sum()) == 2 and not bool(codes[o][~chosen[o]].any())


def test_more_rounds_never_lose_more() -> None:
    rows, errors = drawn(60, 24), []
    for rounds in (0, 1, 3, 8, 20):
        found = learn(rows, 16, 6, rounds)
        assert bool((found.chosen.sum(dim=1) == 6).all())
        errors.append(float((rows - found.codes @ found.atoms).norm()))
    assert all(late <= early + 1e-4 for early, late in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_rows_in_many_subspaces_are_found_where_a_low_rank_finds_none() -> None:
    draw = torch.Generator().manual_seed(0)
    atoms = nn.functional.normalize(torch.randn(24, 32, generator=draw), dim=1)
    codes = torch.zeros(400, 24)
    for o in range(400):
        codes[o, torch.randperm(24, generator=draw)[:3]] = torch.randn(3, generator=draw)
    rows = codes @ atoms
    found = learn(rows, 24, 3, 40)
    error = float((rows - found.codes @ found.atoms).square().sum() / rows.square().sum())
    rank = dictionary_nbytes(400, 32, 24, 3) // (2 * (400 + 32))
    low = torch.linalg.svdvals(rows)[rank:].square().sum() / rows.square().sum()
    assert error < 0.5 * float(low)


def test_as_many_coefficients_as_dimensions_are_exact() -> None:
    rows = drawn(20, 6)
    found = learn(rows, 6, 6, 1)
    torch.testing.assert_close(found.codes @ found.atoms, rows, rtol=0, atol=1e-4)


def test_atoms_that_no_row_uses_are_put_to_use() -> None:
    rows = torch.cat([drawn(1, 12).expand(20, 12), drawn(4, 12, seed=1)])  # of rank 5, for 10 atoms
    found = learn(rows, 10, 2, 5)
    assert bool(found.atoms.isfinite().all()) and bool(found.codes.isfinite().all())
    torch.testing.assert_close(found.codes @ found.atoms, rows, rtol=0, atol=1e-3)


def test_a_dictionary_loses_less_of_the_outputs_than_svd_of_the_same_bytes() -> None:
    model = tiny("llama", layers=2)
    study = studied(model)
    ours, svd = (
        output_errors(model, with_study(model, method, study), study)
        for method in (CoSpaDi(budget=0.6), SVD(budget=0.6))
    )
    assert sum(ours.values()) < 0.9 * sum(svd.values())


# --- MoDeGPT


def test_ridge_leverage_is_the_diagonal_of_its_formula() -> None:
    moment = (x := correlated(100, 9)).T @ x / 100
    ridge = 0.03 * moment.diagonal().mean() * torch.eye(9)
    want = (moment.double() @ torch.linalg.inv((moment + ridge).double())).diagonal()
    torch.testing.assert_close(leverage(moment, 0.03), want.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(leverage(torch.zeros(3, 3), 0.1), torch.zeros(3))


def test_what_follows_the_kept_neurons_is_refitted_by_least_squares() -> None:
    x, weight = correlated(400, 10), drawn(6, 10)
    kept = torch.tensor([0, 3, 4, 8])
    moment = x.T @ x / 400
    found = nystrom(weight, moment, kept)
    want = torch.linalg.lstsq(x[:, kept].double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(found, want.float(), rtol=1e-2, atol=1e-2)
    lost = [float((x @ weight.T - x[:, kept] @ small.T).square().sum()) for small in (found, weight[:, kept])]
    assert lost[0] < lost[1]
    assert torch.equal(nystrom(weight, torch.zeros(10, 10), kept), weight[:, kept])  # nothing was seen


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_other_mixtures_of_values_keep_more_of_the_outputs(rank: int) -> None:
    v, outputs = correlated(500, 6), drawn(14, 6)
    mixing, small = mixtures(outputs, v.T @ v / 500, rank)
    error = float((v @ outputs.T - v @ mixing.T @ small.T).square().sum())
    tail = torch.linalg.svdvals((v @ outputs.T).double())[rank:].square().sum()
    assert mixing.shape == (rank, 6) and small.shape == (14, rank)
    assert error == pytest.approx(float(tail), rel=1e-2)
    moment = v.T @ v / 500
    for some in itertools.combinations(range(6), rank):  # channels as they are, refitted
        few = nystrom(outputs, moment, torch.tensor(some))
        assert error <= float((v @ outputs.T - v[:, list(some)] @ few.T).square().sum()) * 1.001


def test_moments_of_values_count_their_bias() -> None:
    x, rows, bias = correlated(300, 7) + 1, drawn(4, 7), drawn(4, seed=1)
    v = x @ rows.T + bias
    torch.testing.assert_close(value_moment(rows, bias, stats_of(x)), v.T @ v / 300, rtol=1e-3, atol=1e-3)


def test_pairs_of_channels_are_scored_by_what_they_carry_at_every_position() -> None:
    q, k = drawn(50, 2, 2, 8), drawn(50, 2, 8, seed=1)  # [n, heads, groups, d], [n, heads, d]
    found = pair_scores(q.square().mean(0).flatten(), k.square().mean(0).flatten(), 2, 2)
    for head, pair in itertools.product(range(2), range(4)):
        both = [pair, pair + 4]
        asked = sum(float(q[:, head, group, i].square().mean()) for group in range(2) for i in both)
        answered = sum(float(k[:, head, i].square().mean()) for i in both)
        assert float(found[head, pair]) == pytest.approx((asked * answered) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "qwen2", "mistral"])
def test_narrow_queries_and_keys_are_the_whole_ones_without_the_other_pairs(architecture: str) -> None:
    model = tiny(architecture)
    twin, masked = copy.deepcopy(model), copy.deepcopy(model)
    for module in prunable_modules(twin):
        if isinstance(module, PrunableQueriesKeys):
            kept = torch.rand(module.heads, module.width, generator=seeded()).topk(5, dim=1).indices.sort(dim=1).values
            module.prune(twin, kept)
            gone = torch.ones(module.heads, module.width, dtype=torch.bool).scatter_(1, kept, False)
            for name, (_, heads) in module.layers.items():
                layer = masked.get_submodule(name)
                lost = gone.repeat_interleave(heads // module.heads, dim=0).repeat(1, 2).flatten()
                layer.weight[lost] = 0
                if layer.bias is not None:
                    layer.bias[lost] = 0
    for implementation in ("eager", "sdpa"):
        for each in (twin, masked):
            each.set_attn_implementation(implementation)
        torch.testing.assert_close(logits(twin), logits(masked), rtol=1e-4, atol=1e-4)
    cache = DynamicCache(config=twin.config)
    with torch.no_grad():
        steps = [twin(token[None, None], past_key_values=cache, use_cache=True).logits[0, -1] for token in IDS[:12]]
    torch.testing.assert_close(torch.stack(steps), logits(masked, IDS[:12]), rtol=1e-3, atol=1e-3)
    assert cache.layers[0].keys.shape[-1] == 10


@pytest.mark.parametrize("key", ["full", "snapkv", "kivi", "streaming-llm", "pyramidkv", "cskv", "expected-attention"])
def test_cache_methods_run_on_narrow_keys_or_say_why_not(key: str) -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(IDS)
    recipe = [MoDeGPT(budget=0.7)] + ([] if key == "full" else [wb.method(key)])
    try:
        run = session.run(recipe, max_new_tokens=3)
    except NotApplicable as refusal:
        assert "rotat" in str(refusal)
        return
    assert len(run.tokens) == 3 and key != "cskv"


def test_narrow_queries_and_keys_make_the_cache_narrower(tiny_llama: PreTrainedModel) -> None:
    whole, narrow = (compressed(tiny_llama, [MoDeGPT(budget=0.6, queries_keys=chosen)]) for chosen in (False, True))
    keys = [twin.get_submodule("model.layers.1.self_attn.k_proj").out_features for twin in (whole, narrow)]
    assert keys[1] < keys[0] == 32


def test_blocks_that_do_little_lose_most() -> None:
    importance = torch.tensor([0.5, 0.1, 0.3])
    found = shares(importance, 0.2)
    weights = [2.718281828459045 ** (-float(s) / 0.2) for s in importance]
    assert found.tolist() == pytest.approx([3 * w / sum(weights) for w in weights])
    model = tiny("llama")
    study = studied(model)
    twin = with_study(model, MoDeGPT(budget=0.6, temperature=0.05), study)
    widths = [twin.get_submodule(f"model.layers.{layer}.mlp.down_proj").in_features for layer in range(3)]
    order = (1 - study.similarity()).argsort().tolist()
    assert [widths[layer] for layer in order] == sorted(widths) and widths[order[0]] < widths[order[-1]]


@pytest.mark.parametrize("architecture", ["llama", "mqa", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("budget", [0.4, 0.85])
def test_modules_become_narrower_inside_and_fit(architecture: str, budget: float) -> None:
    model = tiny(architecture)
    method = MoDeGPT(budget=budget)
    study = studied(model)
    twin = with_study(model, method, study)
    survey = method.survey(model)
    held = sum(twin.get_submodule(name).weight.nbytes for name in survey.linears)
    slack = sum(m.weight.nbytes // m.weight.shape[0] * 8 for m in survey.linears.values())
    assert budget * survey.full_nbytes - slack < held <= budget * survey.full_nbytes
    assert all(isinstance(layer.self_attn, NarrowAttention) for layer in twin.model.layers)
    assert bool(logits(twin, RANDOM_IDS).isfinite().all())
    assert any(name.endswith("q_proj") for name in survey.linears) == (architecture != "qwen3")  # which has q_norm


def test_queries_and_keys_that_stay_whole_are_the_models_own() -> None:
    model = tiny("llama")
    method = MoDeGPT(budget=0.5, queries_keys=False)
    left = method.survey(model).left
    assert {reason for name, reason in left.items() if "q_proj" in name} == {"queries and keys stay whole"}
    twin = with_study(model, method, studied(model))
    for part in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert twin.get_parameter(name) is model.get_parameter(name)


def test_mixtures_of_all_channels_and_all_neurons_say_what_the_model_says() -> None:
    model = tiny("qwen2")  # with biases
    study = studied(model)
    rank_one_less = with_study(model, MoDeGPT(budget=0.999), study)
    far = float(
        (logits(rank_one_less, RANDOM_IDS) - logits(model, RANDOM_IDS)).abs().max()
        / logits(model, RANDOM_IDS).abs().max()
    )
    much = float(
        (logits(with_study(model, MoDeGPT(budget=0.5), study), RANDOM_IDS) - logits(model, RANDOM_IDS)).abs().max()
    )
    assert 0 < far * float(logits(model, RANDOM_IDS).abs().max()) < much
    assert torch.equal(logits(with_study(model, MoDeGPT(budget=1.0), study), RANDOM_IDS), logits(model, RANDOM_IDS))


def test_a_module_loses_less_than_by_svd_of_its_matrices_of_the_same_bytes() -> None:
    model = tiny("llama")
    study = studied(model)
    entering: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, args, number=number: entering.update({number: args[0]}))
    with torch.no_grad():
        model(study.ids)
    ours, svd = (
        with_study(model, method, study)
        for method in (MoDeGPT(budget=0.6, temperature=100, sequential=False), SVD(budget=0.6))
    )
    for number, layer in enumerate(model.model.layers):
        with torch.no_grad():
            x, want = entering[number], layer.mlp(entering[number])
            lost = [float((twin.model.layers[number].mlp(x) - want).square().sum()) for twin in (ours, svd)]
        assert lost[0] < lost[1]


def test_the_cache_becomes_smaller_with_the_values() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(RANDOM_IDS)
    session.calibrate("sampled", samples=4, tokens=64)
    whole, small = (
        session.run(method, question=RANDOM_IDS[:3], max_new_tokens=3) for method in ("full", MoDeGPT(budget=0.5))
    )
    assert len(small.tokens) == 3

    held = [sum(size for name, size in run.memory.peaks.items() if name.startswith("kv")) for run in (whole, small)]
    assert held[1] < 0.85 * held[0]


def test_fused_projections_and_experts_are_said_to_be_left() -> None:
    with pytest.raises(NotApplicable, match="no linear layer left"):
        MoDeGPT().survey(tiny("phi3"))
    survey = MoDeGPT().survey(tiny("mixtral"))
    assert all(name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for name in survey.linears)
    assert any("fused experts" in reason for reason in survey.left.values())


# --- VQ-Logits


def test_tokens_of_a_cluster_share_a_logit_and_only_the_head_changes() -> None:
    model = tiny("llama")
    twin = compressed(model, [VQLogits(budget=0.2)])
    head = twin.lm_head
    assert isinstance(head, CodebookLinear)
    said = logits(twin, RANDOM_IDS)
    for token in range(256):
        same = (head.index == head.index[token]).nonzero()[:, 0]
        assert bool((said[:, same] == said[:, token : token + 1]).all())
    with torch.no_grad():
        hidden = model.model(RANDOM_IDS[None]).last_hidden_state[0]
    torch.testing.assert_close(said, hidden @ head.dequantised().T, rtol=1e-3, atol=1e-3)
    assert len({id(p) for p in model.parameters()} - {id(p) for p in twin.parameters()}) == 1


def test_a_head_that_is_tied_to_the_embedding_is_refused() -> None:
    model = tiny("gemma3")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(NotApplicable, match=r"tied to model\.embed_tokens.*larger"):
        compressed(model, [VQLogits()])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert isinstance(compressed(model, [VQLogits(budget=0.5)]).lm_head, CodebookLinear)


def test_rows_that_are_the_same_are_given_back_exactly() -> None:
    distinct = drawn(6, 8)
    rows = distinct[torch.arange(60) % 6]
    codewords, index = clusters(rows, 30, 30)
    torch.testing.assert_close(codewords[index], rows)


def test_each_row_goes_to_its_nearest_codeword_and_each_codeword_to_the_mean_of_its_rows() -> None:
    rows = drawn(80, 5)
    codewords, index = clusters(rows, 7, 100)
    for v in range(80):
        distances = [float((rows[v] - codewords[c]).square().sum()) for c in range(7)]
        assert distances[int(index[v])] == pytest.approx(min(distances), abs=1e-5)
    for c in range(7):
        torch.testing.assert_close(codewords[c], rows[index == c].mean(dim=0), rtol=1e-4, atol=1e-4)


def test_more_rounds_of_clustering_never_lose_more() -> None:
    rows, errors = drawn(200, 6), []
    for rounds in (1, 2, 4, 8, 16):
        codewords, index = clusters(rows, 12, rounds)
        errors.append(float((rows - codewords[index]).square().sum()))
    assert all(late <= early * (1 + 1e-5) for early, late in itertools.pairwise(errors))


@pytest.mark.parametrize("tokens", [300, 40_000, 200_000])
@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.9])
def test_the_codebook_is_the_largest_within_the_budget(tokens: int, share: float) -> None:
    head, method = nn.Linear(64, tokens, bias=False, device="meta"), VQLogits(budget=share)
    limit, count = share * 2 * 64 * tokens, method._codewords(head)
    if method.nbytes(head) <= limit:
        assert count == tokens or codebook_nbytes(tokens, 64, count + 1) > limit
    else:
        assert count == 1
    assert VQLogits(budget=1.0)._codewords(head) == 0


def test_a_layer_with_many_codewords_numbers_them_with_more_bytes() -> None:
    index = torch.arange(40_000) % 33_000
    layer = CodebookLinear(drawn(33_000, 2), index, nn.Parameter(drawn(40_000, seed=1)))
    assert layer.index.dtype == torch.int32 and layer.nbytes == codebook_nbytes(40_000, 2, 33_000)
    x = drawn(3, 2)
    torch.testing.assert_close(layer(x), x @ layer.dequantised().T + layer.bias, rtol=1e-3, atol=1e-3)
