"""Scores that depend on how much stays, and thresholds that say it themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kv.support import trace_of
from workbench.kv import LookM
from workbench.kv.base import KVMethod, Study
from workbench.kv.ranking import Ranking
from workbench.registry import param
from workbench.runtime.planning import make_plan
from workbench.testing import check_method
from workbench.trace import LayerTrace


class Blended(KVMethod):
    """Keep long values where little stays, short keys where much does."""

    key = "blended"
    title = "Blended"
    claim = "a blend by the budget"
    default_budget = 0.5

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.values.float().norm(dim=-1)

    def scores_at(self, study: Study, scores: Tensor, share: float) -> Tensor:
        keys = study.trace.once(
            "keys", lambda: torch.stack([x.keys.float().norm(dim=-1) for x in study.trace.compressible])
        )
        return (1 - share) * scores - share * keys


class Above(KVMethod):
    """Keep what scores above a threshold, and the best where a budget says how many."""

    key = "above"
    title = "Above"
    claim = "a threshold"
    head_adaptive = True
    threshold: float = param(4.0, ge=0, le=100, help="norm of a value from which on it stays")

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.values.float().norm(dim=-1)

    def wanted(self, ranking: Ranking) -> int:
        return int((ranking.scores >= self.threshold).sum())

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        # Every head's best has to stay; the rest in the order of all.
        order = ranking.in_all.clone()
        order[..., 0] = -1
        rest = order.flatten().argsort(stable=True)[:entries]
        return torch.bincount(rest // ranking.tokens, minlength=order.shape[0] * order.shape[1]).view(order.shape[:2])


def test_scores_are_found_once_and_blended_at_every_size() -> None:
    trace, calls = trace_of(), list[int]()

    class Counted(Blended):
        """The same, counted."""

        def score(self, layer: LayerTrace) -> Tensor:
            calls.append(layer.index)
            return super().score(layer)

    for count in (7, 20, 50):
        plan = make_plan(trace, [Counted(budget=f"{count} tokens")], torch.float32)
        share = count / trace.tokens
        for layer in trace.layers:
            want = (1 - share) * layer.values.norm(dim=-1) - share * layer.keys.norm(dim=-1)
            for head in range(2):
                best = sorted(range(trace.tokens), key=lambda p: (-float(want[head, p]), -p))[:count]
                assert plan.kept(layer.index, head).tolist() == sorted(best)
    assert len(calls) == len(trace.layers)


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_shares_of_bytes_are_met_and_merges_see_the_blended_scores(budget: float) -> None:
    trace = trace_of()
    plan = make_plan(trace, [Blended(budget=budget), LookM()], torch.bfloat16)
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= budget * plan.full_nbytes
    assert plan.share > budget - 0.05
    assert plan.ranking is not None
    values = torch.stack([layer.values.norm(dim=-1) for layer in trace.layers])
    keys = torch.stack([layer.keys.norm(dim=-1) for layer in trace.layers])
    share = float(((values - plan.ranking.scores) / (values + keys)).mean())
    assert torch.allclose(plan.ranking.scores, (1 - share) * values - share * keys, atol=1e-5)
    each = int(plan.counts[0, 0])
    assert each / trace.tokens <= share + 1e-6 < (each + 1) / trace.tokens


def test_a_threshold_decides_where_no_budget_does() -> None:
    trace = trace_of()
    values = torch.stack([layer.values.float().norm(dim=-1) for layer in trace.layers])
    threshold = float(values.flatten().sort(descending=True).values[150])
    plan = make_plan(trace, [Above(threshold=threshold)], torch.float32)
    assert torch.equal(plan.tiers == 1, values >= threshold)
    some = make_plan(trace, [Above(threshold=threshold, budget="20 tokens")], torch.float32)
    assert int(some.counts.sum()) == 20 * plan.counts.numel()


def test_methods_of_both_kinds_keep_every_promise() -> None:
    check_method(Blended)
    check_method(Above, threshold=0.0)
