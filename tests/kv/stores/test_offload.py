"""Entries in host memory: fetched by an index, accounted apart, exact where everything is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, reading
from workbench import testing
from workbench.errors import BadRecipe
from workbench.kv import KIVI, AdaKV, SnapKV
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores import DenseStore
from workbench.kv.stores.offload import Index, OffloadFormat, OffloadStore, Retriever
from workbench.models import tiny
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.kv.stores.format import Shape
    from workbench.trace import LayerTrace


class Everything(Retriever):
    """Finds all there is, for every query."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths  # [k]

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        slots = torch.arange(int(self.lengths.max())).expand(len(self.lengths), query.shape[1], -1)
        inside = slots < self.lengths[:, None, None]
        return torch.where(inside, slots, 0), inside

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.lengths = self.lengths + keys.shape[1]

    def tensors(self) -> list[Tensor]:
        return [self.lengths]

    def clone(self) -> Everything:
        return Everything(self.lengths.clone())


@dataclass(frozen=True)
class EverythingIndex(Index):
    def nbytes(self, shape: Shape, others: Tensor) -> int:
        return 8 * others.numel()

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        return Everything(others.sum(dim=1))


class FetchAll(SinksAndRecent):
    """Keep some entries on the device and fetch all the others for every query."""

    key = "fetch-all"
    title = "Fetch all"
    claim = "none"
    default_budget = 0.5

    def retrieve(self, study: Study, shapes: Any) -> Index:
        return EverythingIndex()


def test_a_method_that_retrieves_keeps_every_promise() -> None:
    testing.check_method(FetchAll)


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
@pytest.mark.parametrize("recipe", [[], [SnapKV(window=8)], [SnapKV(window=8), AdaKV(window=8)]])
def test_finding_everything_is_exact_whatever_lies_where(architecture: str, recipe: list[KVMethod]) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:9], max_new_tokens=24)
    run = session.run([*recipe, FetchAll(budget=0.7)], question=ids[:9], max_new_tokens=24)
    assert run.plan.host_nbytes > 0
    assert run.tokens == full.tokens
    assert run.quality.kl < 1e-8


def test_the_oldest_move_to_host_memory_while_decoding_and_the_first_stay() -> None:
    found = testing.fresh_reading()
    plan = make_plan(found.trace, [FetchAll(budget=0.5)], torch.float32)
    assert isinstance(plan.format, OffloadFormat)
    store = plan.stores()[0]
    assert isinstance(store, OffloadStore)
    planned, sizes = store.near.longest, []
    for step in range(100):
        k = torch.randn(found.trace.layers[0].kv_heads, 1, found.trace.layers[0].keys.shape[-1])
        store.append(k, k, torch.tensor([70 + step]))
        sizes.append(store.near.longest)
        assert all(torch.equal(held, torch.arange(71 + step)) for held in store.positions)
    assert max(sizes) <= planned + plan.format.recent and min(sizes) >= planned
    near = store.near.slot_positions.expand(k.shape[0], -1)
    assert all({0, 1, 2, 3} <= set(row.tolist()) for row in near)  # the sinks never leave
    assert 169 in near[0] and 100 not in near[0]


def test_host_bytes_are_on_the_timeline_and_in_every_record() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(torch.arange(70))
    run = session.run(FetchAll(budget=0.5), max_new_tokens=3)
    last = run.memory.samples[-1]
    assert last.host == sum(store.host_nbytes for store in run.decoder.stores)  # type: ignore[union-attr]
    assert last.host == last.categories["host kv bfloat16"] + last.categories["host kv index"]
    assert last.total == last.device + last.host and run.memory.host_peak >= last.host
    assert run.to_dict(quality=False)["kv_host_nbytes"] == run.plan.host_nbytes > 0
    assert run.plan.nbytes + run.plan.host_nbytes > run.plan.full_nbytes  # nothing is lost, positions come on top
    frame = session.compare([FetchAll(budget=0.5)], budgets=[0.5], max_new_tokens=2)
    assert frame.host_mib[0] == pytest.approx(run.plan.host_nbytes / 2**20)
    assert "more in host memory" in run.summary() and "more in host memory" in run.plan.summary()


def test_host_memory_is_counted_apart_from_the_budget() -> None:
    plan = make_plan(reading().trace, [FetchAll(budget=0.25)], torch.bfloat16)
    assert plan.nbytes <= 0.25 * plan.full_nbytes
    assert set(plan.tiers.unique().tolist()) == {1, 2} and plan.precisions == ("bfloat16", "host")
    assert all(isinstance(store, OffloadStore | DenseStore) for store in plan.stores())


def test_what_goes_to_host_memory_cannot_be_quantised_too() -> None:
    with pytest.raises(BadRecipe, match="moves what is not selected to host memory, but kivi"):
        Stages.of([FetchAll(), KIVI()])
