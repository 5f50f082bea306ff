"""Any scorer with any allocator, any merge and any store: a valid plan, or one refusal that says why."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import SHORT, feasible
from workbench.budget import Budget
from workbench.errors import BadRecipe
from workbench.kv import Full, Knorm, SnapKV
from workbench.kv.base import STAGES, KVMethod, Study
from workbench.registry import registered
from workbench.runtime.planning import make_plan
from workbench.testing import Reading, check_plan, fresh_reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workbench.kv.plan import Plan
    from workbench.kv.ranking import Ranking
    from workbench.trace import LayerTrace


class Undecided(KVMethod):
    """Score all alike."""

    key = "undecided"
    default_budget = 0.5

    def score(self, layer: LayerTrace) -> Tensor:
        return torch.zeros(layer.kv_heads, layer.tokens)


class Certain(KVMethod):
    """Want all to stay."""

    key = "certain"
    default_budget = 0.5

    def scores(self, study: Study) -> Tensor:
        layers = study.trace.compressible
        return torch.full((len(layers), layers[0].kv_heads, study.trace.tokens), torch.inf)


class FirstServed(KVMethod):
    """Give the first heads all that they can hold, and every other head one."""

    key = "first-served"
    head_adaptive = True

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        heads = ranking.layers * ranking.kv_heads
        before = torch.arange(heads) * (ranking.tokens - 1)
        more = (max(entries, heads) - heads - before).clamp(0, ranking.tokens - 1)
        return (1 + more).view(ranking.layers, ranking.kv_heads)


class IntoTheLast(KVMethod):
    """Merge all that is dropped into the last that is kept."""

    key = "into-the-last"

    def merge(self, layer: LayerTrace, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        merged = []
        for states in (layer.keys.clone(), layer.values.clone()):
            for head in range(layer.kv_heads):
                last = int(kept[head].nonzero().max())
                states[head, last] = torch.cat([states[head, ~kept[head]], states[head, last : last + 1]]).mean(dim=0)
            merged.append(states)
        return merged[0], merged[1]


# Every registered method, and what a paper might still think of.
OWN: list[type[KVMethod]] = [Undecided, Certain, FirstServed, IntoTheLast]
KV = [cls for cls in registered("kv") if issubclass(cls, KVMethod)] + OWN
TOKENS = 48
BUDGET = 0.6
THIN = 12  # of the recipes of three methods and more, one in so many is tried with each scorer
RUN_EVERY = 12  # of the valid recipes, one in so many is also run
Recipe = tuple[KVMethod, ...]

# One reading for all: what a method finds out once a trace is shared by every recipe that it is in.
found = cache(lambda: fresh_reading(tokens=TOKENS))


def variants(cls: type[KVMethod]) -> list[KVMethod]:
    """The method as it is and, where it evicts while decoding, also without that."""
    short = SHORT.get(cls.key, {})
    decoding = {"decode": False} if "decode" in cls.model_fields else None
    return [cls(**short), *([] if decoding is None else [cls(**short, **decoding)])]


def suppliers(stage: str) -> list[KVMethod]:
    return [method for cls in KV for method in variants(cls) if method.supplies(stage)]


def contributors(stage: str) -> list[KVMethod]:
    """One of each class that brings the stage itself; with another scorer, it is only that stage that counts."""
    return [variants(cls)[-1] for cls in KV if cls.contributes(stage)]


SCORERS = suppliers("score")


def recipes(scorer: KVMethod) -> Iterator[Recipe]:
    """The scorer with choices of the other stages, each recipe once, in an order that varies.

    Every single companion comes with every scorer; of the larger recipes each scorer takes its turn at one in THIN, so
    that all companions meet each other under some scorer.
    """
    others = [[None, *contributors(stage)] for stage in ("allocate", "merge", "store")]
    seen, turn = set(), SCORERS.index(scorer)
    for number, chosen in enumerate(product(*others)):
        recipe = tuple(dict.fromkeys([scorer, *(method for method in chosen if method is not None)]))
        if (len(recipe) > 2 and (number + turn) % THIN) or frozenset(recipe) in seen:
            continue
        seen.add(frozenset(recipe))
        yield recipe if number % 2 else recipe[::-1]


def name(recipe: Recipe) -> str:
    return " + ".join(method.label() for method in recipe)


def planned(reading: Reading, recipe: Recipe, budget: float) -> Plan:
    """The recipe's plan at this budget for all together, or at the smallest one that the refusal names."""

    def plan(share: float) -> Plan:
        return make_plan(reading.trace, recipe, torch.bfloat16, Budget.parse(share), reading.model)

    return feasible(plan, budget)


def check_refusal(refusal: BadRecipe, recipe: Recipe) -> None:
    message = str(refusal)
    assert "\n" not in message and len(message) > 40, message
    assert any(method.key in message for method in recipe), f"{name(recipe)}: {message}"


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda method: method.label().replace(" ", "-"))
def test_every_combination_is_a_plan_or_is_refused_with_the_reason(scorer: KVMethod) -> None:
    reading, valid, runs = found(), 0, 0
    for recipe in recipes(scorer):
        try:
            plan = planned(reading, recipe, BUDGET)
        except BadRecipe as refusal:
            check_refusal(refusal, recipe)
            continue
        try:
            check_plan(plan)
            assert plan.nbytes <= max(BUDGET, plan.share) * plan.full_nbytes
            idle = [m.key for m in recipe if not any(getattr(plan.stages, stage) is m for stage in STAGES)]
            assert not idle, f"{idle} in the recipe for nothing"
            if valid % RUN_EVERY == 1:
                check_run(recipe)
                runs += 1
        except AssertionError as broken:
            raise AssertionError(f"{name(recipe)}: {broken}") from broken
        valid += 1
    assert valid > 1 and runs >= 1


def check_run(recipe: Recipe) -> None:
    """Three tokens, a second question, and positions that are true afterwards."""
    session = wb.Session((found().model, None))
    session.read(found().trace.ids)
    run = session.run(recipe, budget=0.75, question=[5, 6, 7], max_new_tokens=3)
    assert len(run.tokens) == 3 and run.decoder is not None
    assert len(run.ask([8, 9], max_new_tokens=2).tokens) == 2
    newest = TOKENS + 3 + 2 - 1
    for store in run.decoder.stores:
        for held in store.positions:
            assert bool((held.diff() > 0).all()) and int(held[0]) >= 0 and int(held[-1]) == newest


def unscored() -> list[Recipe]:
    """Recipes in which nothing says which positions matter."""
    others = [
        [None, *(m for m in contributors(stage) if not m.supplies("score"))]
        for stage in ("refine", "allocate", "merge", "store")
    ]
    chosen = (tuple(dict.fromkeys(m for m in some if m is not None)) for some in product(*others))
    return [recipe for recipe in chosen if recipe]


@pytest.mark.parametrize("recipe", unscored(), ids=name)
def test_without_scores_only_a_store_makes_a_plan(recipe: Recipe) -> None:
    if all(method.supplies("store") for method in recipe):
        check_plan(planned(found(), recipe, BUDGET))
        return
    with pytest.raises(BadRecipe, match="nothing in this recipe scores") as refusal:
        planned(found(), recipe, BUDGET)
    check_refusal(refusal.value, recipe)


def test_a_method_that_has_no_part_in_a_recipe_is_refused() -> None:
    with pytest.raises(BadRecipe, match="full has no part in this recipe"):
        planned(found(), (Full(), SnapKV(window=8)), BUDGET)


def test_merging_joins_any_scorer() -> None:
    scorer, layer = Knorm(), found().trace.layers[1]
    alone = planned(found(), (scorer,), 0.3)
    merged = planned(found(), (scorer, IntoTheLast()), 0.3)
    assert torch.equal(alone.tiers, merged.tiers) and alone.nbytes == merged.nbytes
    want, _ = IntoTheLast().merge(layer, merged.tiers[1] > 0, torch.empty(0))
    held = merged.store(layer).contents(torch.float32)
    for head in range(layer.kv_heads):
        slots = held.positions.expand(layer.kv_heads, -1)[head].argsort()[-len(merged.kept(1, head)) :]
        assert torch.equal(held.keys[head, slots], want[head, merged.kept(1, head)].bfloat16().float())
