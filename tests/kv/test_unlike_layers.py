"""Sliding layers with more KV heads than those that attend to everything (MiMo-V2)."""

from __future__ import annotations

from typing import Any

import pytest

import workbench as wb
from benchmarks.model_kinds import tiny_of
from tests.kv.support import SHORT, TOKENS, feasible
from tests.readings import ids_of
from workbench.errors import BadParameter
from workbench.registry import find, registered
from workbench.runtime.planning import make_plan
from workbench.testing import check_plan


@pytest.fixture(scope="module")
def session() -> wb.Session:
    made = wb.Session((tiny_of("mimo_v2_flash"), None), kv_dtype="float32")
    made.read(ids_of(TOKENS))
    return made


@pytest.mark.parametrize("key", [cls.key for cls in registered("kv")])
def test_every_method_plans_and_stores_them(key: str, session: wb.Session) -> None:
    method: Any = find(key)(**SHORT.get(key, {}))
    trace = session.trace
    assert trace is not None

    def plan(budget: float | None) -> Any:
        asked = method if budget is None else method.with_budget(budget)
        return make_plan(trace, [asked], session.kv_dtype, model=session.model)

    made = feasible(plan, 0.7) if method.takes_budget() else plan(None)
    assert made.tiers.shape == (4, 2, TOKENS)
    assert [len(store.positions) for store in check_plan(made)] == [4, 2, 4, 2]


def test_figures_name_each_layers_own_heads(session: wb.Session) -> None:
    heads = session.heads()
    assert heads.groupby("layer")["kv_head"].nunique().tolist() == [4, 2, 4, 2]
    plan = session.plan("snapkv", budget=0.7, window=8)
    assert plan.kept(0, 3).tolist() == list(range(TOKENS - 16, TOKENS))
    assert plan.numbers()["kept"][0] == 4 * 16
    with pytest.raises(BadParameter, match="KV heads 0 to 1"):
        plan.kept(1, 3)
