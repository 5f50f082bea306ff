"""Allocation over layers: which layer hurts, what became of each weight, and levels found by evolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import workbench as wb
from tests.weights.support import logits, seeded
from workbench.core.evolution import Step, evolve, exchanges, filled, steps, switched, total, uniform
from workbench.errors import BadParameter, BadRecipe, BudgetTooSmall, Cancelled, NotApplicable
from workbench.models import tiny
from workbench.models.depth import origins
from workbench.progress import Progress
from workbench.weights import RTN, SVD, EvoPress, EvoPressDepth, compressed
from workbench.weights.calibration.model_head import ModelHead
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import Calibration
from workbench.weights.methods.any_size.evopress_depth import drawn, exchanged
from workbench.weights.reports.spectra import Spectrum, singular_values
from workbench.weights.surgery.depth import shorten
from workbench.weights.surgery.sharing_copy import sharing_copy
from workbench.weights.survey import Survey
from workbench_widgets import weight_views

SAMPLED = Calibration("sampled", samples=8, tokens=32)
LLAMA_LAYER_BYTES = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)


def session(architecture: str = "llama", **options: object) -> wb.Session:
    made = wb.Session((tiny(architecture, **options), None))  # type: ignore[arg-type]
    made.calibrate("sampled", samples=4, tokens=24)
    return made


def kl(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    p, q = (logits(x, ids).double().log_softmax(-1) for x in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


# -- the search


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mutations_stay_within_the_total_and_the_levels(data: st.DataObject) -> None:
    units, count = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    growth = data.draw(
        st.lists(st.lists(st.integers(1, 9), min_size=count, max_size=count), min_size=units, max_size=units)
    )
    sizes = torch.tensor(growth).cumsum(dim=1)
    limit = data.draw(st.integers(int(sizes[:, 0].sum()), int(sizes[:, -1].sum())))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    levels = filled(uniform(sizes, limit), sizes, limit, draw)
    for _ in range(5):
        levels = switched(levels, sizes, limit, draw)
        assert total(levels, sizes) <= limit
        assert int(levels.min()) >= 0 and int(levels.max()) < count
        spare = limit - total(levels, sizes)  # nothing more would have fitted
        for unit, level in enumerate(levels.tolist()):
            assert level == count - 1 or int(sizes[unit, level + 1] - sizes[unit, level]) > spare


def test_parts_of_one_size_are_switched_one_for_one() -> None:
    sizes = torch.tensor([[2, 3, 4]]).repeat(12, 1)
    draw = torch.Generator().manual_seed(0)
    start = torch.ones(12, dtype=torch.long)
    changes = [switched(start, sizes, 36, draw) - start for _ in range(200)]
    assert all(int(change.sum()) == 0 for change in changes)
    moved = torch.tensor([int(change.abs().sum()) for change in changes])
    assert moved.max() <= 6 and (moved == 2).sum() > (moved == 6).sum() > 0  # one to three switches, fewer more often


def test_selection_gives_fewer_candidates_more_samples() -> None:
    assert steps(64, 64) == [Step(1, 16), Step(4, 4), Step(16, 1), Step(64, 1)]
    assert steps(1, 5) == [Step(5, 1)]


def test_evolution_finds_the_best_of_all_levels_where_errors_do_not_add_up() -> None:
    weights = torch.tensor([5.0, 1.0, 3.0, 0.5, 2.0, 4.0])

    def unfit(levels: Tensor) -> float:
        error = weights * 4.0**-levels
        return float(error.sum() + error[0] * error[1])

    sizes = torch.tensor([[1, 2, 3]]).repeat(6, 1)
    every = torch.cartesian_prod(*[torch.arange(3)] * 6)
    best = min(unfit(row) for row in every if total(row, sizes) <= 12)
    found = evolve(
        torch.ones(6, dtype=torch.long), lambda parent, draw: switched(parent, sizes, 12, draw),
        lambda levels, seen: unfit(levels), samples=4, generations=40, offspring=8, seed=0,
        progress=Progress(), stage="x",
    )  # fmt: skip
    assert found.unfitness == pytest.approx(best) and found.unfitness < found.before
    assert unfit(found.levels) == found.unfitness


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 10), st.integers(2, 4), st.integers(0, 999))
def test_exchanges_stay_within_the_total_and_gain_where_changes_add_up(units: int, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (units, count), generator=draw).cumsum(dim=1)
    weight = torch.rand(units, generator=draw)
    limit = int((sizes[:, 0].sum() + sizes[:, -1].sum()) / 2)
    levels = filled(uniform(sizes, limit), sizes, limit, draw)

    def unfit(at: Tensor) -> float:
        return float((weight * 2.0**-at).sum())

    slopes = torch.full((units, 2), torch.inf)
    for unit in range(units):
        for side, step in enumerate((-1, 1)):
            if 0 <= int(levels[unit]) + step < count:
                moved = levels.clone()
                moved[unit] += step
                slopes[unit, side] = unfit(moved) - unfit(levels)
    before = levels
    for after in exchanges(levels, slopes, sizes, limit):
        assert total(after, sizes) <= limit and int((after - levels).abs().max()) == 1
        assert unfit(after) < unfit(before) + 1e-6
        before = after


def test_a_fitness_that_is_not_a_number_never_wins() -> None:
    sizes = torch.tensor([[1, 2]]).repeat(4, 1)
    start = torch.tensor([1, 1, 0, 0])
    found = evolve(
        start, lambda parent, draw: switched(parent, sizes, 6, draw),
        lambda levels, seen: 1.0 if torch.equal(levels, start) else math.nan,
        samples=2, generations=3, offspring=4, seed=0, progress=Progress(), stage="x",
    )  # fmt: skip
    assert torch.equal(found.levels, start) and found.unfitness == 1.0


# -- EvoPress

QUICK: dict[str, Any] = {"of": "rtn", "generations": 2, "offspring": 3, "texts": 3, "tokens": 24, "slopes": 1}


def layers_that_differ() -> PreTrainedModel:
    """A model of four layers, of which the second does nearly nothing."""
    model = tiny("llama", layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").weight.data *= 0.01
    return model


@pytest.fixture(scope="module")
def searched() -> tuple[PreTrainedModel, WeightStudy, EvoPress]:
    model = layers_that_differ()
    method = EvoPress(
        of="rtn symmetric=true group_size=32",
        budget=(3 + 16 / 32) / 16,
        generations=12,
        offspring=8,
        texts=8,
        tokens=32,
    )
    return model, WeightStudy(model, calibration=SAMPLED), method


def test_levels_that_were_searched_beat_one_level_everywhere_at_equal_bytes(
    searched: tuple[PreTrainedModel, WeightStudy, EvoPress],
) -> None:
    model, study, method = searched
    even = RTN(bits=3, symmetric=True, group_size=32)
    twins = [compressed(model, [one], study=lambda *_: study) for one in (even, method)]
    survey = Survey.of(model, method)
    sizes = [sum(twin.get_submodule(name).nbytes for name in survey.linears) for twin in twins]
    assert sizes[1] <= sizes[0] and sizes[1] <= survey.nbytes
    plain, better = (kl(model, twin, study.ids) for twin in twins)
    assert better < 0.7 * plain
    profile = method.profile(model, study)
    assert profile.before == pytest.approx(plain, rel=1e-3) and profile.after == pytest.approx(better, rel=1e-3)


def test_a_layer_that_does_nothing_gets_the_fewest_bits(
    searched: tuple[PreTrainedModel, WeightStudy, EvoPress],
) -> None:
    model, study, method = searched
    chosen = method.profile(model, study).levels

    def mean(layer: int) -> float:
        bits = [int(level.split()[0]) for name, level in chosen.items() if name.startswith(f"model.layers.{layer}.")]
        return sum(bits) / len(bits)

    assert mean(1) < min(mean(layer) for layer in (0, 2, 3))


def test_each_layer_is_compressed_once_at_each_level_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    study = WeightStudy(model, calibration=SAMPLED)
    count = 0
    original = RTN.compress

    def counted(self: RTN, linear: nn.Linear, inputs: object = None) -> nn.Module:
        nonlocal count
        count += 1
        return original(self, linear)

    monkeypatch.setattr(RTN, "compress", counted)
    for budget in (0.22, 0.25, 0.3):
        compressed(model, [EvoPress(levels="2,4", budget=budget, **QUICK)], study=lambda *_: study)
    assert count == 2 * len(Survey.of(model, RTN()).linears)


def test_evopress_searches_over_budgets_of_methods_that_have_no_bits() -> None:
    model = layers_that_differ()
    method = EvoPress(of="svd", budget=0.6, levels="0.4,0.6,0.8", generations=6, offspring=6, texts=4, tokens=24)
    study = WeightStudy(model, calibration=SAMPLED)
    twin = compressed(model, [method], study=lambda *_: study)
    survey = Survey.of(model, method)
    assert sum(twin.get_submodule(name).nbytes for name in survey.linears) <= 0.6 * survey.full_nbytes
    assert kl(model, twin, study.ids) < kl(model, compressed(model, [SVD(budget=0.6)]), study.ids)


def test_the_same_seed_finds_the_same_levels_and_another_one_may_not() -> None:
    model = tiny("llama")
    found = [
        EvoPress(seed=seed, **QUICK).profile(model, WeightStudy(model, calibration=SAMPLED)).levels
        for seed in (0, 0, 7)
    ]
    assert found[0] == found[1] != found[2]


def test_the_search_can_be_cancelled_between_candidates() -> None:
    progress = Progress(lambda stage, done, total: progress.cancel() if stage == "searching levels" and done else None)
    with pytest.raises(Cancelled):
        compressed(tiny("llama"), [EvoPress(**QUICK)], progress)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"of": "snapkv"}, "no weight method"),
        ({"of": "evopress"}, "chosen together"),
        ({"of": "transact"}, "cannot be switched one by one"),
        ({"of": "rtn group_size"}, "a method and its parameters"),
        ({"of": "rtn bits=3"}, "a method and its parameters"),
        ({"levels": "5"}, "bits=5"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(values: dict[str, str], message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        EvoPress(**values)


def test_a_budget_below_the_lowest_levels_names_the_smallest() -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(tiny("llama"), [EvoPress(levels="3,4", budget=0.1, **QUICK)])
    compressed(tiny("llama"), [EvoPress(levels="3,4", budget=refusal.value.smallest, **QUICK)])


# -- which blocks can be missed


def without(model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
    twin = sharing_copy(model)
    shorten(twin, [index for index in range(len(twin.model.layers)) if index not in gone])
    return twin


def test_the_blocks_that_go_are_those_that_are_missed_least_together() -> None:
    model = tiny("llama", layers=5)
    study = WeightStudy(model, calibration=SAMPLED)
    settings: dict[str, Any] = {"texts": 4, "tokens": 24, "offspring": 6, "beginnings": 8}
    twin = compressed(model, [EvoPressDepth(budget=0.6, **settings)], study=lambda *_: study)
    ids = study.ids[:4, :24]
    every = {gone: kl(model, without(model, gone), ids) for gone in itertools.combinations(range(5), 2)}
    best = min(every, key=lambda gone: every[gone])
    assert list(origins(twin)) == [index for index in range(5) if index not in best]
    again = compressed(model, [EvoPressDepth(budget=0.6, **settings)])
    assert len(again.model.layers) == 3


def test_exchanged_sets_keep_within_the_bytes_and_sometimes_change() -> None:
    draw, sizes = seeded(), [3, 3, 5, 3, 4]
    parent = drawn(sizes, 11, draw)
    children = [exchanged(parent, sizes, 11, draw) for _ in range(40)]
    for child in (parent, *children):
        assert 0 < sum(size for size, stays in zip(sizes, child.tolist(), strict=True) if stays) <= 11
    assert len({tuple(child.tolist()) for child in children}) > 3
    whole = torch.ones(5, dtype=torch.long)
    assert torch.equal(exchanged(whole, sizes, 18, draw), whole)  # none can come back


# -- which layer hurts


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_one_layer_alone_is_that_layer_compressed_and_all_others_exact(architecture: str) -> None:
    made = session(architecture)
    frame = made.sensitivity("rtn", bits=2, group_size=32, tokens=24)
    ids = made.calibrate().ids
    small = compressed(made.model, [RTN(bits=2, group_size=32)])
    for layer in range(3):
        alone = tiny(architecture)
        alone.set_submodule(f"model.layers.{layer}", small.get_submodule(f"model.layers.{layer}"))
        row = frame[(frame.layer == layer) & (frame.module == "all")].iloc[0]
        assert row.kl == pytest.approx(kl(made.model, alone, ids), rel=1e-3)


def test_one_kind_of_module_alone_is_that_kind_in_all_layers() -> None:
    made = session()
    frame = made.sensitivity("rtn", bits=2, group_size=32, tokens=24)
    small = compressed(made.model, [RTN(bits=2, group_size=32)])
    alone = tiny("llama")
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj"
        alone.set_submodule(name, small.get_submodule(name))
    row = frame[frame.layer.isna() & (frame.module == "mlp.up_proj")].iloc[0]
    assert row.kl == pytest.approx(kl(made.model, alone, made.calibrate().ids), rel=1e-3)


def test_every_module_of_every_layer_can_be_measured_alone() -> None:
    made = session()
    frame = made.sensitivity("rtn", bits=2, group_size=32, tokens=24, each="module")
    assert len(frame) == 3 * 7 and (frame.kl > 0).all() and (frame.error > 0).all()
    small = compressed(made.model, [RTN(bits=2, group_size=32)])
    alone = tiny("llama")
    alone.set_submodule("model.layers.1.self_attn.q_proj", small.get_submodule("model.layers.1.self_attn.q_proj"))
    row = frame[(frame.layer == 1) & (frame.module == "self_attn.q_proj")].iloc[0]
    assert row.kl == pytest.approx(kl(made.model, alone, made.calibrate().ids), rel=1e-3)


def test_measuring_leaves_the_model_as_it_was_and_can_be_cancelled() -> None:
    made = session()
    ids = made.calibrate().ids
    before, modules = logits(made.model, ids), [type(x) for x in made.model.modules()]
    progress = Progress(lambda stage, done, total: progress.cancel() if stage == "measuring layers" and done else None)
    with pytest.raises(Cancelled):
        made.sensitivity("rtn", tokens=24, progress=progress)
    made.sensitivity("rtn", tokens=24)
    assert torch.equal(logits(made.model, ids), before) and [type(x) for x in made.model.modules()] == modules


def test_methods_whose_layers_belong_together_are_refused() -> None:
    with pytest.raises(NotApplicable, match="transact"):
        session().sensitivity("transact")
    with pytest.raises(BadRecipe, match="snapkv"):
        session().sensitivity(["rtn", "snapkv"])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "phi3", "mixtral"])
def test_the_end_of_a_model_says_what_the_whole_model_does(architecture: str) -> None:
    model = tiny(architecture)
    ids = torch.arange(48).view(2, 24) % 256
    with torch.no_grad():
        inner = model.model.layers[-1]
        found: list[Tensor] = []
        handle = inner.register_forward_hook(lambda module, args, out: found.append(out))
        want = model(ids).logits
        handle.remove()
    got = ModelHead(model).logits(found[0] if isinstance(found[0], Tensor) else found[0][0])
    torch.testing.assert_close(got, want)


# -- what became of each weight


def test_the_census_counts_every_matrix_and_the_bytes_that_are_live() -> None:
    made = session()
    frame = made.census("rtn", bits=3, group_size=32)
    assert len(frame) == 3 * 7 + 2 and frame.name.is_unique
    taken = frame[frame.form == "PackedLinear"]
    survey = Survey.of(made.model, RTN(bits=3, group_size=32))
    assert taken.bytes.sum() == survey.nbytes and (taken.share < 0.25).all()
    assert taken.share.to_numpy() == pytest.approx(taken.bytes.sum() / (3 * LLAMA_LAYER_BYTES))
    left = frame[frame.form == "plain"].set_index("name")
    assert left.loc["lm_head"].reason == "the output head keeps its precision" and left.weight_error.sum() == 0
    assert left.loc["lm_head"].bytes == 2 * 64 * 256


def test_errors_in_the_census_are_those_of_the_weights_and_of_the_outputs() -> None:
    made = session()
    row = made.census("rtn", bits=2, group_size=32).set_index("name").loc["model.layers.0.self_attn.q_proj"]
    linear = made.model.get_submodule("model.layers.0.self_attn.q_proj")
    small = RTN(bits=2, group_size=32).compress(linear)
    change = small.dequantised() - linear.weight
    assert row.weight_error == pytest.approx(float(change.norm() / linear.weight.norm()), rel=1e-5)
    heard: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: heard.append(args[0].flatten(0, 1)))
    logits(made.model, made.calibrate().ids)
    handle.remove()
    x = torch.cat(heard)
    first = x.unflatten(0, made.calibrate().ids.shape)[:, 0]  # counts a twentieth more in second moments

    def size(weight: Tensor) -> float:
        return float((x @ weight.T).square().sum(1).mean() + 0.05 * (first @ weight.T).square().sum(1).mean())

    want = (size(change) / size(linear.weight)) ** 0.5
    assert row.output_error == pytest.approx(want, rel=1e-3)


def test_fused_experts_are_listed_with_the_reason() -> None:
    frame = session("mixtral").census("rtn", outputs=False)
    experts = frame[frame.module == "mlp.experts.down_proj"]
    assert len(experts) == 3 and experts.reason.str.contains("fused experts").all()
    assert frame[frame.form == "plain"].reason.str.len().gt(0).all()


def test_tied_matrices_are_listed_once() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = wb.Session((LlamaForCausalLM(config).eval().requires_grad_(False), None))
    frame = made.census("rtn", group_size=32, outputs=False)
    assert list(frame[frame.layer.isna()].name) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("recipe", "why"),
    [("awq", "scales of its inputs are held by"), ("quarot", "is rotated"), (["quarot", "rtn"], "is rotated")],
)
def test_layers_that_stand_for_something_else_have_no_errors_and_the_census_says_why(recipe: Any, why: str) -> None:
    made = session()
    frame = made.census(recipe).set_index("name")
    reads = frame.loc[[name for name in frame.index if name.endswith(("q_proj", "up_proj", "gate_proj"))]]
    assert len(reads) and reads[["weight_error", "output_error"]].isna().all(axis=None)
    assert (reads.reason.str.startswith("not compared: ") & reads.reason.str.contains(why)).all()
    assert why in weight_views.not_compared(frame)
    left = frame[frame.output_error.notna() & (frame.form != "plain")]
    shown = {figure.name for figure in weight_views.weight_figures(frame.reset_index())}
    assert ("Output error" in shown) == (len(left) > 0)


def test_layers_that_hold_their_own_scales_have_their_errors() -> None:
    frame = session().census("awq", fold=False, bits=4)
    small = frame[frame.form != "plain"]
    assert small[["weight_error", "output_error"]].notna().all(axis=None) and not small.reason.any()
    assert weight_views.not_compared(frame) == ""


def test_rank_and_narrower_layers_are_told_in_the_census() -> None:
    frame = session().census("svd", budget=0.5)
    assert (frame[frame.form == "LowRankLinear"]["rank"] > 0).all()
    narrow = session().census("transact", outputs=False).set_index("name")
    assert pd.isna(narrow.loc["model.layers.0.mlp.up_proj"].weight_error)  # of another shape
    assert narrow.loc["model.layers.0.mlp.up_proj"].share < 1


# -- singular values


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_singular_values_are_those_of_the_matrix(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(singular_values(weight), torch.linalg.svdvals(weight.double()), rtol=1e-8, atol=1e-10)


def test_the_effective_rank_counts_equal_directions() -> None:
    values = torch.tensor([1.0] * 5 + [0.0] * 11)
    spectrum = Spectrum("x", 0, "x", 1.0, values)
    assert spectrum.effective_rank == pytest.approx(5) and spectrum.stable_rank == pytest.approx(5)
    assert spectrum.rank_for(0.9) == 5 and spectrum.rank_for(0.5) == 3


def test_spectra_show_what_truncation_left() -> None:
    made = session()
    plain, small = made.spectra(), made.spectra("svd", budget=0.5)
    assert len(plain) == len(small) == 3 * 7
    rank = made.census("svd", budget=0.5, outputs=False).set_index("name")["rank"]
    for before, after in zip(plain, small, strict=True):
        kept = int(rank[after.name])
        assert float(before.values[0]) == 1.0 and int((after.values > 1e-3).sum()) <= kept
        torch.testing.assert_close(after.values[:kept], before.values[:kept], rtol=0.02, atol=1e-3)
    assert list(plain.to_frame().columns[:4]) == ["layer", "module", "rank", "effective_rank"]
