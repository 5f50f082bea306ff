"""Reading a layer's attention: the plain reference against the whole matrix, the kernels against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench.measure.attention import column_sums, pooled_maps, row_entropy
from workbench_kernels import Reading, read_attention
from workbench_kernels.scoring import Scoring


def layer(
    h: int = 2, k: int = 1, n: int = 40, m: int | None = None, d: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    query = 2 * torch.randn(h, n, d, generator=generator)
    return query.to(dtype), torch.randn(k, m or n, d, generator=generator).to(dtype)


def whole(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """The scores of all rows and keys in float64, [h, n, m]."""
    (h, n, _), (k, m, _) = query.shape, key.shape
    scores = query.double() @ key.double().repeat_interleave(h // k, dim=0).transpose(1, 2) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    for i in range(n):
        for j in range(m):
            behind = m - n + i - j
            if behind < 0 or (scoring.window is not None and behind >= scoring.window):
                scores[:, i, j] = -math.inf
    return scores


def expected(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    rows: tuple[int, int] | None = None,
    pooling: str | None = None,
    pixels: int = 512,
) -> Reading:
    scores = whole(query, key, scoring)
    probs = scores.softmax(-1)
    counted = probs if rows is None else probs[:, rows[0] : rows[1]]
    cells = None
    if pooling is not None:
        (h, n, m), height = probs.shape, min(pixels, probs.shape[1])
        width = min(pixels, m)
        cells = torch.zeros(h, height, width, dtype=torch.float64)
        for i in range(height):
            for j in range(width):
                block = probs[:, i * n // height : (i + 1) * n // height, j * m // width : (j + 1) * m // width]
                flat = block.flatten(1)
                cells[:, i, j] = {"max": flat.amax(1), "mean": flat.mean(1), "sum": flat.sum(1)}[pooling]
    entropy = torch.special.entr(probs).sum(-1)
    return Reading(scores.logsumexp(-1), counted.sum(1), counted.amax(1), entropy, cells)


def assert_same(found: Reading, wanted: Reading, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    for name, ours, theirs in zip(Reading._fields, found, wanted, strict=True):
        if ours is not None:
            assert ours.dtype == torch.float32, name
            torch.testing.assert_close(
                ours.double(), theirs, atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}"
            )


CASES: list[dict[str, Any]] = [
    {},
    {"m": 57},
    {"h": 6, "k": 2, "n": 33},
    {"window": 7},
    {"window": 20, "m": 64},
    {"softcap": 3.0},
    {"softcap": 3.0, "window": 9, "pooling": "max", "pixels": 2},
    {"rows": (30, 37), "most": True},
    {"rows": (0, 1), "m": 50, "most": True},
    {"n": 1, "m": 45, "most": True},
    {"n": 1, "m": 1, "pooling": "sum"},
    {"d": 24, "n": 21},
    {"pooling": "max", "pixels": 512},  # cells of one position each
    {"pooling": "sum", "n": 64, "pixels": 4},  # even cells of whole tiles
    {"pooling": "max", "n": 64, "pixels": 2},
    {"pooling": "mean", "n": 64, "pixels": 16},  # even cells, four in a tile
    {"pooling": "mean", "n": 61, "pixels": 3},  # cells that end within tiles
    {"pooling": "max", "n": 61, "pixels": 3},
    {"pooling": "sum", "n": 61, "pixels": 11},  # several cells in a tile, of different size
    {"pooling": "max", "n": 90, "pixels": 2, "h": 3},  # several programs a cell
    {"pooling": "mean", "n": 70, "m": 90, "pixels": 1, "h": 2},
    {"pooling": "max", "n": 50, "m": 90, "pixels": 7, "window": 11},
]


def split(case: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]:
    """Queries and keys, what the attention is like, and what else is to be read of it."""
    shape = {name: case[name] for name in ("h", "k", "n", "m", "d", "dtype") if name in case}
    how = {name: case[name] for name in ("rows", "pooling", "pixels") if name in case}
    query, key = layer(**shape)
    scoring = Scoring(query.shape[2] ** -0.5, case.get("window"), case.get("softcap"))
    return query, key, {"scoring": scoring, **how}, {"most": case.get("most", False)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_reads_what_the_whole_matrix_holds(case: dict[str, Any]) -> None:
    query, key, how, more = split(case)
    wanted = expected(query, key, **how)
    assert_same(read_attention(query, key, **how, **more, entropy=True), wanted)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = layer(4, 2, 50)
    wanted = expected(query, key, Scoring(0.25), rows=(3, 30))
    monkeypatch.setattr("workbench_kernels.attention_statistics._ROWS_BYTES", 4 * 4 * 50 * 7)  # seven rows a block
    found = read_attention.reference(query, key, Scoring(0.25), rows=(3, 30), most=True, entropy=True)
    assert_same(found, wanted)


def test_it_agrees_with_what_the_workbench_measures() -> None:
    query, key = layer(4, 2, 70)
    found = read_attention(query, key, Scoring(0.25, window=30), entropy=True, pooling="mean", pixels=9)
    how: dict[str, Any] = {"scoring": Scoring(0.25, 30)}
    torch.testing.assert_close(found.sums, column_sums(query, key, **how))
    torch.testing.assert_close(found.entropy, row_entropy(query, key, **how), atol=1e-5, rtol=1e-5)
    maps = pooled_maps(query, key, **how, pooling="mean", pixels=9)
    torch.testing.assert_close(found.cells, torch.stack([each.values for each in maps]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pixels": 1025, "pooling": "max"}, "1 to 1024"),
        ({"pooling": "median"}, "choose one of"),
        ({"pooling": "max", "rows": (0, 3)}, "a map is of all rows"),
        ({"rows": (3, 3)}, "not empty"),
        ({"rows": (0, 41)}, "within 0 and 40"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "positive"),
        ({"lse": torch.zeros(2, 39)}, "lse must be"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], said: str) -> None:
    query, key = layer()
    scoring = {name: wrong[name] for name in ("window", "softcap") if name in wrong}
    others = {name: value for name, value in wrong.items() if name not in scoring}
    with pytest.raises(ValueError, match=said):
        read_attention(query, key, Scoring(0.25, **scoring), **others)


def test_more_queries_than_keys_are_refused() -> None:
    query, key = layer(n=20)
    with pytest.raises(ValueError, match="20 queries for 19 keys"):
        read_attention(query, key[:, :19], Scoring(0.25))


# -- the kernels, interpreted


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_read_what_the_whole_matrix_holds(case: dict[str, Any]) -> None:
    from workbench_kernels.gpu.reading import read_attention as on_gpu

    query, key, how, more = split(case)
    wanted = expected(query, key, **how)
    assert_same(on_gpu(query, key, **how, **more, entropy=True), wanted)
    lse = wanted.lse.float()
    found = on_gpu(query, key, **how, **more, lse=lse, entropy=True)
    assert torch.equal(found.lse, lse)
    assert_same(found, wanted)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 96])
def test_the_kernels_take_half_precision_and_widths_that_are_no_power_of_two(dtype: torch.dtype, d: int) -> None:
    from workbench_kernels.gpu.reading import read_attention as on_gpu

    query, key = layer(3, 1, 45, d=d, dtype=dtype)
    scale = d**-0.5
    found = on_gpu(query, key, Scoring(scale), most=True, entropy=True, pooling="max", pixels=5)
    assert_same(found, expected(query, key, Scoring(scale), pooling="max", pixels=5))


@interpreted
@pytest.mark.parametrize("share", [1, 2])
def test_polynomials_are_as_good_as_exponentials_and_tiles_fold(share: int) -> None:
    from workbench_kernels.gpu.reading import Config
    from workbench_kernels.gpu.reading import read_attention as on_gpu

    query, key = layer(2, 1, 130)
    config = Config(64, 32, 4, 1, polynomial=share)  # tall enough for rows to be folded within a thread
    found = on_gpu(query, key, Scoring(0.25), most=True, pooling="sum", pixels=2, config=config)
    assert_same(found, expected(query, key, Scoring(0.25), pooling="sum", pixels=2))


@interpreted
def test_queries_and_keys_may_lie_in_any_order_in_memory() -> None:
    from workbench_kernels.gpu.reading import read_attention as on_gpu

    query, key = layer(2, 1, 40)
    wanted = expected(query, key, Scoring(0.25))
    turned = query.transpose(0, 1).contiguous().transpose(0, 1), key.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(on_gpu(*turned, Scoring(0.25)), wanted)


@interpreted
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_cells_of_several_programs_are_joined_a_few_heads_at_a_time(
    pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench_kernels.gpu import reading as gpu

    monkeypatch.setattr(gpu, "_PART_BYTES", 1)  # one KV head's
    query, key = layer(6, 3, 90)
    found = gpu.read_attention(query, key, Scoring(0.25), pooling=pooling, pixels=2)
    assert_same(found, expected(query, key, Scoring(0.25), pooling=pooling, pixels=2))


# -- where the workbench uses it


class Everywhere:
    """Stands for a GPU: every tensor counts as lying on one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.readings = 0
        monkeypatch.setattr("workbench.measure.whole_prompts.on_gpu", lambda *_: True)
        monkeypatch.setattr("workbench.measure.attention.read_attention", self.read)

    def read(self, query: Tensor, key: Tensor, scoring: Scoring, **how: Any) -> Reading:
        self.readings += 1
        return read_attention.reference(query, key, scoring, **how)


def test_on_a_gpu_whole_prompts_are_read_by_the_kernel_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = layer(4, 2, 70)
    how: dict[str, Any] = {"scoring": Scoring(0.25, softcap=5.0)}
    streamed = column_sums(query, key, **how), row_entropy(query, key, **how), pooled_maps(query, key, **how, pixels=9)
    gpu = Everywhere(monkeypatch)
    read = column_sums(query, key, **how), row_entropy(query, key, **how), pooled_maps(query, key, **how, pixels=9)
    assert gpu.readings == 3
    torch.testing.assert_close(read[0], streamed[0])
    torch.testing.assert_close(read[1], streamed[1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(read[2], streamed[2], strict=True):
        torch.testing.assert_close(ours.values, theirs.values)
        assert torch.equal(ours.row_edges, theirs.row_edges)
        assert torch.equal(ours.col_edges, theirs.col_edges)


def test_on_a_gpu_sinks_take_their_share_of_what_the_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = layer(4, 2, 50)
    scoring = Scoring(0.25, window=20, sinks=torch.tensor([-3.0, 0.0, 2.0, 30.0]))
    streamed = column_sums(query, key, scoring), row_entropy(query, key, scoring), pooled_maps(query, key, scoring)
    gpu = Everywhere(monkeypatch)
    read = column_sums(query, key, scoring), row_entropy(query, key, scoring), pooled_maps(query, key, scoring)
    assert gpu.readings == 6
    torch.testing.assert_close(read[0], streamed[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read[1], streamed[1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(read[2], streamed[2], strict=True):
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-6, rtol=1e-5)


def test_on_a_gpu_rows_are_streamed_where_only_some_tokens_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = layer(2, 1, 30)
    at = torch.tensor([*range(10), *range(12, 32)])
    how: dict[str, Any] = {"scoring": Scoring(0.25), "query_positions": at, "key_positions": at}
    streamed = column_sums(query, key, **how)
    zoomed = pooled_maps(query, key, Scoring(0.25), rows=(5, 20), pixels=4)
    gpu = Everywhere(monkeypatch)
    assert torch.equal(column_sums(query, key, **how), streamed)
    again = pooled_maps(query, key, Scoring(0.25), rows=(5, 20), pixels=4)
    assert all(torch.equal(one.values, other.values) for one, other in zip(again, zoomed, strict=True))
    assert gpu.readings == 0
