"""Weights looked up several at a time, and columns that make up for those before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.weights.support import correlated, drawn, seeded, stats_of
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.layers import Parts, VectorLinear, vector_nbytes
from workbench.weights.methods.quantise.vptq import VPTQ
from workbench.weights.solvers.codebook import codebook, nearest
from workbench.weights.solvers.compensation import compensated
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import fit
from workbench.weights.solvers.vector_quantisation import column_costs, vectors

# --- Columns that make up for those before them


@pytest.mark.parametrize("block", [1, 4, 24])
def test_later_columns_take_what_is_best_given_those_that_are_fixed(block: int) -> None:
    weight, x = drawn(3, 24, seed=4), correlated(200, 24)
    hessian = (x.T @ x / 200).double()
    seen = torch.empty(3, 24)

    def prepare(first: int, part: Tensor) -> Callable[[Tensor, int], Tensor]:
        def replace(column: Tensor, number: int) -> Tensor:
            seen[:, number] = column
            return column.round()

        return replace

    made = compensated(weight, inverse_factor(hessian.float(), 1e-7), prepare, block)
    # With the first j columns changed by D, the change of the others that costs least is -D H_fr / H_rr.
    for j in range(1, 24):
        fixed = (made[:, :j] - weight[:, :j]).double()
        best = -fixed @ hessian[:j, j:] @ torch.linalg.inv(hessian[j:, j:])
        torch.testing.assert_close(seen[:, j], weight[:, j] + best[:, 0].float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(made, made.round())


def test_on_a_grid_it_is_gptq() -> None:
    weight, x = drawn(6, 40, seed=5), correlated(200, 40)
    moment, grid = x.T @ x / 200, fit(weight, 3, 40, symmetric=True)
    want = grid.dequantised(gptq(weight, moment, lambda part, number: grid, 40).codes)
    got = compensated(
        weight, inverse_factor(moment, 0.01), lambda first, part: lambda c, n: grid.nearest(c[:, None])[:, 0], 16
    )
    assert float((got - want).abs().gt(1e-5).float().mean()) < 0.02  # but for ties that rounding errors decide


# --- Codebooks


def _cost(points: Tensor, weights: Tensor, book: Tensor) -> float:
    total = 0.0
    for p, w in zip(points, weights, strict=True):
        total += min(float((w * (p - entry).square()).sum()) for entry in book)
    return total


def test_nearest_counts_the_weights_of_each_number() -> None:
    points, weights, book = drawn(40, 3, seed=6), torch.rand(40, 3, generator=seeded(12)), drawn(7, 3, seed=7)
    found, distance = nearest(weights * points, weights, book)
    for n in range(40):
        costs = [float((weights[n] * (points[n] - entry).square()).sum()) for entry in book]
        assert int(found[n]) == costs.index(min(costs))
        own = float((weights[n] * points[n].square()).sum())
        assert float(distance[n]) + own == pytest.approx(min(costs), abs=1e-5)


def test_entries_stand_for_what_matters() -> None:
    points, weights = drawn(300, 2, seed=1), torch.rand(300, 2, generator=seeded(101))
    book = codebook(points, weights, 16, rounds=20)
    assert _cost(points, weights, book) < 0.5 * _cost(points, weights, points[:16])
    assert _cost(points, weights, book) < 0.7 * _cost(points, weights, codebook(points, weights, 8, rounds=20))
    weights[:250] = 1e-6  # nobody asks for these
    few = codebook(points, weights, 16, rounds=20)
    assert _cost(points[250:], weights[250:], few) < 0.6 * _cost(points[250:], weights[250:], book)


def test_as_many_entries_as_points_are_the_points() -> None:
    points = drawn(12, 4, seed=1)
    book = codebook(points, torch.ones(12, 4), 12, rounds=30)
    assert _cost(points, torch.ones(12, 4), book) < 1e-6


def test_the_same_seed_gives_the_same_entries_and_leaves_the_random_state_alone() -> None:
    points, state = drawn(5000, 4, seed=9), torch.get_rng_state()
    one, two = (codebook(points, torch.ones(5000, 4), 8, seed=3) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, codebook(points, torch.ones(5000, 4), 8, seed=4))


# --- The layer


@pytest.mark.parametrize(
    ("outputs", "length", "bits"),
    [(12, 4, [4]), (10, 4, [6, 4]), (7, 2, [8]), (9, 3, [10, 8]), (8, 8, [12]), (5, 2, [14, 4]), (8, 8, [16, 8])],
)
def test_vector_layers_are_sums_of_entries(outputs: int, length: int, bits: list[int]) -> None:
    inputs, vectors = 11, -(-outputs // length)
    indices = [torch.randint(0, 2**wide, (vectors, inputs), generator=seeded(14)) for wide in bits]
    books = [drawn(2**wide, length, seed=15).half().float() for wide in bits]
    scale, bias = (
        (torch.rand(outputs, generator=seeded(16)) + 0.5).half().float(),
        nn.Parameter(drawn(outputs, seed=10)),
    )
    layer = VectorLinear(indices, books, scale, bits, bias)
    want = torch.empty(outputs, inputs)
    for o in range(outputs):
        for i in range(inputs):
            entry = sum(float(b[int(x[o // length, i])][o % length]) for b, x in zip(books, indices, strict=True))
            want[o, i] = entry * float(scale[o])
    torch.testing.assert_close(layer.dequantised(), want)
    torch.testing.assert_close(layer.rows(1, outputs - 1, torch.float32), want[1:-1])
    x = drawn(3, inputs, seed=2)
    torch.testing.assert_close(layer(x), x @ want.T + bias, rtol=1e-4, atol=1e-4)
    assert tensor_bytes(layer.buffers()) == vector_nbytes(outputs, inputs, length, bits, [2**wide for wide in bits])


# --- VPTQ


def _compress(method: VPTQ, linear: nn.Linear, seen: InputStats) -> tuple[Tensor, float]:
    layer = method.compress(linear, seen)
    assert tensor_bytes(layer.buffers()) == method.nbytes(linear)
    made = layer.dequantised()
    return made, float(seen.output_error(made - linear.weight.detach()).sum())


@pytest.mark.parametrize("outputs", [48, 46])
def test_what_is_held_is_what_was_chosen(outputs: int) -> None:
    linear, seen = nn.Linear(40, outputs), stats_of(correlated(300, 40))
    method = VPTQ(index_bits=6, residual_bits=4, outliers=0.1)
    made, error = _compress(method, linear, seen)
    layer = method.compress(linear, seen)
    assert isinstance(layer, Parts)
    taken = layer.chosen(1)
    assert taken is not None and taken.numel() == 4
    assert set(taken.tolist()) == set(seen.square.topk(4).indices.tolist())
    x = drawn(3, 40, seed=3)
    torch.testing.assert_close(layer(x), x @ made.T + linear.bias, rtol=1e-4, atol=1e-4)
    whole = float(seen.output_error(linear.weight.detach()).sum())
    assert error < 0.2 * whole


def test_making_up_for_errors_a_second_book_and_outliers_each_lose_less() -> None:
    model = tiny("llama", layers=2)
    study = WeightStudy(model, calibration=Calibration(SAMPLED, samples=8, tokens=64))
    small: dict[str, Any] = {"index_bits": 6, "outliers": 0.0, "rounds": 6}
    totals = dict.fromkeys(("plain", "ours", "residual", "outliers"), 0.0)
    for _, inputs in study.inputs(hessians=True):
        for name, seen in inputs.items():
            linear = model.get_submodule(name)
            eye = torch.diag(seen.square)  # nothing is shared with other columns: each takes its nearest entry
            alone = InputStats(seen.tokens, seen.mean, seen.absmean, seen.absmax, seen.square, eye)
            change = VPTQ(**small).compress(linear, alone).dequantised() - linear.weight.detach()
            totals["plain"] += float(seen.output_error(change).sum())
            totals["ours"] += _compress(VPTQ(**small), linear, seen)[1]
            totals["residual"] += _compress(VPTQ(**small, residual_bits=4), linear, seen)[1]
            totals["outliers"] += _compress(VPTQ(**{**small, "outliers": 0.1}), linear, seen)[1]
    assert totals["ours"] < 0.9 * totals["plain"]
    assert totals["residual"] < 0.6 * totals["ours"]
    assert totals["outliers"] < totals["ours"]


def test_the_first_column_is_that_with_the_largest_inputs_and_takes_its_nearest_entries() -> None:
    weight, seen = drawn(12, 9), stats_of(correlated(300, 9))
    plain, permuted = (
        vectors(weight, seen.hessian, torch.empty(0, dtype=torch.long), 3, [8], scaled=False, permuted=first)
        for first in (False, True)
    )
    for made, column in ((plain, 0), (permuted, int(seen.square.argmax()))):
        for p in range(4):
            own = weight[3 * p : 3 * p + 3, column]
            distances = [float((own - entry).square().sum()) for entry in made.books[0]]
            assert int(made.indices[0][p, column]) == distances.index(min(distances))
    assert not torch.equal(plain.indices[0], permuted.indices[0])


def test_the_second_book_is_of_what_the_first_pass_left() -> None:
    weight, seen = drawn(24, 16), stats_of(correlated(300, 16))
    apart, hessian = torch.empty(0, dtype=torch.long), seen.hessian
    one = vectors(weight, hessian, apart, 2, [8], scaled=False)
    order = column_costs(hessian).argsort(descending=True)
    left, at = [], iter(order.tolist())

    def replace(column: Tensor, _: int) -> Tensor:
        made = one.books[0][one.indices[0][:, next(at)]].flatten()
        left.append(column - made)
        return made

    compensated(weight[:, order], inverse_factor(hessian[order][:, order], 0.01), lambda *_: replace, 128)
    points = torch.stack(left)[order.argsort()].unflatten(1, (-1, 2)).flatten(0, 1)
    weights = column_costs(hessian).repeat_interleave(12)[:, None].expand(-1, 2)
    want = codebook(points, weights, 8, seed=1)
    two = vectors(weight, hessian, apart, 2, [8, 8], scaled=False)
    assert torch.equal(two.books[0], one.books[0])
    torch.testing.assert_close(two.books[1], want, rtol=1e-2, atol=1e-3)


def test_vectors_are_as_long_as_their_codebook_leaves_room_for() -> None:
    def layer(outputs: int, inputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, device="meta")

    for side, length in ((256, 4), (576, 5), (4096, 7), (6000, 8)):
        book = 2 * length * 4**length
        vectors_ = -(-side // length)
        assert VPTQ().nbytes(layer(side, side)) == vectors_ * -(-side * 2 * length // 8) + book + 2 * side
        assert book <= side * side / 32 < 2 * (length + 1) * 4 ** (length + 1) or length == 8
    assert VPTQ.preset("script")["index_bits"] == 16
    shape = 4096, 4096
    assert 8 * VPTQ(**VPTQ.preset("two bits")).nbytes(layer(*shape)) / 4096**2 == pytest.approx(2.5, abs=0.01)


def test_books_never_have_more_entries_than_there_are_vectors() -> None:
    linear, seen = nn.Linear(8, 8, bias=False), stats_of(drawn(100, 8, seed=11))
    made, _ = _compress(VPTQ(index_bits=12, outliers=0.0, damping=1e-3), linear, seen)
    torch.testing.assert_close(made, linear.weight.detach(), rtol=1e-2, atol=1e-3)  # each vector has its own


def test_a_layer_that_calibration_never_reached_is_compressed_all_the_same() -> None:
    linear = nn.Linear(16, 8, bias=False)
    made, _ = _compress(VPTQ(index_bits=8, outliers=0.0), linear, stats_of(torch.zeros(1, 16)))
    assert made.isfinite().all() and float((made - linear.weight.detach()).norm()) < 0.5 * float(linear.weight.norm())
