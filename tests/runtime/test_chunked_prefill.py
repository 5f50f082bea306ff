"""Reading in bounded memory: the caches never outgrow the limit, however long the text."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from tests.kv.support import reading
from tests.readings import ids_of
from workbench import testing
from workbench.errors import BadRecipe, BudgetTooSmall, Cancelled, NotRead, PromptTooLong
from workbench.kv import SnapKV
from workbench.kv.base import KVMethod
from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult
from workbench.kv.stores import DenseStore
from workbench.models import tiny
from workbench.progress import Progress
from workbench.runtime.planning import make_plan


class Newest(KVMethod):
    """Read in pieces and keep the first two and the newest entries."""

    key = "newest"
    title = "Newest"
    claim = "none"
    default_budget = 0.5

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        total = prefill.entries(4)
        for piece in prefill.pieces(min(8, max(total // 2, 1))):
            for layer in prefill.compressible:
                store = prefill.stores[layer.index]
                assert isinstance(store, DenseStore)
                excess = store.longest + len(piece) - total
                if excess > 0:
                    slots = torch.ones(layer.kv_heads, store.longest, dtype=torch.bool)
                    slots[:, 2 : 2 + excess] = False
                    prefill.keep(layer.index, slots)
            prefill.feed(piece)
        return prefill.result()


def test_a_method_that_reads_by_itself_keeps_every_promise() -> None:
    testing.check_method(Newest)


@pytest.mark.parametrize("architecture", ["llama", "mqa", "gemma3"])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
def test_the_caches_never_outgrow_the_limit(architecture: str, budget: float) -> None:
    found = reading(architecture, 90)
    try:
        plan = make_plan(found.trace, [Newest(budget=budget)], torch.bfloat16, model=found.model)
    except BudgetTooSmall as refusal:
        assert architecture == "gemma3"  # windows take a part that cannot shrink
        budget = refusal.smallest
        plan = make_plan(found.trace, [Newest(budget=budget)], torch.bfloat16, model=found.model)
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    kv = [sum(v for name, v in sample.categories.items() if name.startswith("kv")) for sample in reads]
    assert len(reads) >= 10 and max(kv) <= budget * plan.full_nbytes
    assert max(kv) > 0.8 * budget * plan.full_nbytes  # and the room is used


def test_memory_of_the_reading_does_not_grow_with_the_text() -> None:
    peaks = []
    for tokens in (200, 800):
        session = wb.Session((tiny("llama"), None))
        session.read(ids_of(tokens), record=False)
        plan = session.plan(Newest(budget="64 tokens"))
        peaks.append(max(s.total - s.categories["weights"] for s in plan.timeline.samples))
    assert peaks[1] <= peaks[0] * 1.02


def test_the_same_budget_is_read_once_and_another_again() -> None:
    found = testing.fresh_reading()
    first = make_plan(found.trace, [Newest(budget=0.5)], torch.bfloat16, model=found.model)
    again = make_plan(found.trace, [Newest(budget=0.5)], torch.bfloat16, model=found.model)
    other = make_plan(found.trace, [Newest(budget=0.4)], torch.bfloat16, model=found.model)
    assert again.timeline is first.timeline is not other.timeline


def test_a_prompt_without_a_recording_serves_only_methods_that_read_by_themselves() -> None:
    session = wb.Session((tiny("llama"), None))
    trace = session.read(ids_of(100), record=False)
    assert not trace.recorded and trace.tokens == 100 and trace.nbytes == 0
    run = session.run(Newest(budget=0.4), question=ids_of(5), max_new_tokens=4)
    assert len(run.tokens) == 4 and run.ask(ids_of(4), max_new_tokens=2).tokens
    recorded = wb.Session((session.model, None))
    recorded.read(ids_of(100))
    assert recorded.run(Newest(budget=0.4), question=ids_of(5), max_new_tokens=4).tokens == run.tokens
    for refused in (
        lambda: session.plan("full"),
        lambda: session.plan("snapkv"),
        lambda: run.quality,
        lambda: session.attention(0, 0),
        lambda: session.outliers("keys"),
        lambda: run.plan.error,
    ):
        with pytest.raises(NotRead, match="without"):
            refused()
    assert "100 tokens" in session.summary()


def test_a_text_longer_than_the_models_positions_can_be_taken_in_but_not_read_at_true_positions() -> None:
    session = wb.Session((tiny("llama"), None))
    longest = session.facts.max_positions
    session.read(ids_of(longest + 50), record=False)
    with pytest.raises(PromptTooLong, match="newest reads at true positions"):
        session.plan(Newest(budget="64 tokens"))


def test_other_methods_of_a_recipe_are_refused() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(40))
    with pytest.raises(BadRecipe, match="decides while it reads"):
        session.plan([Newest(), SnapKV()])
    with pytest.raises(BadRecipe, match="reads the prompt in its own way"):
        session.plan([Newest(), wb.method("masformer")])


def test_a_reading_can_be_cancelled_and_leaves_nothing() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(100))
    progress = Progress()
    progress.cancel()
    with pytest.raises(Cancelled):
        session.plan(Newest(budget=0.4), progress=progress)
    assert session.plan(Newest(budget=0.4)).share <= 0.4


def test_looking_leaves_the_caches_as_they_are_and_gives_true_attention() -> None:
    class Looking(Newest):
        key = "looking"

        def read(self, prefill: ChunkedPrefill) -> PrefillResult:
            held = super().read(prefill)
            before = [store.nbytes for store in prefill.stores]
            rows = prefill.probe(ids_of(3), lambda layer, weights: weights)
            assert [store.nbytes for store in prefill.stores] == before and prefill.position == prefill.tokens
            for layer, weights in zip(prefill.compressible, rows, strict=True):
                seen = prefill.stores[layer.index].contents(torch.float32).keys.shape[1]
                assert weights.shape == (layer.kv_heads, layer.groups, 3, seen)
                assert bool((weights.sum(dim=-1) < 1).all())  # the rest goes to the tokens themselves
            return held

    found = testing.fresh_reading()
    make_plan(found.trace, [Looking(budget=0.5)], torch.float32, model=found.model)
