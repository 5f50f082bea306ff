"""Steps of a full cache, run eagerly here: what the plain path does, and only where they are all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.readings import answering, ids_of, plain, session_on
from workbench.errors import NotApplicable
from workbench.registry import registered
from workbench.runtime.decode import Decoder
from workbench.runtime.steady_step import SteadyStep, host_state
from workbench_kernels import Scoring

STEADY = {
    "h2o": wb.kv.H2O(budget=0.5),
    "tova": wb.kv.TOVA(budget=0.5),
    "streaming-llm": wb.kv.StreamingLLM(budget=0.5),
    "streaming-llm in the text": wb.kv.StreamingLLM(budget=0.5, positions="text"),
    "ragged h2o": [wb.kv.H2O(budget=0.5), wb.kv.AdaKV()],
}


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("name", STEADY)
def test_tokens_and_contents_are_the_plain_ones(name: str, architecture: str) -> None:
    decoder, token = answering(wb.models.tiny(architecture), STEADY[name])
    decoder = decoder.clone()  # both count scores from here on
    twin = decoder.clone()
    step = SteadyStep(decoder, token, 40)
    assert list(step.answer(())) == plain(twin, token, 40)
    assert decoder.position == twin.position
    assert decoder.score_share == pytest.approx(twin.score_share)
    more, same = (d.feed(ids_of(3, 5)) for d in (decoder, twin))
    assert (more - same).abs().max() < 1e-4
    for mine, other in zip(decoder.stores, twin.stores, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.positions, other.positions, strict=True))


def test_an_answer_ends_where_it_is_said_to(tiny_llama: PreTrainedModel) -> None:
    decoder, token = answering(tiny_llama, STEADY["h2o"])
    twin, wanted = decoder.clone(), plain(decoder.clone(), token, 30)
    last = next(i for i in range(5, 30) if wanted[i] not in wanted[:i])
    assert list(SteadyStep(decoder, token, 30).answer([wanted[last]])) == wanted[: last + 1]
    plain(twin, token, last + 1)
    assert decoder.position == twin.position
    assert (decoder.feed(ids_of(3, 5)) - twin.feed(ids_of(3, 5))).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("full", "its cache grows"),
        (wb.kv.LazyEviction(budget=0.5), "not the same after each step"),
        ([wb.kv.LagKV(budget=0.5)], "not the same after each step"),
    ],
)
def test_what_is_not_the_same_each_time_is_refused_and_left_as_it_was(
    recipe: object, why: str, tiny_llama: PreTrainedModel
) -> None:
    decoder, token = answering(tiny_llama, recipe)
    twin = decoder.clone()
    before = host_state(decoder.stores)
    with pytest.raises(NotApplicable, match=why):
        SteadyStep(decoder, token, 20)
    assert host_state(decoder.stores) == before
    assert plain(decoder, token, 5) == plain(twin, token, 5)


def test_the_state_known_to_the_host_tells_other_places_and_numbers_apart() -> None:
    x, y = torch.zeros(2, 4), torch.zeros(2, 4)
    assert host_state([x, {"a": 1}]) == host_state([x, {"a": 1}])
    assert host_state([x]) != host_state([y]) and host_state(x) != host_state(x.t())
    assert host_state({"a": 1}) != host_state({"a": 2}) != host_state({"b": 2})


class _Overwriting(Decoder):
    """Writes over queries, keys and values as soon as a layer has attended, as the next replay of a graph does."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        given = query.clone(), key.clone(), value.clone()
        out = super().attend(layer, *given, scoring).clone()
        for x in given:
            x.fill_(torch.nan)
        return out


@pytest.fixture(scope="module")
def read(tiny_llama: PreTrainedModel) -> wb.Session:
    return session_on(tiny_llama, ids_of(200, 0), kv_dtype="float32")


@pytest.mark.parametrize("key", [method.key for method in registered("kv")])
def test_every_store_copies_what_it_keeps(key: str, read: wb.Session) -> None:
    options = {"budget": 0.5} if wb.method(key).takes_budget() else {}
    try:
        plan = read.plan(key, **options)
    except wb.errors.BudgetTooSmall as refusal:
        plan = read.plan(key, budget=refusal.smallest)
    evicting = plan.stages.evict if plan.evicts else None
    both = [
        kind(read.model, plan.stores(), plan.position, evicting, memory=plan.trace.memory)
        for kind in (Decoder, _Overwriting)
    ]
    for token in ids_of(12, 1):
        want, got = (decoder.feed(token[None]) for decoder in both)
        assert torch.equal(want, got)
