"""Eigen Attention and CSKV: keys and values as coefficients in low-rank spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.kv.support import ids_of, random_layer, tiers_of, trace_of
from workbench.core.causal_attention import causal_attention
from workbench.core.rope import Rotation
from workbench.errors import BadBudget
from workbench.kv import CSKV, AdaKV, EigenAttention, SnapKV
from workbench.kv.base import Study
from workbench.kv.rank_profiles import Profile, profiles_of, ranks_at
from workbench.kv.stores.format import DenseFormat, Shape
from workbench.kv.stores.low_rank import LowRankFormat, LowRankStore, Ranks, rotary_of, spaces_of
from workbench.kv.stores.rows import Rows
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench_kernels import Scoring
from workbench_kernels.rotary import rotate

if TYPE_CHECKING:
    from workbench.kv.plan import Plan
    from workbench.trace import LayerTrace

TOKENS = 90
FORMATS = {
    "all": LowRankFormat(torch.bfloat16, Ranks(7, 5)),
    "window": LowRankFormat(torch.bfloat16, Ranks(3, 6), window=8),
    "4-bit": LowRankFormat(torch.bfloat16, Ranks(9, 7), window=5, bits=4, group=8),
    "4-bit, no window": LowRankFormat(torch.bfloat16, Ranks(1, 1), bits=4, group=4),
    "joint": LowRankFormat(torch.bfloat16, Ranks(4, 3), window=8, joint=True),
    "joint, 4-bit": LowRankFormat(torch.bfloat16, Ranks(5, 4), bits=4, group=16, joint=True),
}
COUNTS = [[60, 60], [60, 41], [5, 52], [33, 33], [1, 9], [0, 60]]


def plan_of(
    method: Any, architecture: str = "llama", dtype: torch.dtype = torch.bfloat16, tokens: int = TOKENS
) -> Plan:
    return make_plan(trace_of(architecture, tokens), [method], dtype, model=tiny(architecture))


def table(positions: Tensor) -> tuple[Tensor, Tensor]:
    """A rotary table of 12 channels that also scales by 1.2, as YaRN does."""
    angles = positions[:, None].float() * 10.0 ** -torch.arange(6).repeat(2)
    return 1.2 * angles.cos(), 1.2 * angles.sin()


def rotated_layer(rotary: Any = table, index: int = 0) -> LayerTrace:
    return random_layer(seed=index, rotation=Rotation(rotary) if rotary else None)


def turned(keys: Tensor, positions: list[int], back: bool = False) -> Tensor:
    """Keys [m, d] rotated to positions, or back from there, one by one."""
    rows = []
    for key, position in zip(keys, positions, strict=True):
        cos, sin = table(torch.tensor([position]))
        row = rotate(key[None], cos / 1.44, -sin / 1.44) if back else rotate(key[None], cos, sin)
        rows.append(row[0])
    return torch.stack(rows)


def nearest(x: Tensor, basis: Tensor) -> Tensor:
    """The points of the span of basis [r, d] that are nearest to x [m, d], by least squares."""
    return (basis.T @ torch.linalg.lstsq(basis.T, x.T).solution).T


# -- the store


@pytest.mark.parametrize("rotary", [None, table])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", FORMATS)
def test_predicted_bytes_are_live_bytes_bases_included(name: str, counts: list[int], rotary: Any) -> None:
    form = FORMATS[name]
    store = form.build(rotated_layer(rotary), tiers_of(counts), None)
    assert isinstance(store, LowRankStore)
    assert store.nbytes == form.nbytes(Shape(2, 60, 20, 18, 2), torch.tensor([counts]))
    assert [row.tolist() for row in store.positions] == [row.nonzero()[:, 0].tolist() for row in tiers_of(counts)]
    together = 2 if store.joint else 1
    assert store.joint == (form.joint and counts == [60, 60])
    numbers = 2 * together * (form.ranks_of(0).keys * 20 + form.ranks_of(0).values * 18)
    assert sum(t.nbytes for t in store.bases) == 2 * numbers


def test_each_layer_has_ranks_of_its_own() -> None:
    form = LowRankFormat(torch.bfloat16, {0: Ranks(3, 9), 2: Ranks(12, 1)})
    for index, (keys, values) in ((0, (3, 9)), (2, (12, 1))):
        store = form.build(rotated_layer(index=index), tiers_of([60, 60]), None)
        assert isinstance(store, LowRankStore) and [len(b[0]) for b in store.bases] == [keys, values]
        assert store.nbytes == form.nbytes(Shape(2, 60, 20, 18, 2, layer=index), torch.tensor([[60, 60]]))
    assert form.tiers == ("bfloat16, keys of rank 3 to 12, values of rank 1 to 9",)


@pytest.mark.parametrize("rotary", [None, table])
@pytest.mark.parametrize("counts", [[60, 60], [47, 21], [0, 60]])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", FORMATS)
def test_attention_in_the_space_is_that_over_what_the_store_stands_for(
    name: str, softcap: float | None, counts: list[int], rotary: Any
) -> None:
    store = FORMATS[name].build(rotated_layer(rotary), tiers_of(counts), None)
    positions = torch.tensor([57, 59, 64])
    query = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(4))
    for window in (None, 50):
        got, weights = store.attend(query, positions, Scoring(0.3, window, softcap), weights=True)
        assert weights is not None
        held = store.contents(torch.float32)
        for head in range(4):
            where = held.positions.expand(2, -1)[head // 2]
            for q, position in enumerate(positions.tolist()):
                seen = (where <= position) & (where > position - (window or 10**6))
                if held.valid is not None:
                    seen &= held.valid[head // 2]
                if not seen.any():
                    continue
                logits = held.keys[head // 2, seen] @ query[head, q] * 0.3
                if softcap:
                    logits = torch.tanh(logits / softcap) * softcap
                probs = logits.softmax(dim=0)
                assert torch.allclose(got[head, q], probs @ held.values[head // 2, seen], atol=1e-4)
                assert torch.allclose(weights[head // 2, head % 2, q, seen], probs, atol=1e-5)


@pytest.mark.parametrize("counts", [[60, 60], [47, 21]])
def test_older_keys_are_the_nearest_in_the_unrotated_space_at_their_true_positions(counts: list[int]) -> None:
    # Trap 8: a key that was dropped must not move the positions of those behind it.
    layer, form = rotated_layer(), LowRankFormat(torch.float32, Ranks(6, 4), window=8)
    store, tiers = form.build(layer, tiers_of(counts), None), tiers_of(counts)
    held = store.contents(torch.float32)
    for head in range(2):
        kept = tiers[head].nonzero()[:, 0].tolist()
        plain = turned(layer.keys[head], list(range(60)), back=True)
        basis = torch.linalg.svd(plain, full_matrices=False).Vh[:6]
        keys = turned(nearest(plain[kept], basis), kept)
        values = nearest(layer.values[head, kept], torch.linalg.svd(layer.values[head]).Vh[:4])
        keys[-8:], values[-8:] = layer.keys[head, kept[-8:]], layer.values[head, kept[-8:]]
        where = held.positions.expand(2, -1)[head]
        for row, position in enumerate(kept):
            matches = where == position
            if held.valid is not None:
                matches &= held.valid[head]
            slot = int(matches.nonzero()[0, 0])
            assert torch.allclose(held.keys[head, slot], keys[row], atol=1e-4)
            assert torch.allclose(held.values[head, slot], values[row], atol=1e-4)


@pytest.mark.parametrize("rotary", [None, table])
@pytest.mark.parametrize("counts", [[60, 60], [47, 21]])
@pytest.mark.parametrize("window", [0, 5])
def test_new_tokens_are_projected_when_they_leave_the_window(window: int, counts: list[int], rotary: Any) -> None:
    layer, form = rotated_layer(rotary), LowRankFormat(torch.float32, Ranks(6, 4), window=window)
    store = form.build(layer, tiers_of(counts), None)
    assert isinstance(store, LowRankStore)
    store.reserve(9)
    twin, before = store.clone(), [row.tolist() for row in store.positions]
    draw = torch.Generator().manual_seed(9)
    keys, values = (torch.randn(2, 9, width, generator=draw) for width in (20, 18))
    for first, last in ((0, 1), (1, 7), (7, 9)):
        store.append(keys[:, first:last], values[:, first:last], torch.arange(60 + first, 60 + last))
        store.attend(torch.zeros(4, 1, 20), torch.tensor([60 + last - 1]), Scoring(1.0))
    assert [row.tolist() for row in store.positions] == [[*row, *range(60, 69)] for row in before]
    assert [row.tolist() for row in twin.positions] == before
    held = store.contents(torch.float32)
    for head in range(2):
        for step in range(9):
            at = (held.positions.expand(2, -1)[head] == 60 + step).nonzero()[0, 0]
            want = keys[head, step : step + 1], values[head, step : step + 1]
            if step < 9 - window:
                plain = turned(want[0], [60 + step], back=True) if rotary else want[0]
                near = nearest(plain, store.bases[0][head])
                want = turned(near, [60 + step]) if rotary else near, nearest(want[1], store.bases[1][head])
            assert torch.allclose(held.keys[head, at], want[0][0], atol=1e-4)
            assert torch.allclose(held.values[head, at], want[1][0], atol=1e-4)


def test_packed_coefficients_leave_the_window_in_whole_groups() -> None:
    layer, form = rotated_layer(), LowRankFormat(torch.bfloat16, Ranks(20, 18), window=5, bits=4, group=8)
    store = form.build(layer, tiers_of([60, 60]), None)
    assert isinstance(store, LowRankStore)
    lengths = [store.newer[0].longest]
    rows = store.bases[0].float().norm(dim=-1)  # [k, r]
    half = 0.5 * store.older[0].scale.data.float().view(2, -1, 20).amax(dim=1) * rows  # type: ignore[union-attr]
    for step in range(10):
        store.append(layer.keys[:, :1], layer.values[:, :1], torch.tensor([60 + step]))
        store.attend(torch.zeros(4, 1, 20), torch.tensor([60 + step]), Scoring(1.0))
        lengths.append(store.newer[0].longest)
    assert lengths == [12, 5, 6, 7, 8, 9, 10, 11, 12, 5, 6]
    held = store.contents(torch.float32)
    assert held.keys.shape[1] == 70
    # Half a step of 4 bits in each direction is the most that a key is off, times the table's 1.2 and its rounding.
    off = (held.keys[:, :48] - layer.keys[:, :48]).norm(dim=-1).max()
    assert 0 < off <= 1.2 * 1.05 * half.norm(dim=1).max()


@pytest.mark.parametrize("name", ["window", "4-bit", "4-bit, no window"])
def test_room_that_is_reserved_but_empty_never_reaches_the_attention(name: str) -> None:
    # A head of which nothing has left the window, beside one of which much has, with room reserved for both.
    store = FORMATS[name].build(rotated_layer(), tiers_of([4, 60]), None)
    assert isinstance(store, LowRankStore)
    store.reserve(7)
    for part in (*store.older, *store.newer):
        rows = part if isinstance(part, Rows) else part.codes
        if rows.data.is_floating_point() and rows.lengths is not None:
            real = torch.zeros(len(rows.data), dtype=torch.bool)
            real[rows.slots()[rows.valid()]] = True
            rows.data[~real] = torch.nan
    out, _ = store.attend(torch.ones(4, 1, 20), torch.tensor([60]), Scoring(0.3))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("architecture", ["llama", "phi3", "mqa"])
def test_full_rank_loses_nothing_while_decoding(architecture: str) -> None:
    model, trace = tiny(architecture), trace_of(architecture, TOKENS)
    width = trace.layers[0].keys.shape[-1]
    ids = ids_of(6, 5)
    for window in (0, 4):
        form = LowRankFormat(torch.float32, Ranks(width, width), window=window)
        everything = torch.ones(trace.layers[0].kv_heads, TOKENS, dtype=torch.uint8)
        decoder = Decoder(model, [form.build(layer, everything, None) for layer in trace.layers], TOKENS)
        got = torch.cat([decoder.feed(ids[step : step + 1]) for step in range(6)])
        with torch.no_grad():
            want = model(torch.cat([trace.ids, ids])[None]).logits[0, -6:]
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


# -- the spaces


def test_spaces_are_those_of_the_singular_vectors_and_are_found_once() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    spaces = spaces_of(layer)
    assert spaces_of(layer) is spaces
    for head in range(2):
        for x, basis, energy in (
            (layer.values[head], spaces.values[head], spaces.energy_values[head]),
            (turned_back(layer)[head], spaces.keys[head], spaces.energy_keys[head]),
        ):
            _, sizes, vectors = torch.linalg.svd(x.double())
            assert torch.allclose(energy, sizes.square().float(), rtol=1e-3, atol=1e-5)
            assert torch.allclose(basis.norm(dim=1), (sizes / TOKENS**0.5).float(), rtol=1e-3)
            unit = torch.nn.functional.normalize(basis, dim=1)
            assert torch.allclose((unit @ vectors.float().T).abs(), torch.eye(len(unit)), atol=2e-2)


def turned_back(layer: LayerTrace) -> Tensor:
    """The keys [k, n, d] before rotary embedding."""
    cos, sin = layer.rotation(torch.arange(layer.tokens))
    return rotate(layer.keys, cos, -sin)


def test_queries_shape_the_space_only_where_nothing_rotates() -> None:
    layer = rotated_layer(None)
    stacked = torch.cat([layer.keys[1], layer.queries[2], layer.queries[3]])
    sizes = torch.linalg.svdvals(stacked)
    assert torch.allclose(spaces_of(layer, queries=True).energy_keys[1], sizes.square(), rtol=1e-3)
    assert not torch.allclose(spaces_of(layer).energy_keys[1], sizes.square(), rtol=1e-3)
    turning = rotated_layer()
    assert torch.equal(spaces_of(turning, queries=True).keys, spaces_of(turning).keys)
    assert rotary_of(layer) is None and rotary_of(turning) is turning.rotation


def test_a_joint_space_is_that_of_all_heads_side_by_side() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    spaces = spaces_of(layer, joint=True)
    assert spaces.joint and spaces_of(layer, joint=True) is spaces and spaces_of(layer) is not spaces
    for x, basis, energy in (
        (layer.values, spaces.values, spaces.energy_values),
        (turned_back(layer), spaces.keys, spaces.energy_keys),
    ):
        beside = torch.cat([x[0], x[1]], dim=1)  # [n, 2 * d]
        _, sizes, vectors = torch.linalg.svd(beside.double())
        assert basis.shape == (2, 32, 16) and energy.shape == (1, 32)
        assert torch.allclose(energy[0], sizes.square().float(), rtol=1e-3, atol=1e-5)
        rows = torch.cat([basis[0], basis[1]], dim=1)
        assert torch.allclose(rows.norm(dim=1), (sizes / TOKENS**0.5).float(), rtol=1e-3)
        unit = torch.nn.functional.normalize(rows, dim=1)
        assert torch.allclose((unit @ vectors.float().T).abs(), torch.eye(32), atol=2e-2)


@pytest.mark.parametrize("rotary", [None, table])
def test_a_joint_space_holds_one_row_a_token_nearest_to_all_heads_together(rotary: Any) -> None:
    layer = rotated_layer(rotary)
    store = LowRankFormat(torch.float32, Ranks(4, 3), window=8, joint=True).build(layer, tiers_of([60, 60]), None)
    assert isinstance(store, LowRankStore) and store.older[0].view().shape == (1, 52, 8)  # type: ignore[union-attr]
    twin = store.clone()
    more = torch.randn(2, 2, 9, 20, generator=torch.Generator().manual_seed(3))
    store.append(more[0], more[1, ..., :18], torch.arange(60, 69))
    store.attend(torch.zeros(4, 1, 20), torch.tensor([68]), Scoring(1.0))
    keys, values = torch.cat([layer.keys, more[0]], dim=1), torch.cat([layer.values, more[1, ..., :18]], dim=1)
    plain = torch.stack([turned(head, list(range(69)), back=True) for head in keys]) if rotary else keys
    found = store.contents(torch.float32)
    for x, ranks, got in ((plain, 8, found.keys), (values, 6, found.values)):
        beside = torch.cat([x[0], x[1]], dim=1)
        basis = torch.linalg.svd(beside[:60], full_matrices=False).Vh[:ranks]
        want = torch.stack(nearest(beside[:61], basis).split(x.shape[-1], dim=1))
        if got is found.keys and rotary:
            want = torch.stack([turned(head, list(range(61))) for head in want])
        assert torch.allclose(got[:, :61], want, atol=1e-3)
    assert torch.equal(found.keys[:, 61:], keys[:, 61:]) and torch.equal(found.values[:, 61:], values[:, 61:])
    assert twin.entries == 120 and store.entries == 138


def test_heads_that_may_hold_different_tokens_have_spaces_of_their_own() -> None:
    form = FORMATS["joint"]
    stores = [form.build(rotated_layer(), tiers_of(counts), None) for counts in ([60, 60], [60, 41])]
    assert [store.joint for store in stores if isinstance(store, LowRankStore)] == [True, False]
    both = torch.tensor([[60, 60], [60, 41]])
    assert sum(store.nbytes for store in stores) == form.nbytes(Shape(2, 60, 20, 18, 2), both)


# -- Eigen Attention


def test_ranks_are_the_fewest_that_hold_the_threshold_in_every_head() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    profile = profiles_of(Study(trace_of(tokens=TOKENS)))[1]
    sizes = torch.linalg.svdvals(layer.values.double())  # [k, d]
    share = sizes.cumsum(dim=1) / sizes.sum(dim=1, keepdim=True)
    for threshold in (0.3, 0.75, 0.9, 0.99):
        want = max(1 + next(r for r in range(16) if head[r] >= threshold) for head in share)
        assert ranks_at(profile.keys, profile.values, threshold).values == want
    assert ranks_at(profile.keys, profile.values, 0.0) == Ranks(1, 1)
    assert ranks_at(profile.keys, profile.values, 1.0) == Ranks(16, 16)


def test_a_profile_is_read_off_between_its_thresholds() -> None:
    even = tuple(step / 10 for step in range(10))
    profile = Profile(even, even, (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    for error in (0.0, 0.01, 0.02, 0.07, 0.33, 0.95, 1.0, 2.0):
        assert profile.threshold(error) == pytest.approx(max(1 - error, 0.0))
    assert profile.ranks(0.45) == Ranks(6, 6) and profile.ranks(2.0) == Ranks(1, 1)


@pytest.mark.parametrize("architecture", ["llama", "mqa"])
def test_errors_are_those_of_the_layers_output_with_exact_inputs(architecture: str) -> None:
    model, trace = tiny(architecture), trace_of(architecture, TOKENS)
    profiles = profiles_of(Study(trace, model))
    assert all(not layer._forward_hooks for layer in model.model.layers)
    probes = torch.linspace(0, TOKENS - 1, 16).long()
    with torch.no_grad():
        entering = model(trace.ids[None], output_hidden_states=True).hidden_states
    for layer in trace.layers:
        module, spaces = model.model.layers[layer.index], spaces_of(layer)
        profile = profiles[layer.index]
        ranks = ranks_at(profile.keys, profile.values, 0.8)
        keys, values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
        cos, sin = layer.rotation(torch.arange(TOKENS))
        for head in range(layer.kv_heads):
            keys[head] = nearest(turned_back(layer)[head], spaces.keys[head, : ranks.keys])
            values[head] = nearest(layer.values[head], spaces.values[head, : ranks.values])
        outputs = []
        for k, v in ((layer.keys, layer.values), (rotate(keys, cos, sin), values)):
            attended = causal_attention(layer.queries, k, v, layer.scoring)[:, probes]
            with torch.no_grad():
                hidden = entering[layer.index][0, probes] + module.self_attn.o_proj(attended.transpose(0, 1).flatten(1))
                outputs.append(hidden + module.mlp(module.post_attention_layernorm(hidden)))
        exact, low = outputs
        want = ((low - exact).norm(dim=1) / exact.norm(dim=1)).mean()
        assert profile.errors[4] == pytest.approx(float(want), rel=1e-3)


def test_every_layer_makes_the_same_error_at_the_lowest_ranks_that_allow_it() -> None:
    trace, model = trace_of(tokens=400), tiny("llama")
    profiles = profiles_of(Study(trace, model))
    error = 0.08  # at which the ranks cost less than the uncompressed cache
    form = plan_of(EigenAttention(error=error), tokens=400).format
    assert isinstance(form, LowRankFormat) and form.queries and form.window == 0
    assert form.ranks == {layer: profile.ranks(error) for layer, profile in profiles.items()}
    assert len(set(form.ranks.values())) > 1


def test_a_budget_sets_the_error_of_all_layers() -> None:
    errors = []
    for budget in (0.9, 0.7, 0.5, 0.3):
        plan = plan_of(EigenAttention(budget=budget))
        assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= budget * plan.full_nbytes
        assert plan.share > budget - 0.05
        errors.append(float(plan.error.mean()))
    assert errors == sorted(errors)
    assert isinstance(plan_of(EigenAttention(budget=1.0)).format, DenseFormat)
    assert 0.55 < plan_of(EigenAttention()).share <= 0.6


def test_without_a_model_the_error_is_what_the_threshold_leaves_out() -> None:
    plan = make_plan(trace_of("mha", TOKENS), [EigenAttention(error=0.2)], torch.bfloat16)
    assert isinstance(plan.format, LowRankFormat)
    for layer in plan.trace.layers:
        sizes = torch.linalg.svdvals(layer.values.double())
        share = (sizes.cumsum(dim=1) / sizes.sum(dim=1, keepdim=True)).amin(dim=0)
        rank = plan.format.ranks_of(layer.index).values
        assert share[rank - 1] >= 0.8 - 1e-6 and (rank == 1 or share[rank - 2] < 0.8 + 1e-6)


# -- CSKV


def test_cskv_keeps_a_fifth_of_older_channels_and_what_fills_no_window_whole() -> None:
    plan = plan_of(CSKV(window=20), dtype=torch.float32)
    layer = plan.trace.layers[1]
    store = plan.store(layer)
    assert isinstance(store, LowRankStore)
    assert store.older[0].view().shape == (1, 80, 2 * 3)  # type: ignore[union-attr]
    assert torch.equal(store.newer[0].view(), layer.keys[:, 80:])
    assert torch.equal(store.newer[1].view(), layer.values[:, 80:])


def test_cskv_lets_a_window_fill_and_leave_together() -> None:
    # As in the authors' code: the token that fills the window still attends to it whole.
    plan = plan_of(CSKV(window=20), dtype=torch.float32)
    store = plan.store(plan.trace.layers[1])
    assert isinstance(store, LowRankStore)
    lengths = []
    for step in range(22):
        keys = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(step))
        store.append(keys[0], keys[1], torch.tensor([TOKENS + step]))
        assert torch.equal(store.contents(torch.float32).keys[:, -1], keys[0, :, 0])
        store.attend(torch.zeros(4, 1, 16), torch.tensor([TOKENS + step]), Scoring(1.0))
        lengths.append(store.newer[0].longest)
    assert lengths == [*range(11, 20), *range(20), *range(3)][:22]


def test_cskv_shortens_its_window_when_a_fifth_of_the_channels_is_too_much() -> None:
    forms = [plan_of(CSKV(budget=budget), tokens=220).format for budget in (0.8, 0.5, 0.35, 0.15)]
    found = [(form.ranks_of(0).keys, form.group) for form in forms if isinstance(form, LowRankFormat)]
    assert len(found) == 4 and found[0][1] == found[1][1] == 32 and found[0][0] > found[1][0] and found[3][1] < 32
    fixed = plan_of(CSKV(kept=20, budget=0.3), tokens=220).format
    assert isinstance(fixed, LowRankFormat) and fixed.ranks == Ranks(3, 3) and fixed.group < 32


def test_four_bits_hold_more_ranks_in_the_same_bytes_and_lose_less() -> None:
    whole, packed = (plan_of(CSKV(budget=0.35, window=8, bits=bits), tokens=400) for bits in (16, 4))
    assert packed.format.ranks_of(0).keys > 1.5 * whole.format.ranks_of(0).keys  # type: ignore[attr-defined]
    assert packed.nbytes <= 0.35 * packed.full_nbytes
    assert packed.error.mean() < whole.error.mean()


def test_the_window_is_what_saves_the_newest_tokens() -> None:
    without, beside = (plan_of(CSKV(kept=20, window=window)) for window in (0, 16))
    assert beside.error.mean() < without.error.mean()


# -- both


@pytest.mark.parametrize("method", [EigenAttention(), CSKV(window=8), CSKV(window=8, bits=4)])
def test_they_combine_with_a_selection_that_differs_from_head_to_head(method: Any) -> None:
    trace, model = trace_of(tokens=200), tiny("llama")
    alone = make_plan(trace, [SnapKV(window=8, budget=0.5), AdaKV()], torch.bfloat16, model=model)
    plan = make_plan(trace, [SnapKV(window=8, budget=0.5), AdaKV(), method], torch.bfloat16, model=model)
    assert torch.equal(plan.tiers, alone.tiers) and plan.nbytes < alone.nbytes
    stores = plan.stores()
    assert sum(store.nbytes for store in stores) == plan.nbytes
    decoder = Decoder(model, stores, 200)
    for step in range(12):
        assert bool(decoder.feed(torch.tensor([step])).isfinite().all())
    assert all(int(row[-1]) == 211 for store in stores for row in store.positions)


@pytest.mark.parametrize("method", [EigenAttention, CSKV])
def test_they_keep_every_token_and_refuse_a_number_of_tokens(method: Any) -> None:
    with pytest.raises(BadBudget, match="keeps every token"):
        plan_of(method(budget="20 tokens"))


@pytest.mark.parametrize("method", [EigenAttention, CSKV])
def test_a_prompt_too_short_to_gain_by_it_stays_as_it_is(method: Any) -> None:
    assert isinstance(plan_of(method(budget=1.0), tokens=3).format, DenseFormat)
