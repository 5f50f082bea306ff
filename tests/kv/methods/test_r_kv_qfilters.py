"""R-KV's scores and Q-Filters' directions, against plain loops."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from tests.kv.support import TOKENS, model_of, trace_of
from workbench.errors import NotApplicable
from workbench.kv import RKV, QFilters
from workbench.kv.base import Study
from workbench.kv.methods.evict.r_kv import redundancy
from workbench.models import tiny
from workbench.runtime.planning import make_plan, study_of


def test_the_latest_of_several_that_say_the_same_is_not_redundant() -> None:
    keys = torch.nn.functional.normalize(torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    keys[0, 2] = keys[0, 5] = keys[0, 0]
    found = redundancy(keys)[0]
    cosines = keys[0] @ keys[0].T
    cosines.fill_diagonal_(0)
    for row in cosines:
        alike = [place for place, value in enumerate(row.tolist()) if value > 0.5]
        row[max(alike, default=0)] = 0
    torch.testing.assert_close(found, cosines.mean(dim=0).softmax(dim=0))
    assert found[5] < found[0] and found[5] < found[2]


def test_importance_is_the_largest_of_a_group_less_redundancy() -> None:
    layer = trace_of().layers[1]
    method = RKV(queries=4, kernel=3, weight=0.3)
    before = TOKENS - 4
    for head in range(layer.kv_heads):
        group = layer.queries[head * layer.groups : (head + 1) * layer.groups, -4:]
        logits = torch.stack([layer.scale * query @ layer.keys[head, :before].T for query in group]).amax(dim=0)
        votes = torch.nn.functional.pad(logits.softmax(dim=-1).mean(dim=0), (1, 1))
        pooled = torch.stack([votes[i : i + 3].amax() for i in range(before)])
        want = 0.3 * pooled - 0.7 * redundancy(layer.keys)[head, :before]
        torch.testing.assert_close(method.score(layer)[head, :before], want)
    assert method.score(layer)[:, before:].isinf().all()


def test_a_long_answer_stays_within_the_budget() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(list(range(1, 65)))
    run = session.run(RKV(budget="48 tokens", queries=4, every=8), max_new_tokens=40)
    assert run.decoder is not None and len(run.tokens) == 40
    for store in run.decoder.stores:
        assert all(len(held) <= 48 for held in store.positions)


def test_directions_are_singular_vectors_on_the_side_of_most_queries() -> None:
    trace = trace_of()
    model = model_of(trace)
    study = study_of(trace, model)
    scores = QFilters(window=4).scores(study)
    assert scores[..., -4:].isinf().all()
    made = make_plan(trace, [QFilters(window=4, budget=0.3)], torch.float32, model=model)
    for layer in trace.layers:
        along = (scores[layer.index, 0, :-4][:, None] / layer.keys[0, :-4].float()).isfinite().all()
        assert bool(along)
        solved = torch.linalg.lstsq(layer.keys[0, :-4].double(), scores[layer.index, 0, :-4, None].double()).solution
        assert float(solved.norm()) <= 1 + 1e-4  # a mean of unit vectors
        best = (layer.keys[0, :-4].double() @ solved)[:, 0].topk(len(made.kept(layer.index, 0)) - 4).indices
        assert sorted(best.tolist()) == made.kept(layer.index, 0)[:-4].tolist()


def test_without_a_model_there_are_no_directions() -> None:
    with pytest.raises(NotApplicable, match="qfilters lets the model read again"):
        QFilters().scores(Study(trace_of()))
