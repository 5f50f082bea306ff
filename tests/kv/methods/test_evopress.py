"""EvoPress for caches: room goes to the layers whose loss the predictions show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.kv.support import ids_of
from workbench.kv.base import Study
from workbench.kv.methods.allocate.evopress import EvoPressKV
from workbench.kv.plan import rank
from workbench.models import tiny
from workbench.runtime.planning import study_of

IDS = ids_of(96, 3)
PLAIN: dict[str, Any] = {"window": 16, "kernel": 5, "pooling": "avg"}
QUICK = {**PLAIN, "generations": 8, "offspring": 6, "share": 0.2}


def idle_layer() -> PreTrainedModel:
    """A model of four layers, in whose second one attention adds nothing."""
    model = tiny("llama", layers=4)
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.data.zero_()
    return model


@pytest.fixture(scope="module")
def session() -> wb.Session:
    made = wb.Session((idle_layer(), None), kv_dtype="float32")
    made.read(IDS)
    return made


def counts(session: wb.Session, *recipe: object, budget: float = 0.2) -> Tensor:
    return session.plan(list(recipe) if len(recipe) > 1 else recipe[0], budget=budget).counts[:, 0]


def test_a_layer_whose_attention_adds_nothing_gets_least_room(session: wb.Session) -> None:
    found = counts(session, EvoPressKV(**QUICK))
    assert int(found[1]) == int(found.min()) and float(found[1]) < 0.4 * float(found.double().mean())
    even = counts(session, "snapkv")
    assert int(found.sum()) <= int(even.sum()) + 4


def test_what_is_found_predicts_the_last_tokens_better_than_equal_layers(session: wb.Session) -> None:
    assert session.trace is not None
    study = study_of(session.trace, session.model)
    none = EvoPressKV(**{**QUICK, "generations": 0}).importance(study)
    some = EvoPressKV(**QUICK).importance(study)
    assert none is not None and some is not None
    assert torch.equal(none, torch.ones(4, dtype=torch.float64))
    assert float(some.mean()) == pytest.approx(1) and float(some.std()) > 0.1


def test_other_scorers_are_searched_over_their_own_scores(session: wb.Session) -> None:
    assert session.trace is not None
    plan = session.plan([wb.method("knorm"), EvoPressKV(**QUICK)], budget=0.3)
    scores = rank(Study(session.trace, session.model), wb.method("knorm"))  # type: ignore[arg-type]
    assert torch.equal(plan.tiers > 0, scores.selected(plan.counts))


def test_the_search_is_made_once_for_all_budgets(session: wb.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    method = EvoPressKV(**{**QUICK, "seed": 5})
    first = counts(session, method, budget=0.2)
    monkeypatch.setattr(EvoPressKV, "importance", lambda self, study: pytest.fail("searched again"))
    later = counts(session, method, budget=0.4)
    assert int(later.sum()) > int(first.sum()) and torch.equal(first.argsort(), later.argsort())
