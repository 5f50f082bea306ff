"""The stores of every KV method attend with learned sinks and with slopes of positions, or say that they cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kv.support import SHORT, TOKENS, feasible, model_of, trace_of
from workbench.core.memo import Memo
from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod
from workbench.kv.stores import Store
from workbench.registry import find, registered
from workbench.runtime.planning import make_plan
from workbench_kernels import Scoring

KEYS = [cls.key for cls in registered("kv")]
# What these look for they find by products of queries and keys alone.
BY_PRODUCTS = {"a2ats", "quest", "retrievalattention", "sentencekv", "tailorkv"}
NEW = 3


def layer_after(key: str, scoring: Callable[[Scoring], Scoring]) -> tuple[Store, Tensor, Tensor, Scoring]:
    """A layer's store of the method after a few new tokens, their queries, their positions, and the layer's scoring."""
    method = find(key)(**SHORT.get(key, {}))
    assert isinstance(method, KVMethod)
    trace = trace_of()
    layers = tuple(replace(layer, scoring=scoring(layer.scoring)) for layer in trace.layers)
    described = replace(trace, layers=layers, memo=Memo())

    def plan(budget: float | None) -> Any:
        asked: Any = method if budget is None else method.with_budget(budget)
        return make_plan(described, [asked], torch.float32, model=model_of(trace))

    made = feasible(plan, 0.5) if method.takes_budget() else plan(None)
    layer = layers[1]
    store = made.stores()[1]
    drawn = torch.Generator().manual_seed(0)
    keys, values, queries = (
        torch.randn(heads, NEW, 16, generator=drawn) for heads in (layer.kv_heads, layer.kv_heads, layer.heads)
    )
    positions = torch.arange(TOKENS, TOKENS + NEW)
    store.reads(torch.arange(NEW), positions)
    store.append(keys, values, positions)
    return store, queries, positions, layer.scoring


def attended(store: Store, queries: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
    return store.clone().attend(queries, positions, scoring)[0]


@pytest.mark.parametrize("key", KEYS)
def test_sinks_take_their_share_of_every_row(key: str) -> None:
    """With a sink s a row's output is that without, times Z / (Z + exp(s)): one sink says what Z is, another tests."""
    store, *asked, plain = layer_after(key, lambda scoring: scoring)
    without = attended(store, *asked, plain)

    def shares(sink: float) -> Tensor:
        out = attended(store, *asked, replace(plain, sinks=torch.full((4,), sink)))
        share = (out * without).sum(dim=-1) / without.square().sum(dim=-1)  # [h, q]
        torch.testing.assert_close(out, without * share[..., None], rtol=1e-3, atol=1e-4)
        return share

    one = shares(2.0)
    whole = one / (1 - one) * torch.tensor(2.0).exp()
    assert (one < 1 - 1e-4).all()
    torch.testing.assert_close(shares(4.0), whole / (whole + torch.tensor(4.0).exp()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("key", KEYS)
def test_slopes_lead_to_the_newest_or_to_the_oldest_entry(key: str) -> None:
    """Steep ones leave a query nothing but its own value, or that of the first position that its head holds."""
    steep = torch.full((4,), 60.0)
    try:
        store, queries, positions, scoring = layer_after(key, lambda plain: replace(plain, slopes=steep))
    except NotApplicable as refusal:
        assert key in BY_PRODUCTS, refusal
        assert "ALiBi" in str(refusal) or "slopes" in str(refusal)
        return
    assert key not in BY_PRODUCTS
    held = store.contents(torch.float32)
    places = held.positions.expand(len(held.keys), -1).long()
    real = torch.ones_like(places, dtype=torch.bool) if held.valid is None else held.valid
    for slopes, end in (
        (steep, places.masked_fill(~real, -1).argmax(1)),
        (-steep, places.masked_fill(~real, TOKENS + NEW).argmin(1)),
    ):
        wanted = held.values[torch.arange(len(end)), end].repeat_interleave(2, dim=0)  # [h, dv]
        got = attended(store, queries[:, -1:], positions[-1:], replace(scoring, slopes=slopes))[:, 0]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
