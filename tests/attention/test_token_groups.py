"""CCA and DeltaLLM's attention: old groups of tokens seen coarsely, near ones exactly, and what that computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.attention.support import alike, attend
from workbench.attention import CoreContext, DeltaAttention
from workbench.attention.base import AttentionMethod, visible_entries
from workbench.attention.core_tokens import widest_shape
from workbench.attention.key_differences import DeltaShape, delta_attention
from workbench.attention.token_groups import groups_behind, split
from workbench.core.causal_attention import causal_attention
from workbench.examples import needle
from workbench.kv.stores.delta import deltas
from workbench.measure.memory import LiveBytes
from workbench_kernels import Scoring


def capped(score: float, cap: float | None) -> float:
    return score if cap is None else cap * math.tanh(score / cap)


@pytest.mark.parametrize(("group", "window", "sinks"), [(1, 1, 0), (4, 1, 0), (4, 5, 3), (16, 8, 4), (64, 32, 0)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 30, 200])
def test_pairs_are_those_that_a_loop_counts(group: int, window: int, sinks: int, tokens: int) -> None:
    coarse = exact = most = 0
    for i in range(tokens):
        old = max(i + 1 - window - sinks, 0) // group
        assert int(groups_behind(torch.tensor(i), group, window, sinks)) == old
        coarse, exact, most = coarse + old, exact + i + 1 - old * group, max(most, old)
    assert split(tokens, group, window, sinks) == (coarse, exact, most)


# --- CCA


@pytest.mark.parametrize("allowed", [1, 40, 90, 200, 400])
@pytest.mark.parametrize("groups", [(4,), (8, 4), (2, 16)])
def test_the_window_is_the_widest_that_the_entries_allow(allowed: int, groups: tuple[int, ...]) -> None:
    tokens, sinks = 30, 3

    def entries(group: int, window: int) -> int:
        pairs = split(tokens, group, window, sinks)
        return pairs.coarse + pairs.exact + pairs.groups * group

    found = widest_shape(tokens, groups, allowed, sinks)
    fitting = [(g, [w for w in range(1, tokens + 1) if entries(g, w) <= allowed]) for g in groups]
    first = next(((g, windows) for g, windows in fitting if windows), None)
    if first is None:
        assert found.entries == min(entries(g, 1) for g in groups)
    else:
        assert (found.group, found.window) == (first[0], max(first[1]))
    assert found.entries == entries(found.group, found.window)
    assert found.whole == (not split(tokens, found.group, found.window, sinks).groups)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("weight", ["group", "token"])
@pytest.mark.parametrize(("group", "window", "sinks"), [(2, 1, 0), (4, 5, 3), (8, 3, 0)])
@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_core_tokens_stand_for_old_groups(
    group: int, window: int, sinks: int, weight: str, softcap: float | None, tokens: int
) -> None:
    query, key, value = tensors = alike(tokens)
    want, entries = torch.zeros(4, tokens, 6, dtype=torch.float64), 0
    pooled = 0
    for h in range(4):
        q, k, v = query[h].double(), key[h // 2].double(), value[h // 2].double()

        def score(a: Tensor, b: Tensor) -> float:
            return capped(float(a @ b) * 0.4, softcap)

        for i in range(tokens):
            old = max(i + 1 - window - sinks, 0) // group
            entries += old + i + 1 - old * group
            pooled = max(pooled, old)
            scores, mixed = [], []
            for g in range(old):
                held = range(sinks + g * group, sinks + (g + 1) * group)
                weights = torch.tensor([score(q[held[-1]], k[j]) for j in held], dtype=torch.float64).softmax(0)
                core = sum(w * k[j] for w, j in zip(weights, held, strict=True))
                scores.append(score(q[i], core) + (math.log(group) if weight == "group" else 0.0))
                mixed.append(sum(w * v[j] for w, j in zip(weights, held, strict=True)))
            first = [*range(min(sinks, i + 1)), *range(sinks + old * group, i + 1)] if old else range(i + 1)
            for j in first:
                scores.append(score(q[i], k[j]))
                mixed.append(v[j])
            want[h, i] = torch.tensor(scores, dtype=torch.float64).softmax(0) @ torch.stack(mixed)
    method = CoreContext(group=group, window=window, sinks=sinks, weight=weight)
    got, computed = attend(method, tensors, Scoring(0.4, softcap=softcap))
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
    assert computed == entries + 4 * pooled * group == 4 * method.entries(tokens, 1)


def test_a_group_of_equal_tokens_loses_nothing() -> None:
    query, key, value = alike(64)
    same = (query, key[:, ::8].repeat_interleave(8, dim=1), value[:, ::8].repeat_interleave(8, dim=1))
    got, _ = attend(CoreContext(group=8, window=4, sinks=0), same)
    torch.testing.assert_close(got, causal_attention(*same, Scoring(0.4)), rtol=1e-4, atol=1e-5)
    published, _ = attend(CoreContext(group=8, window=4, sinks=0, weight="token"), same)
    assert (published - got).abs().max() > 1e-2  # there a group counts no more than one of its tokens


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("group", ["auto", 16])
def test_the_window_is_the_widest_that_the_budget_allows(budget: float, group: str | int) -> None:
    method, allowed = CoreContext(budget=budget, group=group), budget * visible_entries(2000)
    shape = method._shape(2000)
    wider = CoreContext(group=shape.group, window=shape.window + 1)
    assert method.entries(2000, 1) <= allowed < wider.entries(2000, 1)


# --- DeltaLLM


def by_sums(tensors: tuple[Tensor, Tensor, Tensor], shape: DeltaShape, cap: float | None) -> tuple[Tensor, int]:
    """Scores outside the window as running sums of products with what moved, and the products made, in a loop."""
    query, key, value = tensors
    tokens, width, made = query.shape[1], query.shape[2], 0
    want = torch.zeros(4, tokens, value.shape[-1], dtype=torch.float64)
    for h in range(4):
        q, k = query[h].double() * 0.4, key[h // 2]
        count = int(width * (shape.group - 1) * (1 - shape.zeros) + 1e-9)
        for i in range(tokens):
            old, scores = max(i + 1 - shape.window, 0) // shape.group, []
            for g in range(old):
                block = k[g * shape.group : (g + 1) * shape.group]
                threshold = float(deltas(block[None], count)[2])
                last, total = block[0].clone(), float(q[i] @ block[0].double())
                made += width
                scores.append(capped(total, cap))
                for row in block[1:]:
                    for c in range(width):
                        if abs(row[c] - last[c]) > threshold:
                            total += float(q[i, c] * (row[c].double() - last[c].double()))
                            last[c] = row[c]
                            made += 1
                    scores.append(capped(total, cap))
            exact = range(old * shape.group, i + 1)
            made += len(exact) * width
            scores += [capped(float(q[i] @ k[j].double()), cap) for j in exact]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            want[h, i] = weights @ value[h // 2, : i + 1].double()
    return want.float(), made


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("group", "window", "zeros"), [(4, 1, 0.5), (8, 3, 0.8), (16, 4, 0.3), (8, 2, 1.0)])
def test_only_channels_that_moved_are_multiplied(group: int, window: int, zeros: float, softcap: float | None) -> None:
    tensors = alike(37)
    shape = DeltaShape.of(37, group, window, zeros)
    got, computed = delta_attention(*tensors, shape, Scoring(0.4, softcap=softcap))
    want, products = by_sums(tensors, shape, softcap)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert computed == -(-products // 8) <= 4 * shape.entries


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.6, 0.9])
def test_a_budget_takes_as_many_zeros_as_it_needs(budget: float) -> None:
    method, allowed = DeltaAttention(budget=budget), budget * visible_entries(1000)
    shape = method._shape(1000)
    assert 0.97 * allowed < shape.entries <= allowed
    assert DeltaAttention(budget=budget + 0.05)._shape(1000).zeros < shape.zeros


@pytest.mark.parametrize("method", [CoreContext(budget=0.3), DeltaAttention(budget=0.3)], ids=lambda m: m.key)
def test_a_layer_with_a_narrow_window_of_its_own_stays_exact(method: AttentionMethod) -> None:
    tensors = alike(300)
    got, computed = attend(method, tensors, Scoring(0.4, 12))
    assert torch.equal(got, causal_attention(*tensors, Scoring(0.4, 12)))
    assert computed == 4 * visible_entries(300, 12)


@pytest.mark.parametrize("method", [CoreContext(budget=0.2), DeltaAttention()], ids=lambda m: m.key)
def test_working_memory_does_not_grow_with_the_square_of_the_length(method: AttentionMethod) -> None:
    tensors = alike(4096, heads=2, kv_heads=1)
    with LiveBytes() as live:
        attend(method, tensors)
    assert live.peak < 2 * 4096 * 4096 * 4 / 6  # a sixth of the matrix of scores


@pytest.mark.parametrize("key", ["cca", "deltallm-attention"])
def test_the_error_falls_as_the_budget_grows(default_session: wb.Session, key: str) -> None:
    layer = default_session.read(needle(400).text).layers[12]
    tensors = (layer.queries.float(), layer.keys.float(), layer.values.float())
    want = causal_attention(*tensors, layer.scoring)
    errors = []
    for budget in (0.2, 0.35, 0.5, 0.8, 1.0):
        got, _ = attend(wb.method(key, budget=budget), tensors, layer.scoring)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[3] and errors[-1] < 1e-5
