"""A reading method together with a storage method: one decides what stays, the other how it is held."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import SHORT, feasible, reading
from tests.readings import ids_of
from workbench.budget import Budget
from workbench.errors import BadBudget, BadRecipe, BudgetTooSmall
from workbench.kv import KIVI, MiKV, SnapKV, StreamMem, TurboMind
from workbench.kv.base import KVMethod
from workbench.kv.stores import DenseStore
from workbench.models import tiny
from workbench.registry import registered
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import ChunkedPlan, make_plan
from workbench.testing import check_plan

KV = [cls for cls in registered("kv") if issubclass(cls, KVMethod)]
READING = [cls for cls in KV if cls.contributes("read")]
STORING = [cls for cls in KV if cls.contributes("store")]
TOKENS = 70


def made(cls: type[KVMethod], **more: Any) -> KVMethod:
    return cls(**{name: value for name, value in SHORT.get(cls.key, {}).items() if name != "budget"}, **more)


def planned(
    methods: list[KVMethod], budget: Any = None, tokens: int = TOKENS, architecture: str = "llama"
) -> ChunkedPlan:
    found = reading(architecture, tokens)
    plan = make_plan(
        found.trace, methods, torch.bfloat16, None if budget is None else Budget.parse(budget), found.model
    )
    assert isinstance(plan, ChunkedPlan)
    return plan


def most_while_reading(plan: ChunkedPlan) -> int:
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    return max(sum(v for name, v in sample.categories.items() if name.startswith("kv ")) for sample in reads)


@pytest.mark.parametrize(("read", "store"), list(product(READING, STORING)), ids=lambda cls: cls.key)
def test_every_pair_stays_within_the_budget_or_is_refused_with_the_reason(
    read: type[KVMethod], store: type[KVMethod]
) -> None:
    methods = [made(read), made(store)]
    if read.own_stores or not store.of_entries:
        with pytest.raises(BadRecipe, match="use one of the two") as refusal:
            planned(methods, 0.5)
        assert read.key in str(refusal.value) and store.key in str(refusal.value)
        return
    plan = planned(methods, 0.5)
    alone = planned(methods[:1], 0.5)
    check_plan(plan)
    assert plan.nbytes < alone.nbytes <= 0.5 * plan.full_nbytes
    assert most_while_reading(plan) <= 0.5 * plan.full_nbytes
    assert torch.equal(plan.tiers, alone.tiers), "the storage method changes what stays"
    assert plan.stages.read is methods[0] and plan.stages.store is methods[1]


@pytest.mark.parametrize("architecture", ["mqa", "gemma3"])
@pytest.mark.parametrize("read", [cls for cls in READING if not cls.own_stores], ids=lambda cls: cls.key)
def test_other_kinds_of_models_too(read: type[KVMethod], architecture: str) -> None:
    methods = [made(read), TurboMind()]
    plan = feasible(lambda share: planned(methods, share, architecture=architecture), 0.6)
    check_plan(plan)
    for layer, store in zip(plan.trace.layers, plan.stores(), strict=True):
        assert isinstance(store, DenseStore) == (layer.window is None and layer.index in plan.exact)


def check_rounded(exact: Tensor, held: Tensor, bits: int) -> None:
    """Numbers [g] held as the nearest of the 2^bits values from the smallest to the largest, up to half precision."""
    low, high = float(exact.min()), float(exact.max())
    step = (high - low) / (2**bits - 1)
    grid = [low + step * number for number in range(2**bits)]
    for before, after in zip(exact.tolist(), held.tolist(), strict=True):
        assert min(abs(after - value) for value in grid) < 0.01 * (high - low) + 1e-3
        assert abs(after - before) < 0.51 * step + 0.01 * (high - low) + 1e-3


def test_what_is_held_is_what_was_read_rounded_in_the_storage_methods_groups() -> None:
    read, store = made(StreamMem), KIVI(bits=2, group=8, residual=8)
    alone, both = planned([read], 0.5).stores(), planned([read, store], 0.5).stores()
    for before, after in zip(alone, both, strict=True):
        exact, held = before.contents(torch.float32), after.contents(torch.float32)
        assert torch.equal(exact.positions.expand(2, -1), held.positions.expand(2, -1))
        count = exact.keys.shape[1]
        for head in range(2):
            for begin in range(0, count // 8 * 8, 8):
                for channel in range(16):
                    group = slice(begin, begin + 8)
                    check_rounded(exact.keys[head, group, channel], held.keys[head, group, channel], 2)
            for slot in range(count - 8):
                for begin in range(0, 16, 8):
                    group = slice(begin, begin + 8)
                    check_rounded(exact.values[head, slot, group], held.values[head, slot, group], 2)
            assert torch.equal(held.keys[head, count // 8 * 8 :], exact.keys[head, count // 8 * 8 :])
            assert torch.equal(held.values[head, count - 8 :], exact.values[head, count - 8 :])


def test_each_keeps_to_its_own_budget() -> None:
    read = made(StreamMem, budget=0.6)
    free = planned([read, KIVI(group=8, residual=16)])
    assert free.precisions == ("2-bit",) and 0.5 < most_while_reading(free) / free.full_nbytes <= 0.6
    wide = planned([read, KIVI(budget=0.4, group=8, residual=16)])
    assert free.nbytes < wide.nbytes <= 0.4 * wide.full_nbytes and wide.precisions != ("2-bit",)
    assert torch.equal(free.tiers, wide.tiers)
    with pytest.raises(BudgetTooSmall) as refusal:
        planned([read, KIVI(budget=0.05, group=8, residual=16)])
    least = planned([read, KIVI(budget=refusal.value.smallest, group=8, residual=16)])
    assert least.nbytes <= refusal.value.smallest * least.full_nbytes
    with pytest.raises(BadBudget, match="keeps every token that was read"):
        planned([read, KIVI(budget="20 tokens", group=8, residual=16)])


def test_where_it_would_take_more_bytes_what_was_read_stays_as_it_is_and_a_note_says_so() -> None:
    methods = [made(StreamMem), KIVI(group=32, residual=128)]
    plan, alone = planned(methods, 0.5), planned(methods[:1], 0.5)
    assert plan.nbytes == alone.nbytes and any("left as read, for kivi" in note for note in plan.notes)
    assert not any("left as read" in note for note in planned([made(StreamMem), TurboMind()], 0.5).notes)


def test_a_conversation_goes_on_at_true_positions_and_repeats_itself() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(TOKENS), record=False)
    methods = [made(StreamMem), KIVI(bits=2, group=8, residual=8)]
    runs = [session.run(methods, budget=0.5, question=ids_of(6, 2), max_new_tokens=4) for _ in range(2)]
    assert runs[0].tokens == runs[1].tokens
    asked = runs[0].ask(ids_of(5, 3), max_new_tokens=4)
    assert asked.decoder is not None
    for store in asked.decoder.stores:
        for positions in store.positions:
            assert bool((positions.diff() > 0).all()) and int(positions[-1]) == TOKENS + 6 + 4 + 5 + 3 - 1


def test_at_many_bits_the_answer_is_that_of_the_reading_alone() -> None:
    def logits(methods: list[KVMethod]) -> Tensor:
        found, plan = reading(), planned(methods, 0.6)
        return Decoder(found.model, plan.stores(), plan.position).feed(ids_of(5, 1), logits=5)

    alone, both = logits([made(StreamMem)]), logits([made(StreamMem), TurboMind(key_bits=8, value_bits=8)])
    assert float((alone - both).abs().max() / alone.abs().max()) < 0.02


@pytest.mark.parametrize("others", [[SnapKV()], [KIVI(), SnapKV()], [MiKV()], [StreamMem()]], ids=str)
def test_nothing_else_joins_a_reading_method(others: list[KVMethod]) -> None:
    with pytest.raises(BadRecipe):
        planned([made(StreamMem), *others], 0.5)
