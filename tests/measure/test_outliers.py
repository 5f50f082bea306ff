"""Outliers: statistics against their formulas, and planted outliers found."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import BadParameter, InputError
from workbench.measure import (
    LiveBytes,
    channel_stats,
    column_sums,
    layer_stats,
    massive_activations,
    queries_per_key,
    sinks,
)
from workbench_kernels import Scoring


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
def test_channel_statistics_equal_their_formulas(k, n, d, seed):
    x = torch.randn(k, n, d, generator=torch.Generator().manual_seed(seed)).exp()
    stats = channel_stats(x)
    for head in range(k):
        squares = sum(v * v for v in x[head].flatten().double().tolist())
        for channel in range(d):
            values = x[head, :, channel].double().tolist()
            mean = sum(values) / n
            second = sum((v - mean) ** 2 for v in values) / n
            fourth = sum((v - mean) ** 4 for v in values) / n
            assert stats.absmax[head, channel].item() == pytest.approx(max(abs(v) for v in values))
            assert stats.kurtosis[head, channel].item() == pytest.approx(fourth / second**2, rel=1e-5)
            energy = sum(v * v for v in values) / squares
            assert stats.energy[head, channel].item() == pytest.approx(energy, rel=1e-5)


def test_kurtosis_is_pearsons():
    normal = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(-1, 1, 10_001)[:, None]
    two_valued = torch.tensor([[-1.0], [1.0]]).repeat(50, 1)
    kurtosis = [channel_stats(x).kurtosis.item() for x in (normal, uniform, two_valued)]
    assert kurtosis == pytest.approx([3.0, 1.8, 1.0], abs=0.05)


def test_a_large_offset_does_not_spoil_the_kurtosis():
    x = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)).double()
    assert channel_stats(x + 1e6).kurtosis.item() == pytest.approx(channel_stats(x).kurtosis.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in float64 the mean of equal numbers is rounded
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_constant_channel_has_no_kurtosis(value, dtype):
    stats = channel_stats(torch.full((333, 2), value, dtype=dtype))
    assert stats.kurtosis.isnan().all()
    assert stats.energy.sum().item() == pytest.approx(1.0 if value else 0.0)


def test_statistics_of_a_large_weight_need_little_memory():
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()  # 32 MiB
    with LiveBytes() as live:
        whole = channel_stats(weight)
    assert live.peak < 160 * 2**20  # one float64 copy of it would be 128 MiB, and five are needed
    assert whole.absmax.shape == (4096,)
    torch.testing.assert_close(whole.absmax, weight.float().abs().amax(0))
    assert whole.energy.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_a_planted_channel_stands_out_in_its_layer_and_head():
    layers = {i: torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 7)}
    layers[7][1, :, 5] += 40.0
    frame = layer_stats(layers).to_frame()
    assert list(frame.columns) == ["layer", "head", "channel", "absmax", "kurtosis", "energy"]
    assert len(frame) == 2 * 2 * 8
    top = frame.loc[frame["absmax"].idxmax()]
    assert (top["layer"], top["head"], top["channel"]) == (7, 1, 5)
    assert top["energy"] > 0.9
    spread = frame.groupby(["layer", "head"])["energy"].sum()
    assert spread.to_list() == pytest.approx([1.0] * 4, abs=1e-5)


def test_layers_of_different_shape_share_one_table():
    frame = layer_stats({0: torch.rand(4, 8), 1: torch.rand(4, 3)}).to_frame()
    assert frame.groupby("layer").size().to_dict() == {0: 8, 1: 3}
    assert "head" not in frame


def test_massive_activations_are_found_where_they_were_planted():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    planted = {(0, 17): 2500.0, (5, 17): -900.0, (0, 40): 1200.0}
    for (token, channel), value in planted.items():
        x[token, channel] = value
    x[3, 3] = 150.0  # above the floor, but not far enough above the median
    found = massive_activations(x)
    assert [(a.token, a.channel, a.value) for a in found] == [(0, 17, 2500.0), (0, 40, 1200.0), (5, 17, -900.0)]
    assert found.limit == pytest.approx(1000 * x.abs().median().item())
    assert found.to_frame()["channel"].to_list() == [17, 40, 17]
    assert len(massive_activations(x, ratio=100.0)) == 4


def test_values_below_the_floor_are_not_massive_however_small_the_rest():
    x = torch.full((50, 4), 1e-3)
    x[2, 1] = 99.0
    assert len(massive_activations(x)) == 0
    assert [a[:2] for a in massive_activations(x, floor=50.0)] == [(2, 1)]


def test_sinks_are_the_tokens_that_all_later_ones_look_at():
    n, d = 128, 16
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, n, d, generator=generator), torch.randn(2, n, d, generator=generator)
    queries[0] += 2.0
    keys[0, 9] = 1.2  # query head 0 looks at token 9 of KV head 0
    received = column_sums(queries, keys, Scoring(d**-0.5))
    found = sinks(received)
    assert [(s.head, s.token) for s in found] == [(0, 9)]
    assert found.to_frame()["share"].item() == pytest.approx(received[0, 9].item() / (n - 9))
    assert len(sinks(received, threshold=0.999)) == 0


def test_the_last_tokens_are_not_sinks_for_looking_at_themselves():
    n = 64
    received = column_sums(torch.eye(n)[None] * 50, torch.eye(n)[None], Scoring(1.0))  # every token sees only itself
    assert received[0, -1].item() == pytest.approx(1.0, abs=1e-3)
    assert len(sinks(received)) == 0
    assert len(sinks(received, min_queries=1)) == 3  # the last three have at most three onlookers


def test_a_window_makes_shares_of_those_who_can_see():
    n, window = 200, 20
    queries, keys = torch.ones(1, n, 4), torch.zeros(1, n, 4)
    keys[0, 50] = 10.0
    received = column_sums(queries, keys, Scoring(1.0, window))
    counts = queries_per_key(n, n, window=window)
    assert counts.max() == window
    assert [(s.head, s.token) for s in sinks(received, queries_per_key=counts)] == [(0, 50)]
    assert len(sinks(received)) == 0


def test_a_short_prompt_still_shows_its_sink():
    received = torch.tensor([[5.0, 0.5, 0.25, 0.25]])
    assert [s.token for s in sinks(received)] == [0]
    assert not any(math.isnan(s.share) for s in sinks(received))


def test_impossible_requests_are_refused():
    with pytest.raises(InputError):
        channel_stats(torch.zeros(5))
    with pytest.raises(InputError):
        channel_stats(torch.zeros(0, 5))
    with pytest.raises(InputError):
        massive_activations(torch.zeros(2, 3, 4))
    with pytest.raises(BadParameter):
        massive_activations(torch.zeros(3, 4), ratio=0.0)
    with pytest.raises(BadParameter):
        sinks(torch.zeros(1, 4), threshold=1.5)
    with pytest.raises(InputError):
        sinks(torch.zeros(4))
