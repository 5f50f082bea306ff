"""Softmax weights at few levels: AdaLog's powers of a base and DopQ-ViT's tangent, against loops from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from tests.attention.support import sharp
from workbench.attention import AdaLog, DopQ
from workbench.attention.base import PassContext, visible_entries
from workbench.attention.methods.adalog import exponents, log_levels, log_rounded
from workbench.attention.methods.dopq import Tangent, pieces, tan_levels, tan_rounded
from workbench.attention.quantised_softmax import QuantisedSoftmax, least
from workbench.core.causal_attention import causal_attention
from workbench.errors import BadParameter
from workbench.kv.stores import Dequantised
from workbench.measure.memory import LiveBytes
from workbench.models import tiny
from workbench.trace import LayerTrace
from workbench_kernels import Scoring

METHODS = (AdaLog, DopQ)
BITS = (3, 4, 6, 8)


def weights_of(seed: int, rows: int = 6, columns: int = 40) -> Tensor:
    return (3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).softmax(-1)


# --- AdaLog


def by_logarithm(weight: float, q: int, bits: int) -> float:
    """The paper's quantiser and dequantiser of one weight, with integer fractions and shifts; past the levels: zero."""
    if weight == 0:
        return 0.0
    code = round(-math.log2(weight) * 37 / q)
    if code >= 2**bits - 1:
        return 0.0
    whole, part = divmod(code * q, 37)
    most = 2 * (2**bits - 1)  # the fraction 1 in the table
    return round(2 ** (-part / 37) * most) / most / 2**whole


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("q", [1, 10, 17])
def test_a_weight_becomes_a_power_of_the_base_as_the_paper_has_it(bits: int, q: int) -> None:
    weights = torch.cat([weights_of(1).flatten(), torch.tensor([0.0, 1.0, 1e-30, 0.5, 0.999])])
    want = torch.tensor([by_logarithm(float(weight), q, bits) for weight in weights])
    torch.testing.assert_close(log_rounded(weights, q, bits), want, rtol=1e-6, atol=0)


def test_base_two_is_the_plain_logarithm() -> None:
    assert log_levels(37, 3).tolist() == [2.0**-k for k in range(7)] + [0.0]


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), part=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_error_of_a_weight_within_the_levels_is_less_than_half_a_step(bits: int, part: float, seed: int) -> None:
    q = exponents(bits)[int(part * (len(exponents(bits)) - 1))]
    levels, weights = log_levels(q, bits), weights_of(seed)
    assert len(levels) == 2**bits and levels[0] == 1 and levels[-1] == 0 and float(levels[-2]) > 0
    assert bool((levels.diff() <= 0).all())
    got = log_rounded(weights, q, bits)
    assert bool(torch.isin(got, levels).all())
    inside = weights > 2 ** (-(2**bits - 1.51) * q / 37)
    table = 1 / (2 ** (bits + 1) - 2)  # a fraction between 1/2 and 1 is rounded by half of this at most
    factor = (got / weights)[inside].log2().abs()
    assert bool((factor <= q / 74 + math.log2(1 + table) + 1e-5).all())
    assert bool((got[weights < 2 ** (-(2**bits - 1.49) * q / 37)] == 0).all())


# --- DopQ-ViT


def by_tangent(weight: float, piece: Tangent, bits: int) -> float:
    """The level nearest to a weight on the line of tan(slope * (w - centre)), by looking at all of them."""

    def line(place: float) -> float:
        return math.tan(piece.slope * (place - piece.centre))

    marks = [line(0) + (line(1) - line(0)) * k / (2**bits - 1) for k in range(2**bits)]
    nearest = min(marks, key=lambda mark: abs(mark - line(weight)))
    return piece.centre + math.atan(nearest) / piece.slope


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("place", [(0, 0), (0, 12), (2, 6), (2, 20), (3, 10), (4, 23)])
def test_a_weight_goes_to_the_level_nearest_after_the_tangent(bits: int, place: tuple[int, int]) -> None:
    piece = pieces()[place[0]][place[1]]
    weights = weights_of(2).flatten()
    want = torch.tensor([by_tangent(float(weight), piece, bits) for weight in weights])
    got, levels = tan_rounded(weights, piece, bits), tan_levels(piece, bits)
    exact = (got - want).abs() < 1e-6
    # Where float32 puts a weight on the other side of a middle, it goes to the neighbour, about as near on the line.
    assert float(exact.float().mean()) > 0.99
    assert bool(((torch.searchsorted(levels, got) - torch.searchsorted(levels, want + 1e-7)).abs() <= 1).all())


@pytest.mark.parametrize("bits", BITS)
def test_levels_of_a_tangent_rise_from_zero_to_one_and_crowd_at_its_poles(bits: int) -> None:
    for family in pieces():
        widest = []
        for piece in family:
            levels = tan_levels(piece, bits)
            assert len(levels) == 2**bits and levels[0] == 0 and levels[-1] == 1
            assert bool((levels.diff() > 0).all())
            widest.append(float(levels.diff().max()))
            if piece.centre > 0:
                assert levels.diff()[0] <= levels.diff().max()
            if piece.centre < 1:
                assert levels.diff()[-1] <= levels.diff().max()
        assert widest == sorted(widest)  # the nearer to a pole, the wider the gap elsewhere
    near_one, both, near_zero = (tan_levels(pieces()[at][8], bits).diff() for at in (0, 2, 4))
    assert near_one[-1] < 0.3 * near_one[0] and near_zero[0] < 0.3 * near_zero[-1]
    torch.testing.assert_close(both, both.flip(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(near_one, near_zero.flip(0), rtol=1e-3, atol=1e-6)


def test_zero_stays_zero_and_one_stays_one() -> None:
    ends = torch.tensor([0.0, 1.0])
    for bits in BITS:
        assert all(torch.equal(tan_rounded(ends, piece, bits), ends) for family in pieces() for piece in family)
        assert all(torch.equal(log_rounded(ends, q, bits), ends) for q in exponents(bits))


# --- The search


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=5), at=st.floats(0, 1), family=st.integers(0, 4),
    width=st.floats(0.1, 10),
)  # fmt: skip
def test_the_search_finds_the_bottom_of_any_valley_and_looks_at_few(
    lengths: list[int], at: float, family: int, width: float
) -> None:
    family %= len(lengths)
    bottom = at * (lengths[family] - 1)
    tried: list[tuple[int, int]] = []

    def cost(candidate: tuple[int, int]) -> float:
        tried.append(candidate)
        away = abs(candidate[1] - bottom)
        return away * width if candidate[0] == family else 1000 * width + away

    found = least([[(number, place) for place in range(length)] for number, length in enumerate(lengths)], cost)
    assert found[0] == family and abs(found[1] - bottom) <= 0.5 + 1e-9
    assert len(tried) == len(set(tried)) <= 16 * len(lengths) + 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [3, 4])
def test_the_candidate_found_changes_the_output_about_as_little_as_any(
    method: type[QuantisedSoftmax], bits: int
) -> None:
    made = method(bits=bits)
    weights, values = weights_of(3, rows=40, columns=64)[None], torch.randn(1, 64, 5)

    def change(candidate: object) -> float:
        total = 0.0
        for row in range(40):
            rounded = made.rounded(weights[0, row], candidate)
            total += float(((rounded - weights[0, row]) @ values[0]).square().sum())
        return total

    best = min(change(candidate) for family in made.candidates() for candidate in family)
    assert change(made.choose([weights.clone()], [values])) <= 1.1 * best


@pytest.mark.parametrize("method", METHODS)
def test_what_is_chosen_follows_the_weights(method: type[QuantisedSoftmax]) -> None:
    flat = torch.full((1, 8, 512), 1 / 512) * torch.linspace(0.5, 1.5, 512)
    sharp = (20 * torch.randn(1, 8, 512, generator=torch.Generator().manual_seed(0))).softmax(-1)
    values = torch.randn(1, 512, 4, generator=torch.Generator().manual_seed(1))
    made = method(bits=4)
    assert made.choose([flat.clone()], [values]) != made.choose([sharp.clone()], [values])


# --- Attention


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_mixes_values_with_rounded_weights(
    method: type[QuantisedSoftmax], window: int | None, softcap: float | None
) -> None:
    query, key, value = sharp(41)
    made, context = method(bits=4), PassContext(1, 41)
    got = made.attend(query, key, value, Scoring(0.4, window, softcap), context)
    (chosen,) = context.state.values()
    want = torch.zeros_like(got)
    for h in range(4):
        for i in range(41):
            first = 0 if window is None else max(0, i - window + 1)
            scores = key[h // 2, first : i + 1] @ query[h, i] * 0.4
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            want[h, i] = made.rounded(scores.softmax(0), chosen) @ value[h // 2, first : i + 1]
    away = (got - want).abs().amax(dim=-1)  # a weight in the middle between two levels may go either way
    assert float((away < 1e-4).float().mean()) > 0.97
    assert context.computed == [4 * visible_entries(41, window)]


@pytest.mark.parametrize("method", METHODS)
def test_outputs_are_the_nearer_the_more_bits(method: type[QuantisedSoftmax]) -> None:
    query, key, value = sharp(120)
    exact = causal_attention(query, key, value, Scoring(0.4))
    errors = []
    for bits in BITS:
        out = method(bits=bits).attend(query, key, value, Scoring(0.4), PassContext(1, 120))
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.2 and errors[3] < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_decoding_goes_on_at_the_levels_of_the_prompt(method: type[QuantisedSoftmax]) -> None:
    query, key, value = sharp(30)
    made, context, after = method(), PassContext(1, 30), PassContext(1, 30)
    whole = made.attend(query, key, value, Scoring(0.4), context)
    made.begin(LayerTrace(0, key, value, query, torch.device("cpu"), Scoring(0.4)), after)
    assert after.state == context.state and after.state_nbytes == 0 and after.computed == [0]
    held = Dequantised(key, value, torch.arange(30)[None], None)
    seen = (torch.arange(30) <= torch.arange(27, 30)[:, None]).expand(2, 3, 30)
    got = made.decode(query[:, 27:], held, seen, Scoring(0.4), after)
    torch.testing.assert_close(got, whole[:, 27:], rtol=1e-4, atol=1e-5)
    assert after.state == context.state and after.computed == [4 * (28 + 29 + 30)]
    alone = PassContext(1, 0)  # nothing was recorded: what is decoded first is looked at instead
    assert bool(made.decode(query[:, 27:], held, seen, Scoring(0.4), alone).isfinite().all())
    assert list(alone.state) == list(context.state)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_a_token_or_two_is_exact(method: type[QuantisedSoftmax]) -> None:
    query, key, value = sharp(1)
    out = method().attend(query, key, value, Scoring(0.4), PassContext(1, 1))
    torch.testing.assert_close(out, value.repeat_interleave(2, dim=0))
    query, key, value = sharp(2)
    out = method(bits=8).attend(query, key, value, Scoring(0.4), PassContext(1, 2))
    torch.testing.assert_close(out, causal_attention(query, key, value, Scoring(0.4)), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_a_long_prompt_never_exist_as_a_whole(method: type[QuantisedSoftmax]) -> None:
    query, key, value = sharp(2048, heads=2, kv_heads=1)
    with LiveBytes() as live:
        method().attend(query, key, value, Scoring(0.4), PassContext(1, 2048))
    assert live.peak < 2 * 2048 * 2048 * 4 / 2


@pytest.mark.parametrize("method", METHODS)
def test_all_scores_are_computed_so_there_is_no_budget(method: type[QuantisedSoftmax]) -> None:
    with pytest.raises(BadParameter, match="takes no budget"):
        method(budget=0.5)
    session = wb.Session((tiny("llama"), None))
    session.read(torch.arange(3, 63))
    run = session.run([wb.kv.SnapKV(budget=0.5, window=8), method()], question=torch.arange(5), max_new_tokens=4)
    assert run.to_dict(quality=False)["score_share"] == 1 and math.isfinite(run.quality.kl)
