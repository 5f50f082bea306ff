"""Attention operators: what their papers say, whole or in chunks, and never a look ahead."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, silu
from transformers import PreTrainedModel

import workbench as wb
from tests.attention.support import drawn
from workbench import testing
from workbench.attention.operators import (
    SLAB,
    SOFT,
    AgentAttention,
    EcoFormer,
    InLine,
    Lightning,
    LocalLinear,
    Operator,
    study,
    study_operator,
)
from workbench.attention.operators.hashing import Hash, affinity, fitted
from workbench.attention.operators.landmarks import epochs
from workbench.core.causal_attention import causal_attention
from workbench.errors import BadBudget, BadParameter, BadRecipe, Cancelled, InputError, NotApplicable, NotRead
from workbench.measure import LiveBytes
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import from_dict, registered
from workbench.trace import LayerTrace
from workbench_kernels import Scoring

OPERATORS = [cls for cls in registered("operator") if issubclass(cls, Operator)]
SCALE = 0.3
every = pytest.mark.parametrize("cls", OPERATORS, ids=lambda cls: cls.key)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to a share of the norm."""
    assert got.shape == want.shape and got.isfinite().all()
    assert float((got - want).norm()) <= tolerance * float(want.norm())


# --- what the papers say, as plain loops in float64


def lightning_weights(op: Lightning, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        for j in range(i + 1):
            slope = 2 ** (-8 * (head + 1) / heads)
            weights[i, j] = SCALE * float(silu(q[i]) @ silu(k[j])) * math.exp(-slope * (i - j))
    return weights


def slab_weights(op: SLAB, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        products = [float(q[i].clamp(min=0) @ k[j].clamp(min=0)) for j in range(i + 1)]
        weights[i, : i + 1] = torch.tensor(products) / (sum(products) + 1e-6)
    return weights


def inline_weights(op: InLine, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        products = [SCALE * float(q[i] @ k[j]) / (i + 1) for j in range(i + 1)]
        for j in range(i + 1):
            weights[i, j] = products[j] - sum(products) / (i + 1) + 1 / (i + 1)
    return weights


def ecoformer_weights(op: EcoFormer, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(op.seed)
    anchors = normalize(torch.randn(op.anchors, q.shape[1], generator=generator, dtype=torch.float64), dim=-1)
    projections = torch.randn(op.anchors, op.bits, generator=generator, dtype=torch.float64)
    fit = op.fit or len(q)

    def code(x: Tensor, i: int) -> Tensor:
        unit = x / x.norm(dim=-1, keepdim=True)
        # The authors' variance is the mean squared distance, which is 2 on the unit sphere.
        near = [torch.exp(-(unit[j] - anchors).square().sum(-1) / (2 * 2)) for j in range(i + 1)]
        return torch.sign((near[i] - sum(near) / (i + 1)) @ projections)

    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        if i < fit:
            codes, own = [code(k, j) for j in range(i + 1)], code(q, i)
        else:
            ours, theirs = fitted_codes(op, q, k, projections)
            codes, own = list(theirs[: i + 1]), ours[i]
        products = [float(own @ other) + op.bits + 1 for other in codes]
        assert min(products) >= 1
        weights[i, : i + 1] = torch.tensor(products) / sum(products)
    return weights


def fitted_codes(op: EcoFormer, q: Tensor, k: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, bits] of q and k by a hash fitted on the first `fit` of them, by torch's own descent."""
    fit, (q, k) = op.fit, (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    points = torch.cat([q[:fit], k[:fit]])
    places = torch.randperm(2 * fit, generator=torch.Generator().manual_seed(op.seed))[: op.anchors]
    distance = torch.cdist(points, points[places]).square()
    near = [torch.exp(-torch.cdist(x, points[places]).square() / (2 * distance.mean())) for x in (q, k)]
    near = [x - x[:fit].mean(0) for x in near]
    left = torch.zeros(fit, fit, dtype=torch.float64)
    for i in range(fit):
        each, order = min(op.like, (i + 1) // 2), (k[: i + 1] @ q[i]).argsort(descending=True).tolist()
        for j in order[:each]:
            left[i, j] = op.bits
        for j in order[len(order) - each :]:
            left[i, j] = -op.bits
    ours, theirs = (x[:fit] for x in near)
    found = []
    for bit in range(op.bits):
        start = projections[: len(places), bit]
        moved = start.clone().requires_grad_()
        descent = torch.optim.SGD([moved], lr=5e-4, momentum=0.9, nesterov=True)
        for _ in range(op.steps):
            descent.zero_grad()
            y, z = (2 / (1 + torch.exp(-x @ moved)) - 1 for x in (ours, theirs))
            (-(y @ left @ z) / (fit * op.bits)).backward()
            descent.step()
        gains = [float((ours @ a).sign() @ left @ (theirs @ a).sign()) for a in (start, moved.detach())]
        found.append(moved.detach() if gains[1] > gains[0] else start)
        left = left - (ours @ found[-1]).sign()[:, None] * (theirs @ found[-1]).sign()
    return (near[0] @ torch.stack(found, 1)).sign(), (near[1] @ torch.stack(found, 1)).sign()


def landmarks_of(i: int, x: Tensor, segment: int, most: int) -> Tensor:
    complete = (i + 1) // segment
    if complete == 0:
        return x[:1]
    stay = list(range(complete))
    while len(stay) > most:
        stay = stay[::2]
    return torch.stack([x[s * segment : (s + 1) * segment].mean(0) for s in stay])


def agent_weights(op: AgentAttention, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        agents = landmarks_of(i, q, op.segment, op.agents)
        gathered = (agents @ k[: i + 1].T * SCALE).softmax(-1)
        weights[i, : i + 1] = (agents @ q[i] * SCALE).softmax(-1) @ gathered
    return weights


def soft_weights(op: SOFT, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-0.5 * SCALE * (x[:, None] - y).square().sum(-1))

    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        marks = landmarks_of(i, k, op.segment, op.landmarks)
        inverse = torch.linalg.inv(kernel(marks, marks) + 0.01 * torch.eye(len(marks)))
        row = (kernel(q[i : i + 1], marks) @ inverse @ kernel(marks, k[: i + 1]))[0]
        weights[i, : i + 1] = row / row.sum() if op.normalise else row
    return weights


def lla_weights(op: LocalLinear, q: Tensor, k: Tensor, head: int, heads: int) -> Tensor:
    """The paper's own form: moments of the keys about the query."""
    q, k = q * SCALE**0.5, k * SCALE**0.5
    weights = torch.zeros(len(q), len(q), dtype=torch.float64)
    for i in range(len(q)):
        w = (k[: i + 1] @ q[i] / op.bandwidth).softmax(0)
        z = k[: i + 1] - q[i]
        omega, mu = w.sum(), w @ z
        sigma = (w[:, None] * z).T @ z + op.ridge * torch.eye(len(mu))
        rho = torch.linalg.inv(sigma) @ mu
        weights[i, : i + 1] = w * (1 - z @ rho) / (omega - mu @ rho)
    return weights


ORACLES: list[tuple[Operator, Callable[..., Tensor]]] = [
    (Lightning(chunk=5), lightning_weights),
    (SLAB(chunk=5), slab_weights),
    (InLine(chunk=5), inline_weights),
    (EcoFormer(chunk=5, bits=8, anchors=6), ecoformer_weights),
    (EcoFormer(chunk=5, seed=3), ecoformer_weights),
    (EcoFormer(chunk=5, fit=0), ecoformer_weights),
    (EcoFormer(chunk=5, fit=14, bits=5, anchors=9, like=3, steps=60), ecoformer_weights),
    (EcoFormer(chunk=5, fit=8, bits=4, steps=10), ecoformer_weights),
    (AgentAttention(chunk=5, segment=3, agents=4), agent_weights),
    (AgentAttention(chunk=5, segment=1, agents=5), agent_weights),
    (SOFT(chunk=5, segment=3, landmarks=4, iterations=60), soft_weights),
    (SOFT(chunk=5, segment=2, landmarks=64, iterations=60, normalise=False), soft_weights),
    (LocalLinear(chunk=5), lla_weights),
    (LocalLinear(chunk=5, ridge=0.1, bandwidth=3), lla_weights),
]


@pytest.mark.parametrize(("op", "oracle"), ORACLES, ids=[op.label() for op, _ in ORACLES])
def test_an_operator_computes_what_its_paper_says(op: Operator, oracle: Callable[..., Tensor]) -> None:
    q, k, v = drawn(23)
    pairs = [(q[h].double(), k[h // 2].double()) for h in range(4)]
    want = torch.stack([oracle(op, query, key, h, 4) for h, (query, key) in enumerate(pairs)])
    close(op.weights(q, k, SCALE).double(), want)
    close(op.apply(q, k, v, SCALE).double(), want @ v.repeat_interleave(2, 0).double())


# --- what holds for every operator


@every
@pytest.mark.parametrize("promise", testing.PROMISES[Operator], ids=lambda promise: promise.__name__)
def test_an_operator_keeps_every_promise(
    cls: type[Operator], promise: testing.Promise, subjects: testing.Subjects
) -> None:
    testing.check_promise(promise, cls, subjects)


class Mean(Operator):
    """Give all tokens so far the same weight."""

    key = "mean"
    title = "Mean"
    claim = "none"

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        return (torch.ones(len(q), stop - first, stop) / torch.arange(first + 1, stop + 1)[:, None]).tril_(first)


class MeanOfAll(Mean):
    """Look at later tokens too."""

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        return torch.full((len(q), stop - first, stop), 1 / q.shape[1])


class WithinChunks(Mean):
    """See what lies in the same chunk only."""

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        parts = zip(*(x.split(self.chunk, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([super(WithinChunks, self).apply(*part, scale) for part in parts], dim=1)


class FromTheChunkOn(Mean):
    """Count rows from the first one asked for."""

    def weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().rows(q, k, scale, 0, q.shape[1])

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        return super().rows(q, k, scale, 0, stop - first)


class InFloat32(Mean):
    """Give float32 whatever comes in."""

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return super().apply(q.float(), k, v, scale)


class Exponential(Mean):
    """Raise products to the power of e without taking off their largest."""

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        keys = k[:, :stop].repeat_interleave(len(q) // len(k), 0)
        raised = (q[:, first:stop].float() @ keys.float().transpose(1, 2)).exp().tril_(first)
        return raised / raised.sum(-1, keepdim=True)


class HeadsTogether(Mean):
    """Weigh by the head's number, which for_head does not keep."""

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        return super().rows(q, k, scale, first, stop) * torch.arange(1, len(q) + 1)[:, None, None]


class Overwrites(Mean):
    """Scale the queries in place."""

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return super().apply(q.mul_(2), k, v, scale)


_CALLS = itertools.count(1)


class Drifts(Mean):
    """Add a little more each time."""

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return super().apply(q, k, v, scale) * (1 + 1e-4 * next(_CALLS))


def test_a_sound_operator_of_ones_own_keeps_the_promises() -> None:
    testing.check_method(Mean)


@pytest.mark.parametrize(
    ("cls", "promise", "said"),
    [
        (MeanOfAll, testing.what_follows_changes_no_output_before, "gives weight to a token after it"),
        (WithinChunks, testing.chunks_give_what_the_whole_map_gives, "chunks of 1 give another output"),
        (FromTheChunkOn, testing.rows_are_those_of_the_whole_map, "not those of the whole map"),
        (InFloat32, testing.outputs_have_the_shape_and_precision_of_the_queries, r"give torch.float32 \[4, 30, 6\]"),
        (Exponential, testing.large_inputs_give_finite_outputs, "inputs of 100.0 overflow"),
        (HeadsTogether, testing.each_head_is_by_itself, "alone gives another output than among the others"),
        (Overwrites, testing.the_same_inputs_give_the_same_output, "the trace changed"),
        (Drifts, testing.the_same_inputs_give_the_same_output, "another output the second time"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_promise_of_an_operator_is_told(cls: type[Operator], promise: testing.Promise, said: str) -> None:
    with pytest.raises(testing.MethodProblem, match=said):
        testing.check_promise(promise, cls)


@every
@given(
    tokens=st.integers(1, 70),
    chunk=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 12),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_chunks_give_what_the_whole_map_gives(
    cls: type[Operator], tokens: int, chunk: int, kv_heads: int, group: int, width: int, seed: int
) -> None:
    q, k, v = drawn(tokens, kv_heads * group, kv_heads, width, seed=seed)
    op = cls(chunk=chunk)
    close(op.apply(q, k, v, SCALE), op.plain(q, k, v, SCALE))


@every
def test_one_token_sees_itself(cls: type[Operator]) -> None:
    q, k, v = drawn(1)
    if issubclass(cls, SLAB):
        q, k = q.abs(), k.abs()  # where no product is positive, a row is empty
    out = cls().apply(q, k, v, SCALE)
    if issubclass(cls, Lightning):  # whose rows sum to no particular number
        own = SCALE * (silu(q) * silu(k.repeat_interleave(2, 0))).sum(-1, keepdim=True)
        close(out, own * v.repeat_interleave(2, 0), 1e-5)
    else:
        close(out, v.repeat_interleave(2, 0), 1e-4)


@pytest.mark.parametrize("cls", [cls for cls in OPERATORS if cls is not Lightning], ids=lambda cls: cls.key)
def test_rows_sum_to_one(cls: type[Operator]) -> None:
    q, k, _ = drawn(50)
    if cls is SLAB:
        q, k = q + 1, k + 1
    sums = cls().weights(q, k, SCALE).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=1e-4)


@every
def test_shapes_that_do_not_fit_are_refused(cls: type[Operator]) -> None:
    q, k, v = drawn(9)
    for wrong in ((q, k[:, :8], v), (q, k, v[:1]), (q[:3], k, v), (q[0], k, v), (q[:, :, :4], k, v), (q, k[:0], v[:0])):
        with pytest.raises(InputError, match="an operator"):
            cls().apply(*wrong, SCALE)


# --- where an operator is exact


def test_a_strong_ridge_makes_local_linear_attention_softmax_attention() -> None:
    q, k, v = drawn(50)
    close(LocalLinear(ridge=1e8).apply(q, k, v, SCALE), causal_attention(q, k, v, Scoring(SCALE)))


def test_a_wide_bandwidth_makes_local_linear_attention_ridge_regression() -> None:
    q, k, v = (x.double() for x in drawn(50, 1, 1))
    got = LocalLinear(bandwidth=1e8, ridge=0.5).apply(q, k, v, SCALE)
    for i in (0, 20, 49):
        keys, values = k[0, : i + 1] * SCALE**0.5, v[0, : i + 1]
        x, y = keys - keys.mean(0), values - values.mean(0)
        slope = torch.linalg.solve(x.T @ x / (i + 1) + 0.5 * torch.eye(8), x.T @ y / (i + 1))
        close(got[0, i], values.mean(0) + (q[0, i] * SCALE**0.5 - keys.mean(0)) @ slope)


def test_local_linear_attention_finds_values_that_are_linear_in_the_keys_where_softmax_does_not() -> None:
    q, k, _ = drawn(64, 1, 1, d=4)
    v = k @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [1.0, 1.0]])
    want = q @ torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5], [1.0, 1.0]])
    late = slice(16, None)
    close(LocalLinear(ridge=1e-3).apply(q, k, v, SCALE)[:, late], want[:, late], 0.05)
    with pytest.raises(AssertionError):
        close(causal_attention(q, k, v, Scoring(SCALE))[:, late], want[:, late], 0.3)


def test_one_agent_for_equal_queries_is_softmax_attention() -> None:
    q, k, v = drawn(50)
    q = q[:, :1].expand(-1, 50, -1)
    got = AgentAttention(segment=7, agents=3, chunk=9).apply(q, k, v, SCALE)
    close(got, causal_attention(q, k, v, Scoring(SCALE)))


@pytest.mark.parametrize("size", [30, 300])
def test_agents_whose_scores_grow_by_more_than_a_number_holds_stay_exact(size: float) -> None:
    q, k, v = drawn(60)
    op = AgentAttention(segment=8, agents=4, chunk=25)
    assert SCALE * size**2 > 200
    want = torch.stack([agent_weights(op, size * q[h].double(), size * k[h // 2].double(), h, 4) for h in range(4)])
    close(op.weights(size * q, size * k, SCALE).double(), want)
    close(op.apply(size * q, size * k, v, SCALE).double(), want @ v.repeat_interleave(2, 0).double())


def test_inline_attention_is_softmax_attention_to_first_order() -> None:
    q, k, v = drawn(50)
    errors = []
    for scale in (0.02, 0.01):
        want, flat = causal_attention(q, k, v, Scoring(scale)), causal_attention(q, k, v, Scoring(0))
        left = (InLine().apply(q, k, v, scale) - want).norm()
        assert left < 0.2 * (flat - want).norm()
        errors.append(float(left))
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.15)  # what is left is of second order


def test_soft_with_a_landmark_for_every_key_has_the_whole_kernel() -> None:
    q, k, _ = drawn(30, d=16)
    q, k = 2 * q, 2 * k
    got = SOFT(segment=1, landmarks=64, iterations=60).weights(q, k, 1.0)
    keys = k.repeat_interleave(2, 0)
    kernel = -0.5 * (q[:, :, None] - keys[:, None]).square().sum(-1)
    later = torch.ones(30, 30, dtype=torch.bool).triu(1)
    close(got, kernel.masked_fill(later, -torch.inf).softmax(-1), 0.02)


def test_lightning_without_fading_is_linear_attention_and_with_much_of_it_each_token_itself() -> None:
    q, k, v = drawn(30, 2, 2)
    want = torch.stack([(q[:, i : i + 1] @ k[:, : i + 1].transpose(1, 2) @ v[:, : i + 1])[:, 0] for i in range(30)], 1)
    close(Lightning(strength=0, feature="none", chunk=7).apply(q, k, v, 1.0), want)
    close(Lightning(slope=10, feature="none", chunk=7).apply(q, k, v, 1.0), (q * k).sum(-1, keepdim=True) * v, 1e-2)


@pytest.mark.parametrize(
    ("heads", "want"),
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_lightnings_slopes_are_those_of_its_authors(heads: int, want: list[float]) -> None:
    assert Lightning().slopes(heads).tolist() == pytest.approx(want)


def test_more_bits_bring_ecoformers_weights_closer_to_the_angle_between_codes() -> None:
    q, k, _ = drawn(40, 1, 1)
    fine = EcoFormer(bits=1024, anchors=256).weights(q, k, 1.0)  # none is fitted on so few tokens
    coarse = [(EcoFormer(bits=bits, anchors=256).weights(q, k, 1.0) - fine).norm() for bits in (4, 32, 256)]
    assert coarse[0] > coarse[1] > coarse[2]


def test_fitting_brings_codes_closer_to_what_attends_to_what() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(4, 100, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    drawn_, places = torch.randn(20, 8, generator=generator, dtype=torch.float64), torch.arange(0, 200, 10)
    wanted = affinity(normalize(q, dim=-1), normalize(k, dim=-1), 10)

    def apart(steps: int) -> Tensor:
        found = fitted(q, k, drawn_, places, 10, steps)
        return (8 * wanted - found.queries(q).double() @ found.keys(k).double().transpose(1, 2)).norm(dim=(1, 2))

    assert (apart(100) < apart(0)).all()


def test_a_hash_is_fitted_once_for_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Tensor) -> Hash:
        calls.append(len(arguments[0]))
        return fitted(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("workbench.attention.operators.ecoformer.fitted", counted)
    q, k, v = drawn(40, 1, 1)
    layer = LayerTrace(0, k, v, q, torch.device("cpu"), Scoring(0.25))
    study(EcoFormer(chunk=4, fit=10, steps=3), layer, pixels=40, heads=())
    assert calls == [1]


# --- landmarks


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_landmarks_cover_every_position_and_come_from_its_past(tokens: int, segment: int, most: int) -> None:
    found = list(epochs(tokens, segment, most))
    assert [epoch.start for epoch in found] == [0, *[epoch.stop for epoch in found[:-1]]] and found[-1].stop == tokens
    for epoch in found:
        assert epoch.start < epoch.stop and 1 <= len(epoch.members) <= most
        assert epoch.members == (-1,) or (epoch.members[-1] + 1) * segment <= epoch.start + 1
    longer = list(epochs(tokens + 50, segment, most))
    assert longer[: len(found) - 1] == found[:-1] and longer[len(found) - 1].members == found[-1].members


# --- in the catalogue, not in recipes


@every
def test_an_operator_is_listed_described_and_never_run(cls: type[Operator]) -> None:
    assert cls.key in set(wb.methods("operator")["key"]) and cls.key not in set(wb.methods("attention")["key"])
    assert cls.paper is not None and cls.paper.arxiv and cls.claim
    op = cls(chunk=64)
    assert from_dict(json.loads(json.dumps(op.to_dict()))) == op
    for recipe in (lambda: Recipe.of(cls.key), lambda: op | wb.method("snapkv"), lambda: wb.method("snapkv") | op):
        with pytest.raises(BadRecipe, match=rf"studied on a recording.*session\.operator\('{cls.key}'"):
            recipe()
    with pytest.raises(BadBudget, match="no budget"):
        cls(budget=0.5)


# --- a study


@pytest.fixture(scope="module")
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    session = wb.Session((tiny_llama, None), kv_dtype="float32")
    session.read(torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(0)))
    return session


@every
@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
def test_a_study_shows_the_pooled_map_of_the_weights(session: wb.Session, cls: type[Operator], pooling: str) -> None:
    layer, op = session.trace.layers[1], cls(chunk=17)
    found = study(op, layer, 3, pixels=11, pooling=pooling, rows=(20, 71), cols=(5, 60))
    whole = op.weights(layer.queries, layer.keys, layer.scale)[3]
    for shown, full in ((found.implied, whole), (found.exact, layer.attention(90).flatten(0, 1)[3])):
        for i, (top, bottom) in enumerate(zip(shown.row_edges[:-1], shown.row_edges[1:], strict=True)):
            for j, (left, right) in enumerate(zip(shown.col_edges[:-1], shown.col_edges[1:], strict=True)):
                cell = full[top:bottom, left:right]
                want = {"max": cell.max(), "mean": cell.mean(), "sum": cell.sum()}[pooling]
                assert float(shown.values[i, j]) == pytest.approx(float(want), rel=1e-3, abs=1e-5)


def test_a_window_no_wider_than_the_pixels_shows_each_weight_and_its_sign(session: wb.Session) -> None:
    layer, op = session.trace.layers[0], InLine(chunk=8)
    found = study(op, layer, 1, pixels=64, rows=(30, 60), cols=(10, 40))
    want = op.weights(layer.queries, layer.keys, layer.scale)[1, 30:60, 10:40]
    torch.testing.assert_close(found.implied.values, want, rtol=1e-4, atol=1e-6)
    assert float(found.implied.values.min()) < 0


@every
def test_a_studys_errors_are_those_of_the_outputs(session: wb.Session, cls: type[Operator]) -> None:
    layer, op = session.trace.layers[2], cls()
    found = study_operator(session.trace, op, 2, 1, pixels=8, heads=(2, 0))
    want = causal_attention(layer.queries, layer.keys, layer.values, layer.scoring)
    got = op.apply(layer.queries, layer.keys, layer.values, layer.scale)
    assert (found.layer, found.heads, found.head) == (2, (2, 0), 1)
    for index, head in enumerate(found.heads):
        error = (got[head] - want[head]).norm() / want[head].norm()
        factor = (got[head] * want[head]).sum() / got[head].square().sum()
        left = (factor * got[head] - want[head]).norm() / want[head].norm()
        assert float(found.error[index]) == pytest.approx(float(error), rel=1e-3)
        assert float(found.scaled_error[index]) == pytest.approx(float(left), rel=1e-2, abs=1e-3)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_map_can_be_had_without_errors_and_of_any_part(session: wb.Session) -> None:
    made = session.operator("slab", 0, 1, heads=(), pixels=16, pooling="mean", rows=(20, 50), cols=(4, 40))
    assert made.heads == () and made.error.shape == made.scaled_error.shape == (0,)
    layer = session.trace.layers[0]
    weights = SLAB().weights(layer.queries, layer.keys, layer.scale)[1, 20:50, 4:40]
    edges = [(made.implied.row_edges - 20).tolist(), (made.implied.col_edges - 4).tolist()]
    for i, (top, bottom) in enumerate(pairwise(edges[0])):
        for j, (left, right) in enumerate(pairwise(edges[1])):
            torch.testing.assert_close(made.implied.values[i, j], weights[top:bottom, left:right].mean())
    assert torch.equal(made.exact.row_edges, made.implied.row_edges)


def test_an_exact_operator_has_no_error_and_the_exact_map(session: wb.Session) -> None:
    found = study_operator(session.trace, LocalLinear(ridge=1e9), 1, 2, pixels=90)
    assert found.heads == (0, 1, 2, 3) and float(found.error.max()) < 1e-4
    torch.testing.assert_close(found.implied.values, found.exact.values, rtol=1e-3, atol=1e-5)


def test_what_a_study_cannot_be_of_is_refused(session: wb.Session, tiny_llama: PreTrainedModel) -> None:
    for arguments in ((SLAB(), 0, 4), (SLAB(), 0, -1), (SLAB(), 3, 0), (SLAB(), -1, 0)):
        with pytest.raises(BadParameter, match=r"is -?[0-9]"):
            study_operator(session.trace, *arguments)
    with pytest.raises(NotApplicable, match="no operator"):
        study_operator(session.trace, wb.method("snapkv"), 0)  # type: ignore[arg-type]
    unrecorded = wb.Session((tiny_llama, None))
    unrecorded.read(torch.arange(20), record=False)
    with pytest.raises(NotRead):
        study_operator(unrecorded.trace, SLAB(), 0)


def test_a_study_reports_its_steps_and_can_be_cancelled(session: wb.Session) -> None:
    stages: set[str] = set()
    study_operator(session.trace, SLAB(chunk=16), 0, progress=Progress(lambda stage, done, total: stages.add(stage)))
    assert stages >= {"implied attention", "output error"}
    progress = Progress(lambda stage, done, total: progress.cancel() if stage == "output error" else None)
    with pytest.raises(Cancelled):
        study_operator(session.trace, SLAB(), 0, progress=progress)


@every
def test_a_study_of_a_long_prompt_never_holds_a_whole_map(cls: type[Operator]) -> None:
    q, k, v = drawn(3000, 1, 1, d=16, dv=16)
    layer = LayerTrace(0, k, v, q, torch.device("cpu"), Scoring(0.25))
    with LiveBytes() as live:
        study(cls(chunk=32), layer, pixels=64)
    assert live.peak < 0.6 * 4 * 3000 * 3000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every
def test_a_gpu_gives_what_the_cpu_gives(cls: type[Operator]) -> None:
    q, k, v = drawn(200, d=32, dv=32)
    got = cls().apply(*(x.cuda() for x in (q, k, v)), SCALE).cpu()
    # The kernels of flash-linear-attention multiply in TF32.
    close(
        got,
        cls().apply(q, k, v, SCALE),
        5e-3 if cls in (Lightning, InLine, SLAB, EcoFormer) and find_spec("fla") else 1e-3,
    )
