"""Room by layer: CAKE, DynamicKV and SimLayerKV, against the authors' formulas in plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.kv.support import TOKENS, random_ranking, trace_of
from workbench.kv import CAKE, DynamicKV, SimLayerKV
from workbench.kv.base import Study
from workbench.kv.ranking import Ranking
from workbench.runtime.planning import make_plan


def test_cakes_scores_and_preferences_are_the_formulas() -> None:
    trace = trace_of()
    cake = CAKE(window=8, gamma=3.0, tau1=1.6, tau2=0.4)
    found = cake.importance(Study(trace))
    for layer in trace.layers:
        votes = layer.attention(last=8)[..., : TOKENS - 8]  # [k, g, q, m]
        entropy = sum(-float(p) * float((p + 1e-10).log()) for p in votes.flatten())
        variance = float(votes.var(dim=2).sum())
        assert float(found[layer.index]) == pytest.approx(entropy ** (1 / 1.6) * variance ** (1 / 0.4), rel=1e-4)
        for head in range(layer.kv_heads):
            one = (votes[head].mean(dim=1) + 3.0 * votes[head].var(dim=1)).mean(dim=0)
            padded = torch.nn.functional.pad(one, (2, 2))
            pooled = torch.stack([padded[i : i + 5].sum() / 5 for i in range(len(one))])
            torch.testing.assert_close(cake.score(layer)[head, : TOKENS - 8], pooled)
        assert cake.score(layer)[:, TOKENS - 8 :].isinf().all()


def test_cake_shares_by_preference_beyond_the_window() -> None:
    ranking = random_ranking(3, 2, 100).beside(torch.tensor([1.0, 2.0, 5.0]))
    counts = CAKE(window=10).allocate(ranking, 2 * (30 + 80))
    assert counts[:, 0].tolist() == [20, 30, 60] and torch.equal(counts[:, 0], counts[:, 1])
    assert CAKE(window=10).allocate(ranking, 2 * 250)[:, 0].tolist() == [53, 97, 100]  # what is over goes to others


def test_dynamickv_gives_layers_what_they_have_among_the_best() -> None:
    scores = torch.zeros(3, 1, 40)
    scores[0, 0, :5] = torch.arange(5) + 10.0
    scores[1, 0, :15] = torch.arange(15) + 20.0
    scores[:, :, -4:] = torch.inf
    counts = DynamicKV(window=4).allocate(Ranking(scores), 12 + 20)
    assert counts[:, 0].tolist() == [9, 19, 4]
    few = DynamicKV(window=4, most=1.5).allocate(Ranking(scores), 12 + 20)
    assert few[1, 0] == 4 + 10 and int(few.sum()) == 32  # no more than one and a half equal shares


def test_layers_are_lazy_beyond_the_threshold_or_as_the_budget_needs() -> None:
    trace = trace_of()
    lazy = SimLayerKV(sinks=2, recent=8, threshold=0.0)
    rows = [layer.attention(last=1).mean(dim=(0, 1, 2)) for layer in trace.layers]
    laziness = [float(row[:2].sum() + row[-8:].sum()) for row in rows]
    assert lazy.importance(Study(trace)).tolist() == pytest.approx(laziness)
    few = [0, 1, *range(TOKENS - 8, TOKENS)]
    every = make_plan(trace, [lazy], torch.float32)
    assert all(every.kept(layer.index, 0).tolist() == few for layer in trace.layers)
    none = make_plan(trace, [SimLayerKV(sinks=2, recent=8, threshold=1.0)], torch.float32)
    assert none.nbytes == none.full_nbytes
    middle = sorted(laziness)[len(laziness) // 2 - 1]
    some = make_plan(trace, [SimLayerKV(sinks=2, recent=8, threshold=middle)], torch.float32)
    for layer, value in zip(trace.layers, laziness, strict=True):
        assert len(some.kept(layer.index, 0)) == (len(few) if value > middle else TOKENS)
    half = make_plan(trace, [SimLayerKV(sinks=2, recent=8, budget=0.6)], torch.float32)
    assert half.nbytes <= 0.6 * half.full_nbytes
    lengths = [len(half.kept(layer.index, 0)) for layer in trace.layers]
    assert lengths[laziness.index(min(laziness))] == max(lengths)
