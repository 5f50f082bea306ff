"""UNComp's reading: from stage to stage fewer tokens go on, those that the layer before paid most attention to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.readings import ids_of
from workbench.attention import UNCompReading
from workbench.attention.base import PassContext, visible_entries
from workbench.kv import UNComp
from workbench.models import facts, tiny
from workbench.runtime.prefill import read
from workbench.testing import Subjects
from workbench.trace import LayerTrace, Trace

TOKENS = 70


@pytest.fixture(scope="module")
def subjects() -> Subjects:
    return Subjects()


def under(subjects: Subjects, method: UNCompReading, architecture: str = "llama") -> Trace:
    found = subjects.reading(architecture)
    return read(found.model, facts(found.model), found.trace.prompt, method=method)


def rows_by_hand(layer: LayerTrace, head: int, alive: list[int]) -> dict[int, dict[int, float]]:
    """What each of those alive gives to those alive before it, by position."""
    rows = {}
    for at in alive:
        past = [p for p in alive if p <= at and (layer.window is None or p > at - layer.window)]
        scores = layer.keys[head // layer.groups, past] @ layer.queries[head, at] * layer.scale
        rows[at] = dict(zip(past, scores.softmax(dim=0).tolist(), strict=True))
    return rows


def by_hand(trace: Trace, sizes: list[int], queries: int) -> list[tuple[list[int], Tensor]]:
    """Who takes part in each layer, and what its attention gives, [h, n, dv]; who has left gets zeros."""
    alive, found = list(range(trace.tokens)), []
    votes = dict.fromkeys(alive, 0.0)
    for layer, size in zip(trace.layers, sizes, strict=True):
        ranked = sorted(alive, key=lambda p: (p != alive[-1], -votes[p]))
        alive = sorted(ranked[:size])
        votes = dict.fromkeys(alive, 0.0)
        out = torch.zeros(layer.heads, trace.tokens, layer.values.shape[-1])
        for head in range(layer.heads):
            for at, row in rows_by_hand(layer, head, alive).items():
                for p, weight in row.items():
                    out[head, at] += weight * layer.values[head // layer.groups, p]
                    votes[p] += weight if at in alive[-queries:] else 0.0
        found.append((alive, out))
    return found


@pytest.mark.parametrize("architecture", ["llama", "mqa"])
def test_fewer_go_on_and_they_attend_among_themselves(architecture: str, subjects: Subjects) -> None:
    method = UNCompReading(least=0.2, queries=5)
    trace = under(subjects, method, architecture)
    layers = len(trace.layers)
    sizes = [method.size(layer, layers, TOKENS) for layer in range(layers)]
    assert sizes[0] == TOKENS and sizes == sorted(sizes, reverse=True) and sizes[-1] < 60
    context = PassContext(layers, TOKENS)
    for layer, (alive, want) in zip(trace.layers, by_hand(trace, sizes, 5), strict=True):
        context.layer = layer.index
        got = method.attend(layer.queries, layer.keys, layer.values, layer.scoring, context)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert len(alive) == sizes[layer.index] and alive[-1] == TOKENS - 1
        assert context.computed[layer.index] == layer.heads * visible_entries(len(alive))


def test_stages_begin_as_deep_as_in_the_authors_model_and_sizes_fall_evenly() -> None:
    method = UNCompReading(least=0.375)
    sizes = [method.size(layer, 32, 4096) for layer in range(32)]
    assert sizes == [4096] * 2 + [3456] * 13 + [2816] * 11 + [2176] * 5 + [1536]
    assert method.entries(4096, 32) == sum(size * (size + 1) // 2 for size in sizes)


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.7])
def test_a_budget_is_the_share_of_scores(budget: float, subjects: Subjects) -> None:
    method = UNCompReading(budget=budget)
    trace = under(subjects, method)
    assert trace.score_share is not None and budget - 0.05 < trace.score_share <= budget
    if budget == 1.0:
        assert torch.allclose(trace.logits, subjects.reading().trace.logits, atol=1e-4)


def test_who_has_left_is_not_seen_by_what_comes_later(subjects: Subjects) -> None:
    found, method = subjects.reading(), UNCompReading(least=0.2)
    session = wb.Session((found.model, None), kv_dtype="float32")
    session.read(found.trace.ids)
    run = session.run(method, question=ids_of(3, 2), max_new_tokens=4)
    trace = run.plan.trace
    sizes = [method.size(layer, len(trace.layers), TOKENS) for layer in range(len(trace.layers))]
    alive = [there for there, _ in by_hand(trace, sizes, method.queries)]
    seen = sum(len(there) for there in alive)
    assert run.decode_score_share is not None and seen < len(alive) * TOKENS
    entries = causal = 0
    for new in range(6):  # three of the question, and three that were answered and read
        entries += seen + len(alive) * (new + 1)
        causal += len(alive) * (TOKENS + new + 1)
    assert run.decode_score_share == pytest.approx(entries / causal, abs=1e-6)


def test_reading_and_the_caches_part_are_one_recipe() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(TOKENS))
    run = session.run(UNComp(budget=0.5) | UNCompReading(least=0.5), question=ids_of(4, 1), max_new_tokens=3)
    assert run.plan.nbytes <= 0.5 * run.plan.full_nbytes and len(run.tokens) == 3
    share = run.to_dict(quality=False)["score_share"]
    assert 0 < share < 1 and run.quality.kl > 0
