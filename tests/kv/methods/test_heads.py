"""Methods that treat heads or layers by what they are for: HeadKV and its kin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.kv.support import random_ranking, softmax_rows, traced
from workbench.core.apportion import apportion
from workbench.core.memo import Memo
from workbench.engine import attention_hook
from workbench.errors import NotApplicable
from workbench.kv import HACK, AdaKV, HeadKV, HeadKVR2, KVzip, ScaleKV, UNComp, retrieval_heads
from workbench.kv.base import Study
from workbench.kv.methods.allocate import headkv
from workbench.kv.methods.allocate.uncomp import truncated_entropy
from workbench.kv.needle_tasks import Task, needle_tasks
from workbench.models import tiny
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring


def eager_attention(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Every layer's attention [h, n, n], from transformers."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return [layer[0] for layer in model(ids[None], output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(before)


# -- dividing


def test_shares_are_proportional_whole_and_complete() -> None:
    generator = torch.Generator().manual_seed(0)
    for total in (0, 1, 7, 50, 333, 900, 5000):
        weights = torch.rand(3, 4, generator=generator) ** 3
        most = torch.randint(0, 120, (3, 4), generator=generator)
        got = apportion(total, weights, most)
        assert int(got.sum()) == min(total, int(most.sum())) and bool((got <= most).all()) and int(got.min()) >= 0
        free = got < most
        if int(free.sum()) > 1:  # who is not full has the same share for its weight, to one entry
            rates = got[free] / weights[free]
            slack = 1 / weights[free]
            assert float((rates - slack).max()) <= float((rates + slack).min())


def test_weights_of_nothing_are_an_equal_split() -> None:
    assert apportion(10, torch.zeros(4), torch.full((4,), 5)).tolist() == [3, 3, 2, 2]


# -- HeadKV


def importance_plainly(model: PreTrainedModel, tasks: list[Task], *, reasoning: bool) -> list[list[float]]:
    """The published scores of all KV heads, by loops over transformers' attention."""
    heads, groups = (
        model.config.num_attention_heads,
        model.config.num_attention_heads // model.config.num_key_value_heads,
    )
    total = [[0.0] * heads for _ in range(model.config.num_hidden_layers)]
    for task in tasks:
        answer, n = task.answer.tolist(), task.ids.numel()
        needle = range(task.start, task.start + len(answer))
        assert task.ids[needle.start : needle.stop].tolist() == answer
        for layer, attention in enumerate(eager_attention(model, task.ids)):
            for head in range(heads):
                score = 0.0
                for i, token in enumerate(answer):
                    row = attention[head, n - len(answer) + i].tolist()
                    order = sorted(range(n), key=lambda j: -row[j])
                    if reasoning:
                        score += sum(row[j] for j in order[: len(answer)] if j in needle) / len(answer)
                    elif order[0] in needle and int(task.ids[order[0]]) == token:
                        score += 1 / len(answer)
                total[layer][head] += score / len(tasks)
    return [[sum(row[head : head + groups]) / groups for head in range(0, heads, groups)] for row in total]


@pytest.mark.parametrize("architecture", ["llama", "mha"])
@pytest.mark.parametrize("method", [HeadKV(tasks=3, task_tokens=64), HeadKVR2(tasks=3, task_tokens=64)])
def test_heads_are_measured_as_published(method: HeadKV | HeadKVR2, architecture: str) -> None:
    model = tiny(architecture, seed=4)
    got = method.importance(Study(traced(model), model))
    tasks = list(needle_tasks(model, None, 3, 64, reasoning=method.reasoning))
    want = importance_plainly(model, tasks, reasoning=method.reasoning)
    assert torch.allclose(got, torch.tensor(want), atol=1e-5)
    assert method.reasoning is False or float(got.std()) > 0


def test_each_head_has_an_equal_part_and_its_share_of_the_pool() -> None:
    layers, heads, tokens, window = 4, 3, 200, 8
    importance = torch.rand(layers, heads, generator=torch.Generator().manual_seed(2))
    ranking = random_ranking(layers, heads, tokens).beside(importance)
    for beta in (1.0, 1.2, 1.5, 5.0):
        for each in (3, 20, 60, 150, 200):
            counts = HeadKV(window=window, beta=beta).allocate(ranking, each * layers * heads)
            assert int(counts.sum()) == each * layers * heads and int(counts.max()) <= tokens
            base = each - window
            if base <= 0:
                assert bool((counts == each).all())
                continue
            shares = importance / importance.sum()
            want = window + base - base / beta + shares * (base / beta) * layers * heads
            if float(want.max()) <= tokens:
                assert float((counts - want).abs().max()) <= 2
            assert int(counts.min()) >= window + int(base - base / beta) - 1


def test_a_model_is_measured_once_whatever_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny("llama", seed=9), []

    def counted(*args: Any, **options: Any) -> Tensor:
        passes.append(args)
        return attention_hook.forward(*args, **options)

    monkeypatch.setattr(retrieval_heads, "forward", counted)
    method = HeadKV(budget=0.5, window=8, tasks=2, task_tokens=64)
    seen: list[tuple[str, int, int]] = []
    measured = Memo()
    for tokens in (60, 90):
        trace = traced(model, tokens)
        for budget in (0.3, 0.6):
            progress = Progress(lambda *update: seen.append(update))
            plan = make_plan(
                trace, [method.with_budget(budget)], torch.bfloat16, model=model, progress=progress, measured=measured
            )
            heads = method.importance(Study(trace, model, measured=measured))
            assert len(plan.counts.unique()) > 1 or float(heads.sum()) == 0
    assert len(passes) == 2
    assert ("measuring heads on needle tasks", 2, 2) in seen


def test_a_session_measures_its_model_once_and_each_compressed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[PreTrainedModel] = []
    measure = headkv.MeasuredHeads._measured

    def counted(method: HeadKV, study: Study) -> Tensor:
        measured.append(study.reader(method.key))
        return measure(method, study)

    monkeypatch.setattr(headkv.MeasuredHeads, "_measured", counted)
    session = wb.Session((tiny("llama"), None), trust=True)
    method = HeadKV(budget=0.5, window=8, tasks=2, task_tokens=64)
    for tokens in (60, 90):
        session.read(torch.arange(tokens))
        session.plan(method)
        session.plan([method, "rtn"])
    assert len(measured) == 2 and measured[0] is session.model and measured[1] is not session.model


def test_measured_room_combines_with_other_scores_but_not_with_other_room() -> None:
    model = tiny("llama")
    trace = traced(model)
    room = HeadKVR2(window=8, tasks=2, task_tokens=64)
    plan = make_plan(trace, [KVzip(budget=0.4), room], torch.bfloat16, model=model)
    assert plan.stages.allocate is room and plan.stages.score == KVzip(budget=0.4)
    with pytest.raises(wb.errors.BadRecipe, match="allocate"):
        make_plan(trace, [AdaKV(), room], torch.bfloat16, model=model)
    with pytest.raises(NotApplicable, match="no model"):
        make_plan(traced(model), [room], torch.bfloat16)


def test_the_default_model_has_few_heads_that_retrieve(default_session: wb.Session) -> None:
    session = default_session
    trace = session.read("The archive keeps the letters. " * 12)
    found = HeadKV(tasks=2, task_tokens=128).importance(Study(trace, session.model)).flatten().sort(descending=True)
    shares = found.values / found.values.sum()
    assert float(shares[: len(shares) // 4].sum()) > 0.6  # a quarter of the heads does most of it


# -- ScaleKV, UNComp, HACK


def made_trace(queries: list[Tensor], keys: list[Tensor]) -> Trace:
    """A trace by hand, one layer for each pair of queries [h, n, d] and keys [k, n, d]."""
    layers = tuple(
        LayerTrace(i, k, torch.ones_like(k), q, torch.device("cpu"), Scoring(1.0))
        for i, (q, k) in enumerate(zip(queries, keys, strict=True))
    )
    return Trace(Prompt(torch.zeros(keys[0].shape[1], dtype=torch.long), chat=False), layers, torch.zeros(1), 0.0)


def looking(targets: list[list[int]], n: int) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, n, n] of a head whose query i shares its attention among the positions targets[i]."""
    queries = torch.zeros(1, n, n)
    for i, seen in enumerate(targets):
        queries[0, i, seen] = 12.0
    return queries, torch.eye(n)[None]


def test_the_selectivity_index_is_near_attention_times_the_largest_far_ones() -> None:
    trace, current, selective = traced(tiny("llama")), 20, 5
    got = ScaleKV(current=current, selective=selective).importance(Study(trace))
    for layer, index in zip(trace.layers, got.tolist(), strict=True):
        rows, start = softmax_rows(layer), layer.tokens - current
        near, far = [], []
        for head in range(layer.heads):
            for i in range(start, layer.tokens):
                row = rows[head, i].tolist()
                near.append(sum(row[start:]))
                far.append(sum(sorted(row[:start], reverse=True)[:selective]))
        assert index == pytest.approx(sum(near) / len(near) * sum(far) / len(far), rel=1e-4)


def test_layers_that_look_everywhere_are_drafters_and_get_the_room() -> None:
    n = 60
    dispersed = looking([list(range(i + 1)) for i in range(n)], n)
    focused = looking([[0, i] for i in range(n)], n)
    order = [focused, focused, dispersed, focused, focused]
    trace = made_trace([q for q, _ in order], [k for _, k in order])
    method = ScaleKV(window=4, current=10, selective=2, drafters=0.2, budget=0.3)
    index = method.importance(Study(trace))
    assert int(index.argmin()) == 2 and float(index[2]) < 0.5 * float(index[[0, 1, 3, 4]].min())
    counts = make_plan(trace, [method], torch.bfloat16).counts
    assert counts[:, 0].argmax() == 2 and len(counts[[0, 1, 3, 4], 0].unique()) == 1


def test_drafters_share_what_refiners_leave() -> None:
    layers, heads, tokens = 10, 3, 300
    index = torch.rand(layers, generator=torch.Generator().manual_seed(3))
    ranking = random_ranking(layers, heads, tokens).beside(index)
    method = ScaleKV(drafters=0.2, refiner_room=0.7, window=8)
    drafting = index.argsort()[:2]
    for equal in (1, 5, 30, 100, 200, 299, 300):
        counts = method.allocate(ranking, equal * layers * heads)
        assert int(counts.sum()) == equal * layers * heads and int(counts.min()) >= 1 and int(counts.max()) <= tokens
        refiner = max(int(0.7 * equal), min(8, equal))
        drafter = (equal * layers - 8 * refiner) // 2
        if drafter <= tokens:
            assert bool((counts[drafting] == drafter).all())
            assert sorted(counts[:, 0].tolist())[: layers - 2] == [refiner] * 8
        else:  # the prompt is too short for what drafters would get
            assert bool((counts[drafting] == tokens).all())


def test_truncated_entropy_is_that_of_the_largest_eigenvalues() -> None:
    vectors = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 3
    for rank in (3, 8):
        got = truncated_entropy(vectors, rank)
        for head in range(2):
            x = vectors[head].double().numpy()
            x = x - x.mean(axis=0)
            total = np.zeros((8, 8))
            for row in x:
                unit = row / np.sqrt((row**2).sum())
                total += np.outer(unit, unit)
            eigenvalues = sorted(np.linalg.eigvals(total / np.trace(total)).real, reverse=True)[:rank]
            want = -sum(e * np.log(e) for e in eigenvalues) / np.log(8)
            assert float(got[head]) == pytest.approx(want, rel=1e-6)
    flat = truncated_entropy(torch.randn(4000, 8, generator=torch.Generator().manual_seed(1)), 8)
    assert float(flat) == pytest.approx(1, abs=0.01)  # all directions alike
    assert float(truncated_entropy(torch.randn(50, 1) * torch.ones(8), 8)) == pytest.approx(0, abs=1e-6)


def test_rich_heads_and_early_stages_get_more_room() -> None:
    entropy = torch.tensor([[0.9, 0.5, 0.7, 0.6], [0.89, 0.5, 0.7, 0.6], [0.5, 0.3, 0.4, 0.2], [0.6, 0.3, 0.4, 0.3]])
    ranking = random_ranking(4, 4, 500).beside(entropy.double())
    method = UNComp(window=8, groups=2, spread=0.5, decay=0.5, fall=0.05)
    entries = 100 * 16
    counts = method.allocate(ranking, entries)
    assert int(counts.sum()) == entries
    beyond = (counts - 8).double()
    # Two groups of two heads, and one fall of the entropy that begins a second stage.
    weights = torch.tensor([[1.5, 0.5, 1.5, 0.5]] * 2 + [[0.75, 0.25, 0.75, 0.25], [0.75, 0.25, 0.75, 0.25]])
    assert float((beyond - weights / weights.sum() * (entries - 8 * 16)).abs().max()) <= 1
    uniform = UNComp(window=8, groups=1, decay=1.0).allocate(ranking, entries)
    assert bool((uniform == 100).all())
    trace = traced(tiny("llama"))
    found = UNComp(rank=8).importance(Study(trace))
    for layer, heads in zip(trace.layers, found, strict=True):
        each = truncated_entropy(layer.queries, 8)
        assert heads.tolist() == pytest.approx([float(each[:2].mean()), float(each[2:].mean())])


def test_vertical_heads_are_contextual_and_diagonal_ones_structural() -> None:
    n = 64
    vertical, diagonal = looking([[0, 1] if i > 0 else [0] for i in range(n)], n), looking([[i] for i in range(n)], n)
    trace = made_trace([torch.cat([vertical[0], diagonal[0]])] * 3, [torch.cat([vertical[1], diagonal[1]])] * 3)
    method = HACK(probes=16, contextual=0.5, contextual_room=0.4, first=2, recent=6)
    variance = method.importance(Study(trace))
    assert float(variance[:, 0].max()) < 0.01 * float(variance[:, 1].min())
    plan = make_plan(trace, [method.with_budget("20 tokens")], torch.bfloat16)  # type: ignore[list-item]
    assert plan.counts.tolist() == [[8, 32]] * 3
    assert {0, 1} <= set(plan.kept(0, 0).tolist())  # where the vertical head looks
    assert {0, 1, *range(58, 64)} <= set(plan.kept(0, 1).tolist())


def test_hack_judges_by_the_attention_of_probes_over_the_second_half() -> None:
    trace, probes = traced(tiny("llama"), 61), 7
    method = HACK(probes=probes, first=3, recent=5, contextual=0.5)
    scores, variance = method.scores(Study(trace)), method.importance(Study(trace))
    at = [round(30 + step * 30 / 6) for step in range(probes)]
    found = []
    for layer in trace.layers:
        rows = softmax_rows(layer)
        for head in range(layer.kv_heads):
            spread = 0.0
            for query_head in (2 * head, 2 * head + 1):
                for column in range(layer.tokens):
                    seen = [float(rows[query_head, i, column]) for i in at]
                    spread += float(np.var(seen)) / 2
            found.append(spread)
    assert variance.flatten().tolist() == pytest.approx(found, rel=1e-4)
    contextual = set(sorted(range(6), key=lambda i: found[i])[:3])
    for i in range(6):
        layer, head = trace.layers[i // 2], i % 2
        votes = softmax_rows(layer)[2 * head : 2 * head + 2][:, at].sum(dim=(0, 1)).float()
        certain = torch.zeros(61, dtype=torch.bool)
        if i not in contextual:
            certain[:3] = certain[-5:] = True
        got = scores[i // 2, head]
        assert torch.equal(got.isinf(), certain) and torch.allclose(got[~certain], votes[~certain], atol=1e-5)


def test_hack_gives_back_what_a_short_prompt_leaves() -> None:
    variance = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    ranking = random_ranking(3, 4, 100).beside(variance)
    contextual = torch.zeros(12, dtype=torch.bool)
    contextual[variance.flatten().argsort()[:6]] = True
    for equal in (1, 10, 40, 80, 100):
        counts = HACK().allocate(ranking, equal * 12).flatten()
        assert int(counts.sum()) == equal * 12 and int(counts.min()) >= 1 and int(counts.max()) <= 100
        if equal <= 60:
            assert bool((counts[contextual] == max(int(0.4 * equal), 1)).all())
        else:
            assert bool((counts[~contextual] == 100).all())
    assert bool((HACK(contextual=1.0).allocate(ranking, 120) == 10).all())
    assert bool((HACK(contextual=0.0).allocate(ranking, 120) == 10).all())


@pytest.mark.parametrize("room", [ScaleKV(window=8), UNComp(window=8), HeadKV(window=8, tasks=1, task_tokens=64)])
def test_rooms_go_with_the_scores_of_kvzip(room: Any) -> None:
    model = tiny("llama")
    trace = traced(model)
    plan = make_plan(trace, [KVzip(budget=0.4), room], torch.bfloat16, model=model)
    assert plan.stages.allocate is room and isinstance(plan.stages.score, KVzip)
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= 0.4 * plan.full_nbytes
