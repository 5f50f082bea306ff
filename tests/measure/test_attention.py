"""Attention measures against the full softmax matrix, computed the plain way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from workbench.core.attention_rows import head_groups
from workbench.errors import BadParameter, BudgetTooSmall, Cancelled, InputError
from workbench.measure import (
    GridOfMaps,
    LiveBytes,
    PooledMap,
    attention_rows,
    column_sums,
    head_stats,
    pooled_map,
    pooled_maps,
    queries_per_key,
    row_blocks,
    row_entropy,
    sink_mass,
)
from workbench.progress import Progress
from workbench.registry import find, registered
from workbench_kernels import Scoring


def full_attention(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[h, nq, nk] float64, every step spelled out; key_positions [nk] or [k, nk]."""
    h, k = queries.shape[0], keys.shape[0]
    result = []
    for head in range(h):
        kv = head // (h // k)
        held = key_positions if key_positions.ndim == 1 else key_positions[kv]
        scores = queries[head].double() @ keys[kv].double().T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = query_positions[:, None] - held[None, :]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        result.append(torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0))
    return torch.stack(result)


def some(seed: int, h: int, k: int, nq: int, nk: int, d: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(h, nq, d, generator=generator), torch.randn(k, nk, d, generator=generator)


def some_positions(seed: int, *shape: int, span: int) -> Tensor:
    """Distinct ascending positions below span, a different choice in each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape[:-1], span, generator=generator).argsort(-1)[..., : shape[-1]].sort(-1).values


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 30)
)  # k, group, nq, more keys
windows = st.none() | st.integers(1, 50)
# Small enough that even these small matrices are cut into several blocks.
blocks = st.sampled_from([1, 200, 2000, 2**26])


@settings(deadline=None, max_examples=80)
@given(shapes, windows, st.none() | st.floats(0.5, 30), blocks, st.integers(0, 99))
def test_rows_equal_the_full_softmax(shape, window, softcap, block_bytes, seed):
    k, group, nq, more = shape
    nk = nq + more
    queries, keys = some(seed, k * group, k, nq, nk)
    expected = full_attention(queries, keys, 0.3, torch.arange(more, nk), torch.arange(nk), window, softcap)
    seen = 0
    for rows, probs in attention_rows(queries, keys, Scoring(0.3, window, softcap), block_bytes=block_bytes):
        assert rows.start == seen and probs.shape == (k * group, rows.stop - rows.start, nk)
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.double(), expected[:, rows], atol=1e-5, rtol=0)
        seen = rows.stop
    assert seen == nq


@settings(deadline=None, max_examples=60)
@given(shapes, windows, blocks, st.integers(0, 99))
def test_rows_follow_true_positions_of_each_kv_head_after_eviction(shape, window, block_bytes, seed):
    k, group, nq, more = shape
    nk = 1 + more
    queries, keys = some(seed, k * group, k, nq, nk)
    held = some_positions(seed, k, nk, span=80)
    at = some_positions(seed + 1, nq, span=80)
    expected = full_attention(queries, keys, 0.3, at, held, window)
    options = {
        "scoring": Scoring(0.3, window),
        "block_bytes": block_bytes,
        "query_positions": at,
        "key_positions": held,
    }
    probs = torch.cat([p for _, p in attention_rows(queries, keys, **options)], dim=1)
    torch.testing.assert_close(probs.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(column_sums(queries, keys, **options).double(), expected.sum(1), atol=1e-4, rtol=0)
    visible = full_attention(torch.zeros_like(queries[::group]), keys, 1.0, at, held, window) > 0
    assert torch.equal(queries_per_key(nq, nk, query_positions=at, key_positions=held, window=window), visible.sum(1))


def test_blocks_stop_at_the_last_visible_key():
    queries, keys = some(0, 2, 1, 64, 64)
    widths = [block.probs.shape[-1] for block in row_blocks(queries, keys, Scoring(1.0), block_bytes=2 * 64 * 4 * 8)]
    assert widths == list(range(8, 65, 8))
    windowed = row_blocks(queries, keys, Scoring(1.0, 8), block_bytes=2 * 64 * 4 * 8)
    assert max(block.probs.shape[-1] for block in windowed) == 15


def test_rows_stay_valid_after_the_next_block_is_made():
    queries, keys = some(0, 2, 1, 64, 64)
    kept = list(attention_rows(queries, keys, Scoring(1.0), block_bytes=4096))
    assert len(kept) > 1
    for rows, probs in kept:
        later = full_attention(queries, keys, 1.0, torch.arange(64), torch.arange(64))[:, rows]
        torch.testing.assert_close(probs.double(), later, atol=1e-5, rtol=0)


def test_inputs_are_left_as_they_were_and_no_graph_is_kept():
    queries, keys = some(0, 2, 1, 20, 20)
    queries.requires_grad_()
    before = queries.detach().clone(), keys.clone()
    sums = column_sums(queries, keys, Scoring(1.0, softcap=5.0))
    assert not sums.requires_grad
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_computed_in_float32(dtype):
    queries, keys = (x.to(dtype) for x in some(0, 4, 2, 30, 30))
    sums = column_sums(queries, keys, Scoring(0.3))
    expected = full_attention(queries, keys, 0.3, torch.arange(30), torch.arange(30)).sum(1)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, atol=1e-4, rtol=0)


def test_strided_inputs_are_read_correctly():
    queries, keys = some(0, 4, 2, 30, 30)
    strided = column_sums(queries.transpose(0, 1).contiguous().transpose(0, 1), keys.mT.contiguous().mT, Scoring(0.3))
    torch.testing.assert_close(strided, column_sums(queries, keys, Scoring(0.3)))


@settings(deadline=None, max_examples=60)
@given(shapes, windows, blocks, st.integers(0, 99))
def test_sums_and_entropies_equal_those_of_the_full_matrix(shape, window, block_bytes, seed):
    k, group, nq, more = shape
    nk = nq + more
    queries, keys = some(seed, k * group, k, nq, nk)
    options = {"scoring": Scoring(0.3, window), "block_bytes": block_bytes}
    expected = full_attention(queries, keys, 0.3, torch.arange(more, nk), torch.arange(nk), window)
    sums = column_sums(queries, keys, **options).double()
    torch.testing.assert_close(sums, expected.sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(sums.sum(1), torch.full((k * group,), float(nq)).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        row_entropy(queries, keys, **options).double(), torch.special.entr(expected).sum(-1), atol=1e-4, rtol=0
    )
    after = max(0, 4 - more)
    mass = expected[:, after:, :4].sum(-1).mean(-1)
    torch.testing.assert_close(sink_mass(queries, keys, **options).double(), mass, atol=1e-5, rtol=0, equal_nan=True)


def test_equal_keys_give_the_largest_entropy_and_one_strong_key_the_smallest():
    queries, keys = torch.ones(1, 16, 4), torch.zeros(1, 16, 4)
    expected = torch.tensor([math.log(i + 1) for i in range(16)])
    torch.testing.assert_close(row_entropy(queries, keys, Scoring(1.0))[0], expected)
    keys[0, 0] = 100.0
    assert row_entropy(queries, keys, Scoring(1.0)).abs().max() < 1e-6
    assert sink_mass(queries, keys, Scoring(1.0), first=1).item() == pytest.approx(1.0)


def test_sinks_are_found_by_position_not_by_slot():
    queries, keys = some(0, 2, 1, 6, 6)
    held = torch.arange(10, 16)  # the first tokens were evicted
    mass = sink_mass(queries, keys, Scoring(1.0), query_positions=held, key_positions=held)
    assert torch.equal(mass, torch.zeros(2))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 70),
    st.integers(0, 20),
    st.integers(1, 80),
    st.sampled_from(["max", "mean", "sum"]),
    windows,
    blocks,
    st.data(),
)
def test_pooled_maps_equal_pooling_the_full_matrix(nq, more, pixels, pooling, window, block_bytes, data):
    nk = nq + more
    queries, keys = some(nq, 1, 1, nq, nk)
    full = full_attention(queries, keys, 0.3, torch.arange(more, nk), torch.arange(nk), window)[0]
    spans = []
    for begin, end in ((more, nk), (0, nk)):
        a = data.draw(st.integers(begin, end - 1))
        spans.append(data.draw(st.none() | st.tuples(st.just(a), st.integers(a + 1, end))))
    pooled = pooled_map(
        queries[0],
        keys[0],
        Scoring(0.3, window),
        pixels=pixels,
        pooling=pooling,
        rows=spans[0],
        cols=spans[1],
        block_bytes=block_bytes,
    )
    rows, cols = spans[0] or (more, nk), spans[1] or (0, nk)
    for edges, span in ((pooled.row_edges, rows), (pooled.col_edges, cols)):
        sizes = edges.diff()
        assert (edges[0].item(), edges[-1].item()) == span
        assert len(sizes) == min(pixels, span[1] - span[0])
        assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
    reduce = {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}[pooling]
    expected = torch.stack(
        [
            torch.stack([reduce(full[a - more : b - more, c:d], dim=(0, 1)) for c, d in pairs(pooled.col_edges)])
            for a, b in pairs(pooled.row_edges)
        ]
    )
    assert pooled.values.dtype == torch.float32
    torch.testing.assert_close(pooled.values.double(), expected, atol=1e-5, rtol=1e-5)


def pairs(edges: Tensor) -> list[tuple[int, int]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def test_a_map_that_fits_is_the_exact_matrix():
    queries, keys = some(0, 1, 1, 100, 100)
    pooled = pooled_map(queries[0], keys[0], Scoring(0.3), pixels=100)
    full = full_attention(queries, keys, 0.3, torch.arange(100), torch.arange(100))[0]
    torch.testing.assert_close(pooled.values.double(), full, atol=1e-6, rtol=0)


def test_maps_of_full_and_evicted_caches_lie_over_each_other():
    queries, keys = some(0, 1, 1, 50, 50)
    kept = torch.tensor([0, 1, 7, 20, 33, 34, 45, 46, 47, 48, 49])
    full = pooled_map(queries[0], keys[0], Scoring(0.3))
    evicted = pooled_map(queries[0], keys[0, kept], Scoring(0.3), query_positions=torch.arange(50), key_positions=kept)
    assert torch.equal(full.col_edges, evicted.col_edges) and torch.equal(full.row_edges, evicted.row_edges)
    gone = torch.ones(50, dtype=torch.bool).index_fill(0, kept, False)
    assert evicted.values[:, gone].abs().max() == 0
    expected = full_attention(queries, keys[:, kept], 0.3, torch.arange(50), kept)[0]
    torch.testing.assert_close(evicted.values[:, kept].double(), expected, atol=1e-6, rtol=0)


def pooled_by_hand(full: Tensor, pooled: PooledMap, held: list[int]) -> Tensor:
    """Pool full [nq, m] of queries 0 .. nq - 1 and keys at positions `held`, cell by cell and weight by weight."""
    found = []
    for a, b in pairs(pooled.row_edges):
        row = []
        for c, d in pairs(pooled.col_edges):
            inside = [full[i, j].item() for i in range(a, b) for j, at in enumerate(held) if c <= at < d]
            row.append(
                max(inside, default=0.0)
                if pooled.pooling == "max"
                else sum(inside) / ((b - a) * (d - c) if pooled.pooling == "mean" else 1)
            )
        found.append(row)
    return torch.tensor(found, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)),
    st.sampled_from(["max", "mean", "sum"]),
    st.integers(1, 12),
    st.integers(1, 40),
    windows,
    blocks,
    st.data(),
)
def test_maps_of_all_heads_equal_pooling_each_full_matrix(shape, pooling, pixels, kept, window, block_bytes, data):
    k, group, n = shape
    kept = min(kept, n)
    queries, keys = some(n, k * group, k, n, kept)
    held = some_positions(kept, k, kept, span=n)
    at = torch.arange(n)
    begin, end = (data.draw(st.integers(0, n - 1)) for _ in range(2))
    cols = data.draw(st.sampled_from([(0, n), (min(begin, end), max(begin, end) + 1)]))
    maps = pooled_maps(
        queries,
        keys,
        Scoring(0.3, window),
        pixels=pixels,
        pooling=pooling,
        query_positions=at,
        key_positions=held,
        cols=cols,
        block_bytes=block_bytes,
    )
    full = full_attention(queries, keys, 0.3, at, held, window)
    assert len(maps) == k * group
    for head, pooled in enumerate(maps):
        assert (pooled.col_edges[0].item(), pooled.col_edges[-1].item()) == cols
        expected = pooled_by_hand(full[head], pooled, held[head // group].tolist())
        torch.testing.assert_close(pooled.values.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own_positions", [False, True])
def test_long_prompts_go_through_kv_heads_one_by_one_with_the_same_results(own_positions, monkeypatch):
    queries, keys = some(0, 4, 2, 40, 40)
    held = some_positions(0, 2, 30, span=40) if own_positions else some_positions(0, 30, span=40)
    options = {"scoring": Scoring(0.3), "query_positions": torch.arange(40), "key_positions": held}
    ids = torch.arange(40) % 7

    def everything(progress: Progress | None = None) -> list[Tensor]:
        stats, received = head_stats(queries, keys[:, :30], ids, progress=progress, **options)
        maps = pooled_maps(queries, keys[:, :30], pixels=9, progress=progress, **options)
        sums = column_sums(queries, keys[:, :30], progress=progress, **options)
        return [received, sums, stats.entropy, stats.profile, stats.retrieval, *(each.values for each in maps)]

    whole = everything()
    monkeypatch.setattr("workbench.core.attention_rows._CPU_CACHE_BYTES", 4096)
    assert [part.heads for part in head_groups(queries, keys)] == [slice(0, 2), slice(2, 4)]
    reports: list[tuple[int, int]] = []
    parted = everything(Progress(lambda stage, done, total: reports.append((done, total))))
    for one, other in zip(whole, parted, strict=True):
        torch.testing.assert_close(one, other)
    assert reports[0][0] == 0 and reports[-1][0] == reports[-1][1]
    assert [done for done, _ in reports[: len(reports) // 3]] == sorted(
        done for done, _ in reports[: len(reports) // 3]
    )


def test_a_difference_is_taken_cell_by_cell_and_only_on_the_same_cells():
    queries, keys = some(0, 1, 1, 40, 40)
    kept = torch.tensor([0, 1, 20, 30, 38, 39])
    full = pooled_map(queries[0], keys[0], Scoring(0.3), pixels=8)
    evicted = pooled_map(
        queries[0], keys[0, kept], Scoring(0.3), pixels=8, query_positions=torch.arange(40), key_positions=kept
    )
    less = evicted.minus(full)
    torch.testing.assert_close(less.values + full.values, evicted.values)
    assert less.values.min() < 0 < less.values.max()
    assert not full.minus(full).values.any()
    with pytest.raises(InputError, match="8 cells and 0 to 40 in 10 cells"):
        full.minus(pooled_map(queries[0], keys[0], Scoring(0.3), pixels=10))
    with pytest.raises(InputError, match="col_edges are 0 to 40"):
        full.minus(pooled_map(queries[0], keys[0], Scoring(0.3), pixels=8, cols=(0, 20)))
    with pytest.raises(InputError, match="pooled by max, the other by sum"):
        full.minus(pooled_map(queries[0], keys[0], Scoring(0.3), pixels=8, pooling="sum"))


def test_maps_as_data_hold_every_cell():
    queries, keys = some(0, 1, 1, 20, 20)
    pooled = pooled_map(queries[0], keys[0], Scoring(0.3), pixels=7, cols=(3, 20))
    frame = pooled.to_frame()
    assert len(frame) == 49
    for cell in frame.itertuples():
        row, col = pooled.row_edges.tolist().index(cell.row_from), pooled.col_edges.tolist().index(cell.col_from)
        assert (cell.row_to, cell.col_to) == (pooled.row_edges[row + 1], pooled.col_edges[col + 1])
        assert cell.value == pooled.values[row, col]
    data = json.loads(json.dumps(pooled.to_dict(), allow_nan=False))
    assert data["pooling"] == "max" and data["col_edges"] == pooled.col_edges.tolist()
    torch.testing.assert_close(torch.tensor(data["values"]), pooled.values)


def test_memory_does_not_grow_with_the_square_of_the_length():
    n, d, mib = 8192, 64, 2**20
    queries, keys = some(0, 1, 1, n, n, d)
    full_matrix = n * n * 4
    with LiveBytes() as live:
        pooled_map(queries[0], keys[0], Scoring(0.1), pixels=256)
    pooled_peak = live.peak
    with LiveBytes() as live:
        column_sums(queries, keys, Scoring(0.1))
    # Three blocks of at most 8 MiB, the cells, and a few vectors of length n.
    assert max(pooled_peak, live.peak) < 28 * mib < full_matrix / 9
    with LiveBytes() as live:
        column_sums(queries, keys, Scoring(0.1), block_bytes=mib)
    assert live.peak < 4 * mib


@pytest.mark.parametrize(
    ("queries", "keys", "options", "message"),
    [
        ((2, 5, 4), (1, 5, 8), {}, "head size"),
        ((3, 5, 4), (2, 5, 4), {}, "multiple"),
        ((5, 4), (5, 4), {}, r"\[h, nq, d\]"),
        ((1, 9, 4), (1, 5, 4), {}, "query_positions"),
        ((1, 5, 4), (1, 5, 4), {"key_positions": torch.tensor([0, 2, 1, 3, 4])}, "ascend"),
        ((1, 5, 4), (1, 5, 4), {"key_positions": torch.arange(4)}, "4 entries for 5"),
        ((2, 5, 4), (2, 5, 4), {"key_positions": torch.arange(5).repeat(2, 1)}, "query_positions"),
        ((1, 5, 4), (1, 5, 4), {"scoring": Scoring(1.0, 0)}, "window"),
        ((1, 5, 4), (1, 5, 4), {"scoring": Scoring(1.0, softcap=0.0)}, "softcap"),
    ],
)
def test_what_does_not_fit_together_is_refused(queries, keys, options, message):
    with pytest.raises(InputError, match=message):
        list(attention_rows(torch.zeros(queries), torch.zeros(keys), **{"scoring": Scoring(1.0), **options}))


@pytest.mark.parametrize("options", [{"pixels": 0}, {"pooling": "median"}, {"rows": (3, 3)}, {"cols": (5, 2)}])
def test_maps_refuse_impossible_requests(options):
    with pytest.raises(BadParameter):
        pooled_map(torch.zeros(5, 4), torch.zeros(5, 4), Scoring(1.0), **options)


def test_long_work_reports_and_can_be_cancelled():
    queries, keys = some(0, 1, 1, 64, 64)
    reports: list[tuple[int, int]] = []
    progress = Progress(lambda stage, done, total: reports.append((done, total)))
    column_sums(queries, keys, Scoring(1.0), block_bytes=4096, progress=progress)
    assert reports == [(done, 4) for done in range(5)]  # 16 rows of 64 keys make 4096 bytes
    progress.cancel()
    with pytest.raises(Cancelled):
        column_sums(queries, keys, Scoring(1.0), progress=progress)


# --- in a session


def tiny_gemma2() -> PreTrainedModel:
    """A random Gemma 2 whose soft cap is low enough to be felt; every other layer slides."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        attn_logit_softcapping=1.5,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "mqa", "gemma2", "gemma3"])  # shared KV heads, soft caps, sliding windows
def session(request: pytest.FixtureRequest, tiny_model: Callable[[str], PreTrainedModel]) -> wb.Session:
    made = wb.Session((tiny_gemma2() if request.param == "gemma2" else tiny_model(request.param), None))
    trace = made.read(torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)))
    assert (trace.layers[0].softcap == 1.5) == (request.param == "gemma2")
    return made


RECIPES: list[tuple[Any, dict[str, Any]]] = [
    (None, {}),
    ("snapkv", {"budget": 0.6, "window": 8}),
    ("kivi", {"bits": 2, "group": 16, "residual": 16}),
    (["snapkv", "kivi"], {"budget": 0.5}),
    ("masformer", {"window": 16}),
]


def expected_rows(session: wb.Session, recipe: Any, options: dict[str, Any], layer: int) -> tuple[Tensor, list[Tensor]]:
    """The full matrix of a layer [h, n, n] under a recipe, and the positions of each KV head, from its stores."""
    spec = wb.Recipe.of(recipe or "full", **options)
    plan = session.plan(spec)
    part, at = plan.trace.layers[layer], torch.arange(60)
    full, places = torch.zeros(part.heads, 60, 60, dtype=torch.float64), []
    held = plan.store(part).contents(torch.float32)
    for kv in range(part.kv_heads):
        if layer in plan.exact or recipe in (None, "masformer"):
            place, keys = at, part.keys[kv]
        elif recipe == "snapkv":
            place = plan.kept(layer, kv)
            keys = part.keys[kv, place]
        else:
            place = held.positions.expand(part.kv_heads, -1)[kv].long()
            real = torch.ones_like(place, dtype=torch.bool) if held.valid is None else held.valid[kv]
            place, keys = place[real], held.keys[kv, real]
            order = place.argsort()
            place, keys = place[order], keys[order]
        own = slice(kv * part.groups, (kv + 1) * part.groups)
        full[own][..., place] = full_attention(
            part.queries[own], keys[None], part.scale, at, place, part.window, part.softcap
        )
        places.append(place)
    return full, places


@pytest.mark.parametrize(("recipe", "options"), RECIPES, ids=str)
def test_maps_of_a_recipe_are_exact_at_every_zoom(session: wb.Session, recipe: Any, options: dict[str, Any]) -> None:
    for layer in range(session.facts.layers):
        full, _ = expected_rows(session, recipe, options, layer)
        for head in range(session.facts.heads):
            whole = session.attention(layer, head, recipe, **options)
            torch.testing.assert_close(whole.values.double(), full[head], atol=1e-5, rtol=0)
            zoomed = session.attention(layer, head, recipe, rows=(20, 31), cols=(3, 25), **options)
            assert zoomed.values.shape == (11, 22)
            torch.testing.assert_close(zoomed.values.double(), full[head, 20:31, 3:25], atol=1e-5, rtol=0)
            coarse = session.attention(layer, head, recipe, pixels=9, pooling="mean", **options)
            by_hand = pooled_by_hand(full[head], coarse, list(range(60)))
            torch.testing.assert_close(coarse.values.double(), by_hand, atol=1e-5, rtol=0)
            received = session.received(layer, head, recipe, **options)
            torch.testing.assert_close(received.double(), full[head].sum(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            session.received(layer, recipe=recipe, **options).double(), full.sum(1).mean(0), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(("recipe", "options"), RECIPES, ids=str)
@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
def test_the_grid_holds_the_map_of_every_head(
    session: wb.Session, recipe: Any, options: dict[str, Any], pooling: Any
) -> None:
    grid = session.attention_grid(recipe, pixels=8, pooling=pooling, **options)
    facts = session.facts
    assert grid.values.shape == (facts.layers, facts.heads, 8, 8)
    for layer in range(facts.layers):
        for head in range(facts.heads):
            alone = session.attention(layer, head, recipe, pixels=8, pooling=pooling, **options)
            torch.testing.assert_close(grid.map(layer, head).values, alone.values)
            assert not grid.map(layer, head).minus(alone).values.abs().gt(1e-5).any()


def test_few_bits_are_seen_in_the_map(session: wb.Session) -> None:
    layer = next(layer.index for layer in session.trace.compressible)  # type: ignore[union-attr]
    errors = []
    for bits in (2, 4, 8):
        found = session.attention(layer, 0, "kivi", bits=bits, group=16, residual=16, budget=1.0)
        errors.append(found.minus(session.attention(layer, 0)).values.abs().max().item())
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("key", [cls.key for cls in registered("kv")])
def test_every_method_has_maps_whose_rows_add_up_and_show_only_what_is_held(
    tiny_llama: PreTrainedModel, key: str
) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)))
    try:
        plan = session.plan(key, **({"budget": 0.6} if find(key).takes_budget() else {}))
    except BudgetTooSmall as refusal:
        plan = session.plan(key, budget=refusal.smallest)
    options = {"budget": plan.methods[0].effective_budget} if find(key).takes_budget() else {}
    grid = session.attention_grid(key, pixels=60, **options).values
    sums = grid.sum(-1)  # [l, h, n]
    groups = session.facts.heads // session.facts.kv_heads
    held = (plan.tiers > 0).repeat_interleave(groups, dim=1)  # [l, h, n]
    torch.testing.assert_close(sums, (held.cumsum(-1) > 0).float(), atol=1e-5, rtol=0)
    assert not grid.transpose(2, 3)[~held].any()


def test_grids_are_subtracted_on_the_same_cells_only(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(torch.arange(60))
    full, half = session.attention_grid(pixels=6), session.attention_grid("snapkv", budget=0.5, window=8, pixels=6)
    less = half.minus(full)
    assert isinstance(less, GridOfMaps) and less.values.abs().max() > 0.01
    torch.testing.assert_close(less.map(1, 2).values, half.map(1, 2).minus(full.map(1, 2)).values)
    with pytest.raises(InputError, match="pixels"):
        full.minus(session.attention_grid(pixels=5))
    with pytest.raises(BadParameter, match="layer 9"):
        full.map(9, 0)
    assert json.loads(json.dumps(full.to_dict(), allow_nan=False))["row_edges"] == full.row_edges.tolist()


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.attention_grid(pixels=0),
        lambda s: s.attention_grid(pooling="median"),
        lambda s: s.received(99),
        lambda s: s.received(0, 99),
    ],
)
def test_maps_that_do_not_exist_are_refused(tiny_llama: PreTrainedModel, ask: Callable[[wb.Session], Any]) -> None:
    session = wb.Session((tiny_llama, None))
    session.read(torch.arange(20))
    with pytest.raises(BadParameter):
        ask(session)
