"""KVTuner: bits of keys and values layer by layer, by what each layer alone loses."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedModel

import workbench as wb
from tests.kv.support import ids_of
from workbench.errors import BadParameter, BudgetTooSmall, NotApplicable
from workbench.kv.methods.quantise.kvtuner import PAIRS, KVTuner, written
from workbench.kv.plan import held_shape
from workbench.kv.stores.format import PackedFormat
from workbench.kv.stores.layered import LayeredFormat
from workbench.models import tiny
from workbench.runtime.planning import study_of

SHORT = {"group": 8, "residual": 0, "window": 16}


def idle_layer() -> PreTrainedModel:
    """A model of four layers, in whose second one attention adds nothing."""
    model = tiny("llama", layers=4)
    model.get_submodule("model.layers.1.self_attn.o_proj").weight.data.zero_()
    return model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def session(request: pytest.FixtureRequest) -> wb.Session:
    made = wb.Session((idle_layer(), None), kv_dtype=request.param)
    made.read(ids_of(96, 3))
    return made


def formats(session: wb.Session, method: KVTuner) -> list[tuple[int, int]]:
    form = session.plan(method).format
    assert isinstance(form, LayeredFormat)
    made = [layer for _, layer in form.formats]
    return [(each.bits, each.value_bits or each.bits) if isinstance(each, PackedFormat) else (16, 16) for each in made]


def test_the_layer_that_does_not_matter_has_the_fewest_bits(session: wb.Session) -> None:
    found = formats(session, KVTuner(budget=0.5, **SHORT))
    assert found[1] == (2, 2)
    assert [PAIRS.index(pair) for pair in found].count(0) < 4


def test_no_other_pairs_within_the_budget_lose_less(session: wb.Session) -> None:
    trace, method = session.trace, KVTuner(budget=0.4, **SHORT)
    assert trace is not None
    losses = method.losses(study_of(trace, session.model), session.kv_dtype)
    sizes = method.sizes(session.kv_dtype, [held_shape(layer, session.kv_dtype) for layer in trace.layers])
    every = torch.tensor(list(itertools.product(range(len(PAIRS)), repeat=4)))
    index = torch.arange(4)
    plan = session.plan(method)
    within = sizes[index, every].sum(1) <= int(0.4 * plan.full_nbytes)
    found = torch.tensor([PAIRS.index(pair) for pair in formats(session, method)])
    assert float(losses[index, found].sum()) == pytest.approx(float(losses[index, every].sum(1)[within].min()))
    assert plan.nbytes == int(sizes[index, found].sum()) == sum(store.nbytes for store in plan.stores())


def test_what_was_found_can_be_written_and_given(session: wb.Session) -> None:
    auto = KVTuner(budget=0.4, **SHORT)
    given = KVTuner(bits=written(formats(session, auto)), **SHORT)
    assert given.effective_budget is None and auto.effective_budget is not None
    assert session.plan(given).nbytes == session.plan(auto).nbytes
    assert session.run(given, max_new_tokens=8).tokens == session.run(auto, max_new_tokens=8).tokens
    assert wb.method("kvtuner", bits=given.bits, **SHORT) == given


def test_the_exact_window_is_shortened_before_a_budget_is_refused(session: wb.Session) -> None:
    twos = KVTuner(bits=" ".join(["2/2"] * 4), group=8, residual=64)
    whole = session.plan(twos).nbytes
    assert session.plan(twos.with_budget(0.5)).nbytes <= 0.5 * session.plan("full").nbytes < whole
    with pytest.raises(BudgetTooSmall, match="smallest possible is"):
        session.plan(twos.with_budget(0.05))


def test_bits_that_do_not_fit_the_model_are_refused(session: wb.Session) -> None:
    with pytest.raises(BadParameter, match='write "auto", or for each layer'):
        KVTuner(bits="8/4 3/4")
    with pytest.raises(BadParameter, match="residual=40 is not a multiple of group=32"):
        KVTuner(residual=40)
    with pytest.raises(BadParameter, match="bits has 1 pairs, but 4 layers"):
        session.plan(KVTuner(bits="8/4", **SHORT))
    assert session.trace is not None
    with pytest.raises(NotApplicable, match="no model"):
        KVTuner().losses(study_of(session.trace), session.kv_dtype)
