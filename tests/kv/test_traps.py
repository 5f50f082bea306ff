"""Traps that other KV-cache projects fell into; each test is named after what it protects.

That every method answers the same question the same way (trap 4), keeps true positions in order (7) and leaves sliding
layers alone (13) are promises (test_kv_methods.py). Positions after eviction (8, 9, 11, 12), sliding windows (13) and
sinks (7) are in test_decoding.py, what is left on a model (15) in test_engine.py, chat templates (23) and padding (10)
in test_prompt.py. Key channels are never pruned (2), no cache is asked for its truth (16), and nothing is batched (18).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.kv.support import feasible, ids_of
from tests.runtime.memory_reach import budgets_of, within_reach
from workbench.errors import BudgetTooSmall, NotApplicable
from workbench.kv.base import KVMethod, Study
from workbench.kv.plan import Plan, rank
from workbench.kv.ranking import Ranking
from workbench.kv.stores.packed import PackedStore
from workbench.models import TINY_ARCHITECTURES, facts
from workbench.registry import _METHODS, find, registered
from workbench.runtime.decode import Decoder

if TYPE_CHECKING:
    from workbench.kv.stores.store import Store
    from workbench.trace import LayerTrace, Trace

ModelOf = Callable[[str], PreTrainedModel]
KV = [cls.key for cls in registered("kv")]
COMPRESSING = [cls.key for cls in registered("kv") if cls.takes_budget()]
SCORING = [cls.key for cls in registered("kv") if issubclass(cls, KVMethod) and cls().supplies("score")]


def fingerprint(trace: Trace) -> str:
    digest = hashlib.sha256()
    for layer in trace.layers:
        for held in (layer.keys_held, layer.values_held, layer.queries_held):
            digest.update(held.contiguous().numpy().tobytes())
    digest.update(trace.logits.numpy().tobytes())
    digest.update(trace.ids.numpy().tobytes())
    return digest.hexdigest()


def storages(stores: list[Store], model: PreTrainedModel) -> int:
    """Live bytes of everything reachable from stores, found without asking them; what is the model's own is not
    theirs, and what two of them share counts once.
    """
    found: dict[int, int] = {}
    seen: dict[int, Any] = {}

    def visit(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, list | tuple):
            for item in thing:
                visit(item)
        elif isinstance(thing, dict):
            visit(list(thing.values()))
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(stores)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    return sum(nbytes for place, nbytes in found.items() if place not in own)


@pytest.fixture(scope="module")
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    made = wb.Session((tiny_llama, None))
    made.read(ids_of(200, 0))
    return made


def planned(session: wb.Session, key: str, budget: float) -> Plan:
    """The plan, or the one at the smallest budget that the error names."""
    if not find(key).takes_budget():
        return session.plan(key)
    return feasible(lambda share: session.plan(key, budget=share), budget)


# --- storage


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("key", COMPRESSING)
def test_what_a_plan_saves_is_really_not_there(
    key: str, dtype: str, tiny_llama: PreTrainedModel
) -> None:  # traps 1, 22
    session = wb.Session((tiny_llama, None), kv_dtype=dtype)
    session.read(ids_of(200, 0))
    full = session.facts.layers * 2 * session.facts.kv_heads * session.facts.head_dim * 200 * session.kv_dtype.itemsize
    for budget in budgets_of(key):
        plan = planned(session, key, budget)
        stores = plan.stores()
        live = storages(stores, tiny_llama)
        here, away = (sum(getattr(store, kind) for store in stores) for kind in ("nbytes", "host_nbytes"))
        assert plan.full_nbytes == full
        assert live == here + away and here == plan.nbytes and away == plan.host_nbytes
        if plan.share <= budget and not plan.keeps_all:
            assert here <= budget * full


def test_plans_and_runs_never_touch_the_recording(session: wb.Session) -> None:  # trap 1
    assert session.trace is not None
    before = fingerprint(session.trace)
    for key in KV:
        plan = planned(session, key, 0.3)
        _ = plan.error, plan.survival(), plan.counts
        budget = {"budget": max(0.3, plan.share)} if find(key).takes_budget() else {}
        try:
            session.run(key, question=[5, 6], max_new_tokens=3, **budget).ask([7], max_new_tokens=2)
        except BudgetTooSmall:
            session.run(key, question=[5, 6], max_new_tokens=3, budget=1.0)
        assert fingerprint(session.trace) == before, key


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_cache_holds_kv_heads_not_query_heads(architecture: str, tiny_model: ModelOf) -> None:  # trap 3
    model = tiny_model(architecture)
    made = wb.Session((model, None), kv_dtype="float32")
    made.read(ids_of(12, 0))
    config = model.config
    per_layer = 2 * config.num_key_value_heads * 16 * 12 * 4
    assert made.plan("full").nbytes == config.num_hidden_layers * per_layer
    assert sum(store.nbytes for store in made.plan("full").stores()) == config.num_hidden_layers * per_layer


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
def test_keys_and_values_of_a_packed_cache_stay_in_step(length: int, tiny_llama: PreTrainedModel) -> None:  # trap 5
    made = wb.Session((tiny_llama, None))
    made.read(ids_of(length, 0))
    plan = made.plan(wb.kv.KIVI(bits=4, group=16, residual=32))
    decoder = Decoder(tiny_llama, plan.stores(), length)
    store = decoder.stores[0]
    assert isinstance(store, PackedStore)
    for step in range(40):
        held = store.contents(torch.float32)
        assert held.keys.shape == held.values.shape == (2, length + step, 16)
        assert [p.tolist() for p in store.positions] == [list(range(length + step))] * 2
        assert store.key_tail.longest < 32  # a whole block leaves as soon as it is full
        assert store.value_tail.longest == min(length + step, 32)  # the newest always stay
        decoder.feed(ids_of(1, step))


def test_keys_with_outlier_channels_are_quantised_by_channel() -> None:  # trap 6
    keys = torch.randn(2, 128, 32, generator=torch.Generator().manual_seed(0))
    keys[:, :, 5] += 30
    keep = torch.ones(2, 128, dtype=torch.bool)

    def error(axis: Any) -> float:
        store = PackedStore.where(keys, keys, keep, torch.float32, bits=2, group=32, residual=0, key_axis=axis)
        return float((store.contents(torch.float32).keys - keys).norm())

    plan_format = wb.kv.KIVI(bits=2).store(torch.bfloat16, [], None)
    assert getattr(plan_format, "key_axis", None) == "channel"
    assert error("channel") < 0.5 * error("token")


# --- positions and layers


@pytest.mark.parametrize("key", ["snapkv", "kivi", "ilre", "tailorkv"])  # that it holds of all is a promise
def test_sliding_window_layers_stay_exact_and_the_run_says_so(key: str, tiny_model: ModelOf) -> None:  # trap 13
    made = wb.Session((tiny_model("gemma3"), None))
    made.read(ids_of(100, 0))
    budget = within_reach(key, 0.6)
    try:
        run = made.run(key, budget=budget, max_new_tokens=3)
    except BudgetTooSmall as error:
        run = made.run(key, budget=error.smallest, max_new_tokens=3)
    assert set(run.plan.exact) == {0, 2}
    (note,) = (note for note in run.notes if note.startswith("layers"))  # one line for all with the same reason
    assert note.startswith("layers 0, 2: sliding window of 16")
    for layer in (0, 2):
        assert run.plan.kept(layer, 0).tolist() == list(range(84, 100))
    assert run.plan.error.isfinite().all()
    assert run.plan.error[[0, 2]].max() < 0.02  # rounding to 16 bits, nothing else


def test_a_model_that_slides_everywhere_refuses_a_smaller_budget(tiny_model: ModelOf) -> None:  # trap 13
    made = wb.Session((tiny_model("mistral"), None))
    made.read(ids_of(100, 0))
    with pytest.raises(BudgetTooSmall) as error:
        made.plan("snapkv", budget=0.5)
    assert error.value.smallest == 1.0
    assert made.plan("snapkv", budget=1.0).share == 1.0


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_the_map_of_a_sliding_layer_shows_all_that_its_queries_saw(
    architecture: str, tiny_model: ModelOf
) -> None:  # trap 13
    made = wb.Session((tiny_model(architecture), None))
    made.read(ids_of(60, 0))
    shown = made.attention(0, 0, pixels=60, pooling="sum").values
    assert torch.allclose(shown.sum(dim=-1), torch.ones(60), atol=1e-4)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_recorded_attention_is_the_models_own(architecture: str, tiny_model: ModelOf) -> None:  # trap 14
    """Head sizes that the config does not name, and q/k norms, are all in what was recorded."""
    model, prompt = tiny_model(architecture), ids_of(40, 0)
    assert facts(model).head_dim == 16
    made = wb.Session((model, None))
    trace = made.read(prompt)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            want = model(prompt[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    for layer in trace.layers:
        got = layer.attention(last=40).flatten(0, 1)  # [h, 40, 40]
        assert (got - want[layer.index][0]).abs().max() < 1e-5


# --- state


@contextmanager
def installed(cls: type[KVMethod]) -> Iterator[type[KVMethod]]:
    """A method of the test's own, for as long as the block lasts."""
    _METHODS[cls.key] = cls
    try:
        yield cls
    finally:
        del _METHODS[cls.key]


def scoring(score: Callable[[LayerTrace], Tensor]) -> type[KVMethod]:
    class Invented(KVMethod):
        """Score as the test says."""

        key, claim = "invented", "none"

        def score(self, layer: LayerTrace) -> Tensor:
            return score(layer)

    return Invented


def test_an_accident_in_a_method_changes_neither_it_nor_the_session(session: wb.Session) -> None:  # trap 17
    calls: list[int] = []

    def score(layer: LayerTrace) -> Tensor:
        calls.append(layer.index)
        if len(calls) == 2:
            raise RuntimeError("accident")
        return layer.keys.norm(dim=-1)

    with installed(scoring(score)) as cls:
        made = cls(budget=0.5)
        before, runs = made.to_dict(), len(session.runs)
        with pytest.raises(RuntimeError, match="accident"):
            session.run(made, max_new_tokens=2)
        assert made.to_dict() == before and len(session.runs) == runs
        assert session.plan(made).share <= 0.5  # nothing half done was remembered


def test_scores_that_are_not_numbers_are_refused(session: wb.Session) -> None:
    with installed(scoring(lambda layer: layer.keys.norm(dim=-1) * float("nan"))) as cls, pytest.raises(NotApplicable):
        session.plan(cls(budget=0.5))


@pytest.mark.parametrize("key", COMPRESSING)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_prompts_keep_something_everywhere_or_say_what_is_possible(  # trap 19
    key: str, length: int, tiny_llama: PreTrainedModel
) -> None:
    made = wb.Session((tiny_llama, None))
    made.read(ids_of(length, 0))
    for budget in (0.1, 0.5, 1.0):
        try:
            plan = made.plan(key, budget=budget)
        except BudgetTooSmall as refusal:
            if refusal.smallest > 1:
                continue  # it takes more than the full cache here, and says so
            plan = feasible(lambda share: made.plan(key, budget=share), budget)
        else:
            assert plan.nbytes <= budget * plan.full_nbytes
        assert int(plan.counts.min()) >= 1
        spent = budget if plan.share <= budget else plan.share + 1e-4
        try:
            run = made.run(key, budget=min(spent, 1.0), question=[3, 4], max_new_tokens=2)
        except BudgetTooSmall as error:  # what it reads for the question needs a little more than for none
            run = made.run(key, budget=error.smallest, question=[3, 4], max_new_tokens=2)
        assert len(run.tokens) == 2 and run.quality.kl >= 0


# Of these a budget moves whole precisions, channels, ranks or groups; or what an index, or a piece that is being read,
# needs at most is set aside.
STEPS = (
    "cskv", "deltallm", "eigen-attention", "fireq", "kivi", "kvtuner", "mikv", "minicache", "mustafar", "think",
    "turbomind", "vkv-1bit", "zipcache",
)  # fmt: skip
ASIDE = ("a2ats", "alisa", "ilre", "infllm", "tailorkv", "video-xl-2")


@pytest.mark.parametrize("key", [key for key in COMPRESSING if key not in STEPS + ASIDE])
def test_budgets_are_used_up_to_the_last_entry(key: str, session: wb.Session) -> None:  # trap 19
    for budget in budgets_of(key):
        plan = planned(session, key, budget)
        if plan.share > budget:
            continue  # more than that is needed
        entries = int((plan.tiers == 1).sum())
        one_more_each = plan.nbytes / entries * plan.counts.numel()
        assert plan.nbytes <= budget * plan.full_nbytes < plan.nbytes + 1.05 * one_more_each + 64


@pytest.mark.parametrize("tokens", [1, 16, 48, 199])
def test_a_budget_in_tokens_is_that_many_tokens(tokens: int, session: wb.Session) -> None:  # trap 19
    for key in ("snapkv", "h2o", "tova", "streaming-llm", "knorm"):
        assert bool((session.plan(key, budget=f"{tokens} tokens").counts == tokens).all()), key


# --- scores


def test_ties_are_broken_the_same_way_every_time() -> None:  # trap 20
    coarse = torch.rand(2, 3, 500, generator=torch.Generator().manual_seed(0)).mul(8).round().to(torch.bfloat16)
    first, second = Ranking(coarse), Ranking(coarse.clone())
    assert first.scores.dtype == torch.float32
    assert torch.equal(first.in_head, second.in_head) and torch.equal(first.in_layer, second.in_layer)
    order = first.in_head[0, 0].argsort()
    values = coarse[0, 0].float()[order]
    assert bool((values.diff() <= 0).all())
    tied = values.diff() == 0
    assert bool((order.diff()[tied] < 0).all())  # of equals the later position comes first
    for budget in (1, 7, 100):
        counts = torch.full((2, 3), budget)
        assert bool((first.selected(counts).sum(-1) == budget).all())  # never more because of a tie


def test_a_plan_of_nothing_but_ties_is_whole_and_repeatable(session: wb.Session) -> None:  # trap 20
    with installed(scoring(lambda layer: torch.zeros(layer.kv_heads, layer.tokens))) as cls:
        kept = [session.plan(cls(budget="50 tokens")).kept(0, 0).tolist() for _ in range(2)]
        assert kept[0] == kept[1] == list(range(150, 200))
        shared = session.plan([cls(budget="50 tokens"), "adakv"])
        assert shared.counts.tolist() == [[50, 50]] * 3  # equal heads share equally


def test_a_prompt_that_repeats_one_token_is_planned_the_same_way_twice(tiny_llama: PreTrainedModel) -> None:  # trap 20
    tiers = []
    for _ in range(2):
        made = wb.Session((tiny_llama, None))
        made.read([7] * 60)
        tiers.append([planned(made, key, 0.5).tiers for key in COMPRESSING])
    assert all(torch.equal(a, b) for a, b in zip(*tiers, strict=True))


@pytest.mark.parametrize("key", SCORING)
@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
def test_scores_are_one_a_kv_head_and_position(architecture: str, key: str, tiny_model: ModelOf) -> None:  # trap 21
    made = wb.Session((tiny_model(architecture), None))
    trace = made.read(ids_of(80, 0))
    method = find(key)()
    assert isinstance(method, KVMethod)
    ranking = rank(Study(trace, made.model), method)
    layers, heads = len(trace.compressible), made.facts.kv_heads
    assert ranking.scores.shape == (layers, heads, 80) and ranking.scores.dtype == torch.float32
    assert [layer.groups for layer in trace.layers] == [made.facts.group] * made.facts.layers


@pytest.mark.parametrize("key", KV)
def test_raising_the_budget_again_brings_back_exactly_what_was_there(key: str, session: wb.Session) -> None:
    first = planned(session, key, 0.75)
    answer = session.run(first.methods[0], question=[8, 9], max_new_tokens=3).tokens
    planned(session, key, 0.1)
    session.run(planned(session, key, 0.25).methods[0], question=[8, 9], max_new_tokens=3)
    again = planned(session, key, 0.75)
    assert torch.equal(first.tiers, again.tiers)
    for a, b in zip(first.stores(), again.stores(), strict=True):
        x, y = a.contents(torch.float32), b.contents(torch.float32)
        assert torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
    assert session.run(again.methods[0], question=[8, 9], max_new_tokens=3).tokens == answer
