"""What every method gives has the shape and the dtype that its stages say, at every call of a plan and a short run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from transformers import PreTrainedModel

from tests import shapes
from tests.kv.test_methods import described
from tests.readings import decoder_of
from tests.test_promises import SMALL
from workbench import testing
from workbench.attention.base import AttentionMethod
from workbench.attention.operators.base import Operator
from workbench.core.attention_rows import RowBlock
from workbench.errors import BudgetTooSmall
from workbench.kv import H2O, AdaKV, Knorm
from workbench.kv.base import KVMethod
from workbench.kv.plan import Plan
from workbench.kv.ranking import Ranking
from workbench.kv.stores import DenseStore, Dequantised, Store
from workbench.models import facts
from workbench.registry import find, registered
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read
from workbench.testing import Subjects
from workbench.trace import LayerTrace
from workbench.weights.base import WeightMethod
from workbench.weights.compress import compressed
from workbench.weights.layers.compact import CompactLinear
from workbench.weights.layers.low_rank import LowRankLinear
from workbench_kernels import Scoring

NEW = torch.arange(3, 12)


@pytest.fixture(scope="module")
def called() -> Iterator[set[str]]:
    """Every call is checked; the functions that were called so far."""
    with shapes.watched() as called:
        yield called


@pytest.fixture(scope="module")
def subjects() -> Subjects:
    """Of this file alone: what another file's tests made a trace remember would not be called again."""
    return Subjects()


OTHERWISE = {"awq": [{"fold": False}]}  # another way through a method, without which a stage is not called


def keys_of(family: str) -> list[str]:
    return [cls.key for cls in registered(family)]


def went_on(plan: Plan, model: PreTrainedModel) -> Decoder:
    """A run over what was planned: some tokens together, then one by one."""
    decoder = decoder_of(model, plan)
    decoder.feed(NEW[:5], logits=5)
    for token in NEW[5:]:
        decoder.feed(token[None])
    return decoder


@pytest.mark.parametrize("key", keys_of("kv"))
def test_kv_stages_and_stores_give_the_shapes_they_say(key: str, called: set[str], subjects: Subjects) -> None:
    method, found = described(key), subjects.reading()
    for dtype in (torch.bfloat16, torch.float32):
        plan = testing.plan_on(found, method, dtype=dtype)
        decoder = went_on(plan, found.model)
        for store in decoder.clone().stores:
            assert store.entries > 0 and len(store.positions) == store.kv_heads
            store.contents(torch.float32)
            store.tiers(plan.trace.tokens)
            store.attend(torch.randn(4, 2, 16), torch.tensor([200, 201]), Scoring(0.25), weights=not store.retrieves)
        plan.survival(), plan.error, plan.kept(0, 0)
    if "score" in vars(type(method)):  # a class that has `scores` too may not need it
        method.score(found.trace.compressible[-1])
    assert shapes.declared_of(type(method)) <= called


@pytest.mark.parametrize("key", keys_of("attention"))
def test_attention_methods_give_the_shapes_they_say(key: str, called: set[str], subjects: Subjects) -> None:
    method, found = find(key)(), subjects.reading()
    assert isinstance(method, AttentionMethod)
    try:
        method.check(testing.TOKENS, len(found.trace.layers))
    except BudgetTooSmall as refusal:
        method = method.with_budget(refusal.smallest)
    for architecture in ("llama", "gemma3"):
        model, trace = subjects.reading(architecture)
        read(model, facts(model), trace.prompt, method=method)
    decoding = method if method.decodes else None
    for budget in (1.0, 0.6):  # heads of equal and of unequal length
        plan = make_plan(found.trace, [described("adakv", budget=budget)], torch.float32, model=found.model)
        decoder = Decoder(found.model, plan.stores(), plan.position, None, decoding, found.trace.layers)
        decoder.feed(NEW[:5], logits=5)
        decoder.feed(NEW[5:6])
    assert shapes.declared_of(type(method)) <= called


@pytest.mark.parametrize("key", keys_of("operator"))
def test_operators_give_the_shapes_they_say(key: str, called: set[str], subjects: Subjects) -> None:
    operator = find(key)()
    assert isinstance(operator, Operator)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(x, generator=generator).to(dtype) for x in ((4, 33, 8), (2, 33, 8), (2, 33, 6)))
        operator.plain(q, k, v, 0.3)
        operator.apply(q, k, v, 0.3)
        operator.rows(q, k, 0.3, 7, 20)
        operator.for_head(3, 4).weights(q[3:], k[1:], 0.3)
    assert shapes.declared_of(type(operator)) <= called


@pytest.mark.parametrize("key", keys_of("weights"))
def test_weight_methods_and_their_layers_give_the_shapes_they_say(
    key: str, called: set[str], subjects: Subjects
) -> None:
    method = find(key)(**SMALL.get(key, {}))
    assert isinstance(method, WeightMethod)
    model, _ = subjects.reading()
    twin = compressed(model, [method])
    for settings in OTHERWISE.get(key, ()):
        compressed(model, [find(key)(**settings)])
    with torch.no_grad():
        logits = twin(NEW[None]).logits
    assert logits.shape == (1, len(NEW), model.config.vocab_size)
    plain = dict(model.named_modules())
    for name, layer in twin.named_modules():
        if isinstance(layer, CompactLinear):
            layer(torch.randn(2, 3, layer.in_features).to(torch.bfloat16))
            layer(torch.randn(layer.in_features))
            layer.dequantised()
            layer.rows(1, 3, torch.bfloat16)
            if not method.together and name in plain:
                assert plain[name].weight.shape == (layer.out_features, layer.in_features)
    assert shapes.declared_of(type(method)) <= called


# -- it can fail


class OfOneHead(Knorm):
    def score(self, layer: LayerTrace) -> Tensor:
        return super().score(layer)[0]


class InDouble(Knorm):
    def score(self, layer: LayerTrace) -> Tensor:
        return super().score(layer).double()


class OfLayersAlone(AdaKV):
    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        return super().allocate(ranking, entries)[:, 0]


class ByToken(Knorm):
    def merge(self, layer: LayerTrace, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return layer.keys.transpose(0, 1), layer.values.transpose(0, 1)


class ForgetsAHead(H2O):
    def update_state(self, state: Tensor, weights: Tensor) -> Tensor:
        return super().update_state(state, weights)[:1]


@pytest.mark.parametrize("cls", [OfOneHead, InDouble, OfLayersAlone, ByToken, ForgetsAHead])
def test_a_kv_method_that_gives_another_shape_or_dtype_is_caught(cls: type[KVMethod], subjects: Subjects) -> None:
    (stage,), found = shapes.declared_of(cls), subjects.reading()
    with shapes.watched(KVMethod), pytest.raises(TypeCheckError, match=rf"return value of {stage}\."):
        went_on(testing.plan_on(found, cls(budget=0.5)), found.model)


def test_a_store_that_ignores_the_dtype_asked_for_is_caught(subjects: Subjects) -> None:
    class Deaf(DenseStore):
        def contents(self, dtype: torch.dtype) -> Dequantised:
            return super().contents(torch.float64)

    layer = subjects.reading().trace.layers[0]
    everything = torch.ones(layer.kv_heads, layer.tokens, dtype=torch.bool)
    store = Deaf.where(layer.keys, layer.values, everything, torch.float32)
    with shapes.watched(Store), pytest.raises(shapes.WrongDtype, match=r"Deaf\.contents"):
        store.attend(layer.queries[:, -2:], torch.arange(68, 70), layer.scoring)


def test_an_operator_that_gives_whole_rows_is_caught() -> None:
    class Whole(find("inline")):
        def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
            return torch.zeros(len(q), stop - first, q.shape[1])

    q, k = torch.randn(2, 2, 30, 8)
    with shapes.watched(Operator), pytest.raises(TypeCheckError, match=r"return value of .*rows"):
        Whole().rows(q, k, 0.3, 4, 8)


def test_a_layer_that_gives_columns_for_rows_is_caught() -> None:
    class Turned(LowRankLinear):
        def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
            return super().rows(first, last, dtype).T

    with shapes.watched(CompactLinear), pytest.raises(TypeCheckError, match=r"return value of .*rows"):
        Turned(torch.randn(2, 8), torch.randn(6, 2)).dequantised()


def test_nothing_stays_checked_afterwards() -> None:
    before = (KVMethod.score, DenseStore.append, Plan.__init__, vars(RowBlock)["__new__"])
    with shapes.watched():
        assert KVMethod.score is not before[0]
    assert before == (KVMethod.score, DenseStore.append, Plan.__init__, vars(RowBlock)["__new__"])
