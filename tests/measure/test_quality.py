"""Quality measures against plain PyTorch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from workbench.errors import InputError
from workbench.measure import LiveBytes, compare_logits, first_divergence, output_error, quality


def some_logits(seed: int, t: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 4 * torch.randn(t, v, generator=generator)
    other = reference + torch.randn(t, v, generator=generator)
    return reference, other, torch.randint(v, (t,), generator=generator)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(2, 50), st.integers(0, 99), st.sampled_from([1, 3000, 2**26]))
def test_figures_equal_plain_torch(t, v, seed, chunk_bytes):
    reference, other, targets = some_logits(seed, t, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_CHUNK_BYTES", chunk_bytes)
        found = compare_logits(reference, other, targets)
    p, q = (log_softmax(x.double(), -1) for x in (reference, other))
    kl = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.tokens == t
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-9)
    assert found.kl >= 0
    assert found.top1_agreement == pytest.approx((reference.argmax(-1) == other.argmax(-1)).double().mean().item())
    nll_reference, nll = (cross_entropy(x.double(), targets).item() for x in (reference, other))
    assert found.nll_reference == pytest.approx(nll_reference)
    assert found.nll == pytest.approx(nll)
    assert found.nll_difference == pytest.approx(nll - nll_reference, abs=1e-9)
    assert found.perplexity == pytest.approx(math.exp(nll))
    assert found.perplexity_reference == pytest.approx(math.exp(nll_reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_logits_cost_nothing(dtype):
    reference, _, targets = some_logits(0, 20, 300)
    reference = reference.to(dtype)
    found = compare_logits(reference, reference.clone(), targets)
    assert (found.kl, found.kl_max, found.top1_agreement, found.nll_difference) == (0.0, 0.0, 1.0, 0.0)


def test_a_constant_added_to_all_logits_changes_nothing():
    reference, _, targets = some_logits(0, 20, 300)
    found = compare_logits(reference.double(), reference.double() + 1e4, targets)
    assert found.kl < 1e-12
    assert found.nll_difference == pytest.approx(0.0, abs=1e-9)


def test_small_divergences_are_not_lost_in_rounding():
    logits = torch.zeros(1, 1000, dtype=torch.float64)
    nudged = logits.clone()
    nudged[0, 0] = 1e-4
    # To second order the divergence is half the variance of the nudge under the reference.
    expected = 0.5 * 1e-8 * (1 / 1000) * (1 - 1 / 1000)
    assert compare_logits(logits, nudged, torch.tensor([0])).kl == pytest.approx(expected, rel=1e-3)


def test_forbidden_tokens_do_not_break_the_divergence():
    reference, other, _ = some_logits(0, 4, 10)
    reference[:, 3] = -torch.inf
    both = other.clone()
    both[:, 3] = -torch.inf
    targets = torch.zeros(4, dtype=torch.int64)
    assert math.isfinite(compare_logits(reference, other, targets).kl)
    assert math.isfinite(compare_logits(reference, both, targets).kl)
    assert compare_logits(other, both, targets).kl == math.inf


def test_memory_does_not_grow_with_the_number_of_tokens():
    reference, other, targets = some_logits(0, 512, 20_000)
    with LiveBytes() as live:
        compare_logits(reference, other, targets)
    assert live.peak < 100 * 2**20  # one float64 copy of both would be 164 MB, and more is needed


def test_inputs_are_left_as_they_were():
    reference, other, targets = some_logits(0, 5, 10)
    before = reference.double(), other.double()
    compare_logits(before[0], before[1], targets)
    assert torch.equal(before[0], reference.double()) and torch.equal(before[1], other.double())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([4], [5], 0), ([], [], None)],
)
def test_first_divergence(a, b, expected):
    assert first_divergence(a, b) == expected
    logits, targets = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    assert compare_logits(logits, logits, targets, reference_tokens=a, tokens=b).first_divergence == expected


def test_a_quality_is_ready_for_json():
    reference, other, targets = some_logits(0, 5, 10)
    found = compare_logits(reference, other, targets)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["perplexity"] == found.perplexity and data["kl"] == found.kl and data["first_divergence"] is None


def test_output_error_is_relative_and_per_head():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 7, 5, generator=generator)
    other = reference.clone()
    other[1] *= 1.25
    other[2] = 0
    assert output_error(reference, other).tolist() == pytest.approx([0.0, 0.25, 1.0])
    nothing = torch.zeros(2, 3, 4)
    assert output_error(nothing, torch.stack([nothing[0], nothing[1] + 1])).tolist() == [0.0, math.inf]


def test_what_does_not_fit_together_is_refused():
    logits, targets = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for bad in (
        (logits, torch.zeros(2, 5), targets),
        (logits, logits, targets[:2]),
        (logits[:0], logits[:0], targets[:0]),
        (logits, logits, targets + 5),
        (logits, logits, targets - 1),
    ):
        with pytest.raises(InputError):
            compare_logits(*bad)
    with pytest.raises(InputError):
        output_error(torch.zeros(2, 3), torch.zeros(2, 3))
