"""ILRe: tokens recalled for the question at an early layer, and only those read by the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import SHORT, ids_of, reading
from workbench import testing
from workbench.engine.attention_hook import forward
from workbench.errors import BudgetTooSmall, PromptTooLong
from workbench.kv import ILRe
from workbench.kv.recall import attention_to, recalled, widths
from workbench.models import tiny
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.kv.plan import Plan
    from workbench_kernels import Scoring

QUICK = SHORT["ilre"]


def planned(found: testing.Reading, question: Tensor | None = None, **parameters: object) -> Plan:
    return make_plan(
        found.trace, [ILRe(**{**QUICK, **parameters})], torch.float32, model=found.model, question=question
    )


def test_pooling_widths_go_from_one_to_the_widest() -> None:
    assert widths(3, 33) == [1, 5, 33] and widths(1, 9) == [9] and widths(2, 1) == [1] and widths(6, 3) == [1, 3]


@pytest.mark.parametrize("count", [10, 17, 39])
def test_every_width_chooses_in_turns_from_its_highest_pooled_score_down(count: int) -> None:
    scores = torch.rand(40, generator=torch.Generator().manual_seed(1))
    kernels, sinks, last = [1, 5, 9], 2, 3
    orders = []
    for width in kernels:
        half = width // 2
        pooled = [max(scores[max(i - half, 0) : i + half + 1].tolist()) for i in range(40)]
        orders.append(sorted(range(40), key=lambda i: (-pooled[i], i)))
    chosen = [0, 1, 37, 38, 39]
    for rank in range(40):
        for order in orders:
            if len(chosen) < count and order[rank] not in chosen:
                chosen.append(order[rank])
    assert recalled(scores, kernels, count, sinks, last).tolist() == sorted(chosen)


def test_scores_are_the_mean_of_the_softmax_over_the_context() -> None:
    layer = reading().trace.layers[1]
    queries = layer.queries[:, -6:]
    got = attention_to(queries, layer.keys, torch.arange(64, 70), layer)
    expected = torch.zeros(70)
    for head in range(4):
        for query in range(6):
            seen = 65 + query
            logits = layer.keys[head // 2, :seen] @ queries[head, query] * layer.scale
            expected[:seen] += logits.softmax(dim=0) / 24
    assert torch.allclose(got, expected, atol=1e-6)


def test_with_a_window_wide_enough_the_recall_is_the_plain_models() -> None:
    # Nothing is lost below the retrieval layer, so its queries and keys are those that the trace recorded.
    found = testing.fresh_reading(tokens=70)
    plan = planned(found, budget="45 tokens", window=512, layer=0.1)
    layer = found.trace.layers[1]
    scores = attention_to(layer.queries[:, -8:], layer.keys, torch.arange(62, 70), layer)
    count = int(plan.counts[0, 0])
    assert 38 <= count <= 45 and bool((plan.counts == count).all())
    where = recalled(scores, widths(3, 33), count, 4, 8)
    assert all(torch.equal(plan.kept(index, head), where) for index in range(3) for head in range(2))


def test_recalled_tokens_are_read_by_all_layers_as_if_they_were_the_text() -> None:
    found = testing.fresh_reading(tokens=70)
    plan = planned(found, budget="30 tokens")
    where = plan.kept(0, 0)

    class Plain:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            self.keys.append(key)
            key, value = (x.repeat_interleave(2, dim=0) for x in (key, value))
            logits = query @ key.transpose(1, 2) * scoring.scale
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
            return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value

    plain = Plain()
    logits = forward(found.model, plain, found.trace.ids[where], where)
    assert torch.allclose(plan.logits, logits[-1], atol=1e-4) and plan.position == 70
    for store, keys in zip(plan.stores(), plain.keys, strict=True):
        assert torch.allclose(store.contents(torch.float32).keys, keys, atol=1e-4)


def test_another_question_recalls_other_tokens_and_none_stands_for_the_prompts_end() -> None:
    found = testing.fresh_reading(tokens=120)
    kept = [
        planned(found, question, budget="40 tokens").kept(0, 0).tolist() for question in (ids_of(6, 1), ids_of(6, 2))
    ]
    assert kept[0] != kept[1]
    assert all({0, 1, 2, 3} <= set(row) and set(range(112, 120)) <= set(row) for row in kept)
    assert "stood for it" in " ".join(planned(found, budget="40 tokens").notes)
    assert not planned(found, ids_of(6, 1), budget="40 tokens").notes


@pytest.mark.parametrize(("architecture", "question"), [("llama", None), ("llama", 40), ("gemma3", 40), ("mqa", None)])
def test_a_text_of_ten_times_the_bound_is_read_within_it(architecture: str, question: int | None) -> None:
    session = wb.Session((tiny(architecture, layers=12), None))
    session.read(ids_of(800), record=False)
    plan = make_plan(
        session.trace,  # type: ignore[arg-type]
        [ILRe(**QUICK, budget=0.16 if architecture == "gemma3" else 0.1)],
        torch.bfloat16,
        model=session.model,
        question=None if question is None else ids_of(question),
    )
    kv = [sum(v for name, v in s.categories.items() if name.startswith("kv")) for s in plan.timeline.samples]
    limit = (0.16 if architecture == "gemma3" else 0.1) * plan.full_nbytes
    assert len(kv) > 30 and 0.8 * limit < max(kv) <= limit
    assert max(int(count) for count in plan.counts.flatten()) <= (160 if architecture == "gemma3" else 80)


def test_where_the_keys_of_the_retrieval_layer_do_not_fit_it_is_refused_with_the_reason_of_size() -> None:
    found = testing.fresh_reading(tokens=200)
    with pytest.raises(BudgetTooSmall) as refusal:
        planned(found, budget=0.1)  # of three layers, whose keys take a sixth each
    assert 1 / 6 < refusal.value.smallest < 0.2
    plan = planned(found, budget=refusal.value.smallest)
    assert plan.nbytes <= refusal.value.smallest * plan.full_nbytes


def test_it_reads_at_true_positions_and_says_so_where_there_are_too_few() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(2040), record=False)
    assert session.trace is not None
    with pytest.raises(PromptTooLong, match="ilre reads at true positions"):
        make_plan(
            session.trace, [ILRe(budget=0.3)], torch.bfloat16, model=session.model, question=ids_of(20)
        )  # the question stands behind the prompt's 2,040
