"""Where rows of a layer's attention go: the plain reference against the whole matrix, the kernel against the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from tests.kernels.test_reading import layer
from workbench_kernels.attention_statistics import RowStatistics
from workbench_kernels.row_statistics import row_statistics
from workbench_kernels.scoring import Scoring

HOW: dict[str, Any] = {"early": 4, "recent": 24, "bins": 10}


def expected(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    tokens: Tensor,
    early: int,
    recent: int,
    bins: int,
    held: Tensor | None = None,
) -> Any:
    """Every figure in float64: of all keys, from which those that were evicted are then taken."""
    (h, n, _), (k, m, _), size = query.shape, key.shape, len(tokens)
    positions = torch.arange(m)[None] if held is None else held.view(-1, m)
    positions = positions.expand(k, -1)
    products = query.double() @ key.double().repeat_interleave(h // k, dim=0).transpose(1, 2) * scoring.scale
    if scoring.softcap is not None:
        products = scoring.softcap * torch.tanh(products / scoring.softcap)
    behind = (torch.arange(size - n, size)[:, None] - positions[:, None]).repeat_interleave(h // k, dim=0)  # [h, n, m]
    hidden = (behind < 0) | (behind >= (scoring.window or size + 1))
    scores = products.masked_fill(hidden, -torch.inf)
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks.double()[:, None, None].expand(-1, n, 1)], dim=2)
    lse = scores.logsumexp(-1)
    probs = (scores[..., :m] - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    ids = tokens.tolist()
    follows = torch.zeros(h, n, dtype=torch.float64)
    for head in range(h):
        places = positions[head // (h // k)].tolist()
        for row in range(n):
            at = size - n + row
            seen = [slot for slot, j in enumerate(places) if 0 < j < at and ids[j - 1] == ids[at]]
            follows[head, row] = probs[head, row, seen].sum()
    bounds = [*(2**b for b in range(bins)), recent]
    return RowStatistics(
        lse,
        torch.special.entr(probs).sum(-1),
        (probs * behind).sum(-1),
        (probs * (behind > torch.arange(size - n, size)[:, None] - early)).sum(-1),
        follows,
        torch.stack([(probs * (behind < bound)).sum(-1) for bound in bounds], dim=1),
    )


def assert_same(found: RowStatistics, wanted: Any) -> None:
    for name, ours, theirs in zip(RowStatistics._fields, found, wanted, strict=True):
        assert ours.dtype == torch.float32, name
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


CASES: list[dict[str, Any]] = [
    {"n": 37, "words": 5},
    {"n": 1, "m": 45},
    {"n": 1, "m": 1, "bins": 1},
    {"n": 180, "h": 4, "k": 2, "words": 9},  # far enough that tiles cross one power of two
    {"n": 150, "m": 333, "d": 24},
    {"n": 170, "recent": 130},
    {"n": 170, "early": 50, "window": 90},
    {"n": 140, "window": 7, "softcap": 3.0},
    {"n": 150, "sinks": True, "window": 100},
    {"n": 90, "sinks": True, "softcap": 5.0, "h": 6, "k": 3},
    {"n": 140, "dtype": torch.bfloat16, "d": 64},
    {"n": 100, "dtype": torch.float16, "loud": 30.0},  # scores of hundreds
    {"n": 150, "m": 40, "held": 1},  # evicted: long gaps, and rows that see nothing
    {"n": 130, "m": 100, "h": 4, "k": 2, "held": 2, "words": 6, "recent": 40},
    {"n": 90, "m": 70, "h": 4, "k": 2, "held": 2, "size": 120, "window": 30},
    {"n": 60, "m": 33, "held": 1, "sinks": True, "window": 20},
    {"n": 60, "m": 1, "held": 1},
]


def split(case: dict[str, Any]) -> tuple[Tensor, Tensor, Scoring, Tensor, dict[str, Any]]:
    query, key = layer(**{name: case[name] for name in ("h", "k", "n", "m", "d", "dtype") if name in case})
    query = query * case.get("loud", 1.0)
    sinks = torch.linspace(-2, 3, len(query)) if case.get("sinks") else None
    scoring = Scoring(query.shape[2] ** -0.5, case.get("window"), case.get("softcap"), sinks)
    generator = torch.Generator().manual_seed(1)
    how = {name: case.get(name, value) for name, value in HOW.items()}
    size, m = case.get("size", max(query.shape[1], key.shape[1])), key.shape[1]
    tokens = torch.randint(0, case.get("words", 20), (size,), generator=generator)
    if "held" in case:
        held = torch.stack([torch.randperm(size, generator=generator)[:m].sort().values for _ in range(case["held"])])
        held[-1, m - m // 8 :] = size  # slots that hold nothing
        how["held"] = held[0] if len(held) == 1 else held
    return query, key, scoring, tokens, how


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_reads_what_the_whole_matrix_holds(case: dict[str, Any]) -> None:
    query, key, scoring, tokens, how = split(case)
    assert_same(row_statistics(query, key, scoring, tokens, **how), expected(query, key, scoring, tokens, **how))


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_reads_what_the_whole_matrix_holds(case: dict[str, Any]) -> None:
    from workbench_kernels.gpu.row_statistics import row_statistics as on_gpu

    query, key, scoring, tokens, how = split(case)
    assert_same(on_gpu(query, key, scoring, tokens, **how), expected(query, key, scoring, tokens, **how))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tokens": torch.zeros(39, dtype=torch.long)}, "ids of all positions"),
        ({"tokens": torch.zeros(40)}, "ids of all positions"),
        ({"held": torch.zeros(2, 40, dtype=torch.long)}, "positions .40. or .1, 40."),
        ({"early": 0}, "early is 0"),
        ({"recent": 0}, "recent is 0"),
        ({"bins": 6}, "6 bins reach back 32 positions"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else None,
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], said: str) -> None:
    query, key = layer()
    given = {"tokens": torch.zeros(40, dtype=torch.long), **HOW, **wrong}
    with pytest.raises(ValueError, match=said):
        row_statistics(query, key, Scoring(0.25), **given)
