"""Weights that hold all their sizes at once: BitStack's blocks, Double Rounding's codes, and sharing bytes out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

import workbench as wb
from tests.weights.support import RANDOM_IDS, drawn, layer_of, logits, studied, with_study
from workbench.errors import BadBudget, BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.progress import Progress
from workbench.weights import RTN, BitStack, DoubleRounding, compressed
from workbench.weights.calibration.step_losses import step_losses
from workbench.weights.layers import BitBlock, BitBlocksLinear, PackedLinear, bit_block_nbytes, packed_nbytes
from workbench.weights.methods.any_size.double_rounding import narrower
from workbench.weights.solvers.absolute_value import decompose, leading, scales
from workbench.weights.solvers.double_rounding import coarser, rounded
from workbench.weights.solvers.greedy_allocation import Size, growth_order, level_order, sizes_within
from workbench.weights.solvers.quantisation_grid import Grid, fit

# --- The order


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_of_as_many_equal_steps_loses_less(gains: list[list[int]], room: int) -> None:
    sizes = {}
    for name, own in enumerate(gains):
        left = [sum(own) - sum(sorted(own, reverse=True)[:level]) for level in range(len(own) + 1)]
        sizes[str(name)] = [Size(10 * (level + 1), float(error)) for level, error in enumerate(left)]
    limit = 10 * len(sizes) + room
    found = sizes_within(sizes, growth_order(sizes), limit)

    def lost(chosen: dict[str, int]) -> float:
        return sum(sizes[name][level].error for name, level in chosen.items())

    def size(chosen: dict[str, int]) -> int:
        return sum(sizes[name][level].nbytes for name, level in chosen.items())

    choices = itertools.product(*(range(len(rungs)) for rungs in sizes.values()))
    every = (dict(zip(sizes, chosen, strict=True)) for chosen in choices)
    assert size(found) <= limit
    assert lost(found) == min(lost(chosen) for chosen in every if size(chosen) <= limit)


def test_a_smaller_limit_takes_a_beginning_of_the_same_order() -> None:
    sizes = {"a": [Size(4, 1.0), Size(8, 0.2), Size(16, 0.1)], "b": [Size(10, 0.9), Size(20, 0.3)]}
    order = growth_order(sizes)
    assert order == ["a", "b", "a"]
    within = {limit: sizes_within(sizes, order, limit) for limit in range(14, 40)}
    for limit in range(15, 40):
        assert all(within[limit - 1][name] <= within[limit][name] for name in sizes)
    assert within[39] == {"a": 2, "b": 1} and within[17] == {"a": 0, "b": 0}


def test_no_layer_takes_its_second_step_before_all_took_their_first() -> None:
    after = {"a": [3.0, 1.0, 5.0], "b": [2.0], "c": [3.0, 0.5]}
    assert level_order(after) == ["b", "a", "c", "c", "a", "a"]
    assert level_order({}) == [] and level_order({"a": []}) == []


def test_a_steps_loss_is_that_of_the_model_with_all_other_layers_a_step_behind() -> None:
    model = tiny("llama")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    made = {name: [layer_of(model.get_submodule(name).weight * share) for share in (0.0, 0.5, 1.0)] for name in names}
    made[names[1]] = made[names[1]][:2]
    ids = torch.stack([RANDOM_IDS[:40], RANDOM_IDS[20:60]])
    found = step_losses(model, ids, made, Progress())
    assert {name: len(losses) for name, losses in found.items()} == {names[0]: 2, names[1]: 1}

    def loss(first: int, second: int) -> float:
        twin = compressed(model, [])
        twin.set_submodule(names[0], made[names[0]][first])
        twin.set_submodule(names[1], made[names[1]][second])
        logs = [logits(twin, text).log_softmax(-1) for text in ids]
        told = [-log[place, text[place + 1]] for log, text in zip(logs, ids, strict=True) for place in range(39)]
        return float(torch.stack(told).mean())

    assert found[names[0]] == pytest.approx([loss(1, 0), loss(2, 1)], abs=1e-5)
    assert found[names[1]] == pytest.approx([loss(0, 1)], abs=1e-5)


# --- BitStack


def test_a_block_is_signs_times_magnitudes_of_low_rank() -> None:
    weight = drawn(5, 11)
    up, down = drawn(5, 2, seed=1), drawn(2, 11, seed=2)
    block = BitBlock.of(weight >= 0, up, down)
    rows = block.rows(1, 4, torch.float32)
    for o, i in itertools.product(range(3), range(11)):
        magnitude = sum(float(up.half()[o + 1, r]) * float(down.half()[r, i]) for r in range(2))
        assert float(rows[o, i]) == pytest.approx(magnitude if weight[o + 1, i] >= 0 else -magnitude, abs=1e-5)
    assert tensor_bytes(block) == bit_block_nbytes(5, 11, 2)


@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (7, 9)])
def test_one_block_of_full_rank_is_the_weight(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    weight[2, 3] = 0.0  # a zero has a sign, too
    blocks, errors = decompose(weight, torch.ones(shape[1]), min(shape), 1)
    torch.testing.assert_close(BitBlocksLinear(blocks).dequantised(), weight, rtol=0, atol=1e-2)
    assert errors[0] < 1e-6


def test_each_block_is_made_of_what_those_before_it_left() -> None:
    weight, scale = drawn(20, 30), drawn(30, seed=1).abs() + 0.1
    blocks, errors = decompose(weight, scale, 2, 4)
    left = (weight * scale).double()
    for block, error in zip(blocks, errors, strict=True):
        assert torch.equal(block.rows(0, 20, torch.float32) > 0, left > 0) or float(block.up.min()) < 0
        u, s, v = torch.linalg.svd(left.abs())  # the paper's own, whole
        closest = (u[:, :2] * s[:2]) @ v[:2]
        want = left - torch.where(left >= 0, 1.0, -1.0) * closest
        left = left - block.rows(0, 20, torch.float32).double() * scale
        assert float(left.norm()) == pytest.approx(float(want.norm()), rel=1e-3)
        assert error == pytest.approx(float(left.square().sum() / (weight * scale).square().sum()), rel=1e-4)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 3


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (64, 8)])
def test_leading_singular_vectors_are_nearly_those_of_a_whole_svd(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape).abs()
    up, down = leading(matrix, 4)
    assert up.shape == (shape[0], 4) and down.shape == (4, shape[1])
    best = torch.linalg.svdvals(matrix)[4:].square().sum().sqrt()
    assert float((matrix - up @ down).norm()) == pytest.approx(float(best), rel=5e-3)


def test_columns_whose_inputs_are_large_come_out_closer() -> None:
    weight, square = drawn(32, 32), torch.ones(32)
    square[:8] = 1e4
    plain, _ = decompose(weight, torch.ones(32), 2, 3)
    aware, _ = decompose(weight, scales(square), 2, 3)
    lost = [(BitBlocksLinear(blocks).dequantised() - weight)[:, :8].norm() for blocks in (plain, aware)]
    assert float(lost[1]) < 0.7 * float(lost[0])


def test_inputs_that_were_never_seen_still_count() -> None:
    assert bool((scales(torch.tensor([0.0, 4.0, 0.0])) > 0).all())
    assert torch.equal(scales(torch.zeros(3)), torch.ones(3))  # an expert that no token chose


def test_a_smaller_stack_lies_inside_every_larger_one_and_nothing_is_cut_again() -> None:
    model = tiny("llama")
    study, loaded, before = studied(model, tokens=32), [], -1.0
    for budget in (0.9, 0.2, 0.35, 0.5):
        twin = with_study(model, BitStack(budget=budget), study)
        loaded.append((budget, {name: m for name, m in twin.named_modules() if isinstance(m, BitBlocksLinear)}))
    loaded.sort(key=lambda item: item[0])
    for (_, small), (_, large) in itertools.pairwise(loaded):
        for name, layer in small.items():
            other = large[name]
            assert layer.count <= other.count
            for ours, theirs in zip(layer.blocks, other.blocks, strict=False):
                assert all(a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True))
    counts = [sum(layer.count for layer in layers.values()) for _, layers in loaded]
    assert counts == sorted(set(counts)) and before < counts[0]


def test_more_bytes_never_lose_more() -> None:
    model = tiny("llama")
    study = studied(model, tokens=32)
    errors = []
    for budget in (0.15, 0.3, 0.45, 0.6, 0.75, 1.0):
        twin, lost = with_study(model, BitStack(budget=budget), study), 0.0
        for block, inputs in study.inputs(hessians=True):
            assert block
            for name, stats in inputs.items():
                weight, made = model.get_submodule(name).weight.detach(), twin.get_submodule(name)
                small = made.dequantised() if isinstance(made, BitBlocksLinear) else made.weight.detach()
                change, scale = (small - weight) * stats.square.sqrt(), weight * stats.square.sqrt()
                lost += float(change.square().sum() / scale.square().sum())
        errors.append(lost)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 and torch.equal(logits(twin, RANDOM_IDS), logits(model, RANDOM_IDS))


@pytest.mark.parametrize("order", ["error", "perplexity"])
def test_layers_never_differ_by_more_than_a_block_but_for_those_that_have_all(order: str) -> None:
    model = tiny("llama")
    study = studied(model, tokens=32)
    method = BitStack(order=order, texts=1)
    whole = {name: method._count(linear) for name, linear in method.survey(model).linears.items()}
    for budget in (0.25, 0.4, 0.55):
        twin = with_study(model, BitStack(budget=budget, order=order, texts=1), study)
        counts = {name: m.count for name, m in twin.named_modules() if isinstance(m, BitBlocksLinear)}
        growing = [count for name, count in counts.items() if count < whole[name]]
        assert max(counts.values()) - min(growing, default=max(counts.values())) <= 1


def test_the_published_rank_and_one_by_the_layers_size() -> None:
    large, small = nn.Linear(4096, 4096, bias=False, device="meta"), nn.Linear(576, 576, bias=False, device="meta")
    assert BitStack().nbytes(large) == BitStack(rank=16).nbytes(large)
    assert BitStack(blocks=1).nbytes(small) == bit_block_nbytes(576, 576, 2)
    assert BitStack(blocks=1, rank=16).nbytes(small) == bit_block_nbytes(576, 576, 16)


def test_any_number_of_bytes_is_met_to_within_a_block() -> None:
    model = tiny("llama")
    study = studied(model, tokens=32)
    for size in ("60KiB", "75KiB", "90KiB"):
        method = BitStack(budget=size)
        twin = with_study(model, method, study)
        layers = [m for m in twin.modules() if isinstance(m, BitBlocksLinear)]
        limit = int(size.removesuffix("KiB")) * 1024
        held = sum(layer.nbytes for layer in layers)
        largest = max(layer.nbytes // layer.count for layer in layers)
        assert limit - largest < held <= limit


def test_less_than_a_block_of_each_layer_is_refused() -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(tiny("llama"), [BitStack(budget=0.05)])
    twin = compressed(tiny("llama"), [BitStack(budget=refusal.value.smallest)])
    assert all(m.count == 1 for m in twin.modules() if isinstance(m, BitBlocksLinear))
    with pytest.raises(BadBudget, match="no budget in tokens"):
        compressed(tiny("llama"), [BitStack(budget="40 tokens")])


def test_biases_and_experts_are_kept() -> None:
    model = tiny("qwen2")
    twin = compressed(model, [BitStack(budget=0.6)])
    q = "model.layers.0.self_attn.q_proj"
    assert twin.get_submodule(q).bias is model.get_submodule(q).bias
    left = BitStack().left_alone(tiny("mixtral"))
    assert any("fused experts" in reason for reason in left.values())


# --- Double Rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_code_goes_to_the_nearest_of_the_levels_that_are_left(bits: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    fine = Grid(torch.ones(1, 1), torch.full((1, 1), 100.0), 8, 256)
    for symmetric in (False, True):
        grid = coarser(fine, bits, symmetric=symmetric)
        levels = [float((level - grid.zero) * grid.scale) for level in range(2**bits)]
        found = rounded(codes, bits, symmetric=symmetric)
        for code in range(256):
            nearest = min(range(2**bits), key=lambda level: (abs(code - 100 - levels[level]), -level))  # a half goes up
            assert int(found[0, code]) == nearest
        far = (grid.dequantised(found) - fine.dequantised(codes)).abs().max()
        step = 2 ** (8 - bits)
        assert float(far) == ((step - 1) / 2 if not symmetric else max(step - 1, 0))  # symmetric: the top is cut off


def test_fewer_bits_are_the_leading_ones_of_more() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for many, few in itertools.pairwise((8, 6, 5, 4, 3, 2)):
        assert torch.equal(rounded(codes, few), rounded(codes, many) >> (many - few))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_come_out_as_close_as_by_rounding_to_nearest_at_once(bits: int) -> None:
    weight = drawn(64, 128)
    grid = fit(weight, 8, 64)
    twice = narrower(grid.codes(weight), grid, bits).dequantised()
    once = fit(weight, bits, 64).nearest(weight)
    assert float((twice - weight).norm()) < 1.02 * float((once - weight).norm())


def test_every_width_is_made_of_the_eight_bit_codes_alone() -> None:
    model = tiny("llama")
    study = studied(model, tokens=32)
    wide = with_study(model, DoubleRounding(symmetric=False), study)
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter.data, float("nan"))  # whoever looks at the weights again sees these
    for bits in (6, 4, 3, 2, 5, 8):
        twin = with_study(model, DoubleRounding(bits=bits, symmetric=False), study)
        for name, layer in wide.named_modules():
            if isinstance(layer, PackedLinear):
                narrow = twin.get_submodule(name)
                assert isinstance(narrow, PackedLinear) and narrow.bits == bits
                assert torch.equal(narrow.codes(), rounded(layer.codes(), bits))
                step, wide_step = narrow.scale.float().amax(), layer.scale.float().amax()
                far = (narrow.dequantised() - layer.dequantised()).abs().max()
                assert float(far) <= float(step) / 2
                assert float(step) == pytest.approx(float(wide_step) * 2 ** (8 - bits))


def test_eight_bits_are_those_of_rounding_to_nearest() -> None:
    model = tiny("llama")
    ours, rtn = compressed(model, [DoubleRounding(symmetric=False)]), compressed(model, [RTN(bits=8)])
    assert torch.equal(logits(ours, RANDOM_IDS), logits(rtn, RANDOM_IDS))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_symmetric_zeros_stay_zeros_at_every_width(bits: int) -> None:
    model = tiny("llama")
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().clone()
    weight[:, ::3] = 0.0
    linear.weight = nn.Parameter(weight)
    twin = compressed(model, [DoubleRounding(bits=bits, symmetric=True)])
    layer = twin.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, PackedLinear) and layer.zero is None
    assert not bool(layer.dequantised()[:, ::3].any())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bytes_are_those_of_the_width_that_is_loaded(bits: int, symmetric: bool) -> None:
    model = tiny("llama")
    method = DoubleRounding(bits=bits, symmetric=symmetric)
    zero = 0 if symmetric else 1 if bits == 8 else 2
    twin = compressed(model, [method])
    for layer in twin.modules():
        if isinstance(layer, PackedLinear):
            assert layer.nbytes == packed_nbytes(layer.out_features, layer.in_features, bits, 64, zero_bytes=zero)
    assert method.survey(model).nbytes == sum(m.nbytes for m in twin.modules() if isinstance(m, PackedLinear))


def test_a_budget_narrows_layers_one_by_one_and_never_beyond_the_widest() -> None:
    model = tiny("llama")
    study = studied(model, tokens=32)
    chosen = []
    for budget in (0.2, 0.25, 0.3, 0.4, 0.55):
        twin = with_study(model, DoubleRounding(budget=budget, bits=6), study)
        chosen.append({name: m.bits for name, m in twin.named_modules() if isinstance(m, PackedLinear)})
    assert all(max(widths.values()) <= 6 for widths in chosen)
    assert any(len(set(widths.values())) > 1 for widths in chosen)  # mixed precision
    for small, large in itertools.pairwise(chosen):
        assert all(small[name] <= large[name] for name in small)
    assert set(chosen[-1].values()) == {6}


def test_mixed_widths_lose_less_than_one_width_of_the_same_bytes() -> None:
    model = tiny("llama")
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.endswith("o_proj"):
            weight = linear.weight.detach().clone()
            weight[:, 0] *= 30  # outliers: three bits are far too few here
            linear.weight = nn.Parameter(weight)
    study = studied(model, tokens=32)
    uniform = DoubleRounding(bits=3, symmetric=False)
    share = uniform.survey(model).nbytes / uniform.survey(model).full_nbytes
    twins = [with_study(model, method, study) for method in (uniform, DoubleRounding(budget=share, symmetric=False))]

    def lost(twin: PreTrainedModel) -> float:
        total = 0.0
        for _, inputs in study.inputs(hessians=True):
            for name, stats in inputs.items():
                weight, layer = model.get_submodule(name).weight.detach(), twin.get_submodule(name)
                assert isinstance(layer, PackedLinear)
                error = stats.output_error(layer.dequantised() - weight).sum()
                total += float(error / stats.output_error(weight).sum())
        return total

    assert lost(twins[1]) < lost(twins[0])


def test_a_session_cuts_and_rounds_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(RANDOM_IDS)
    session.calibrate("sampled", samples=4, tokens=32)
    for one, other in ((DoubleRounding(bits=8), DoubleRounding(bits=3)), (BitStack(budget=0.6), BitStack(budget=0.2))):
        large = session.run(one, question=RANDOM_IDS[:3], max_new_tokens=2)
        with monkeypatch.context() as patch:
            for method in (DoubleRounding, BitStack):
                for name in ("_master", "_stack"):
                    patch.setattr(method, name, None, raising=False)  # whoever makes it again fails
            small = session.run(other, question=RANDOM_IDS[:3], max_new_tokens=2)
        assert small.memory.peaks["weights"] < large.memory.peaks["weights"]
