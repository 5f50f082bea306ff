"""EpiCache: episodes by k-means, scores by patched prompts, room by sensitivity, within a bounded memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, numbers
from workbench import testing
from workbench.core.kmeans import kmeans
from workbench.engine.attention_hook import forward
from workbench.kv import EpiCache
from workbench.kv.episodes import embedding
from workbench.kv.head_order import best, most_attended, with_sinks
from workbench.kv.layer_sensitivity import key_similarity, layer_counts, layer_weights
from workbench.models import facts, tiny
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read
from workbench_kernels import Scoring, attend


def conversation(turns: int = 12) -> Tensor:
    """Segments of 8 tokens about three subjects in turn, each with words of its own."""
    return torch.cat([ids_of(8, low=80 * (turn % 3) + turn // 3, high=80 * (turn % 3) + 20) for turn in range(turns)])


# -- k-means


def test_kmeans_finds_groups_that_are_there() -> None:
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = places.repeat(7, 1) + 0.1 * numbers(21, 2)
    centres, nearest = kmeans(points, 3)
    assert len(centres) == 3
    for group in range(3):
        members = points[group::3]
        assert len(nearest[group::3].unique()) == 1
        assert torch.allclose(centres[nearest[group]], members.mean(dim=0).double(), atol=1e-6)


def test_kmeans_is_where_no_point_and_no_centre_moves() -> None:
    points = numbers(60, 5).double()
    centres, nearest = kmeans(points, 6)
    for index, point in enumerate(points):
        distances = [float((point - centre).square().sum()) for centre in centres]
        assert distances[int(nearest[index])] == min(distances)
    for number, centre in enumerate(centres):
        assert torch.allclose(centre, points[nearest == number].mean(dim=0))


def test_kmeans_repeats_itself_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, two = (kmeans(numbers(40, 3), 5, seed=4)[0] for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


def test_kmeans_finds_fewer_where_there_are_fewer() -> None:
    centres, nearest = kmeans(torch.ones(5, 3), 4)
    assert centres.tolist() == [[1.0, 1.0, 1.0]] and nearest.tolist() == [0] * 5
    assert len(kmeans(numbers(2, 3), 4)[0]) == 2


# -- episodes


def reading_of(ids: Tensor, question: Tensor | None) -> Any:
    return SimpleNamespace(model=tiny("llama"), prompt=Prompt(ids, chat=False), question=question)


def test_a_question_finds_the_episode_of_its_subject_and_is_represented_by_its_medoids() -> None:
    ids, method = conversation(), EpiCache(episodes=3, segment=8, medoids=2)
    for subject in range(3):
        episode = method.matched(reading_of(ids, ids_of(5, low=80 * subject + 2, high=80 * subject + 20)))
        assert "of 3: 4 of 12 segments" in episode.note
        # The plain definition: of the subject's segments the two most similar to the mean of their embeddings.
        own = [ids[8 * turn : 8 * turn + 8] for turn in range(subject, 12, 3)]
        embedded = torch.stack([embedding(tiny("llama"), part) for part in own])
        centre = embedded.mean(dim=0)
        close = [float(row @ centre / row.norm() / centre.norm()) for row in embedded]
        chosen = sorted(sorted(range(4), key=lambda i: -close[i])[:2])
        assert torch.equal(episode.patched, torch.cat([own[i] for i in chosen]))


def test_without_a_question_the_end_of_the_prompt_is_asked() -> None:
    ids, method = conversation(), EpiCache(episodes=3, segment=8)
    nothing, end = (method.matched(reading_of(ids, question)) for question in (None, ids[-8:]))
    assert torch.equal(nothing.patched, end.patched) and nothing.note == end.note


def test_another_question_is_answered_from_another_episode_and_the_same_again_from_memory() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(conversation(24), record=False)
    method = EpiCache(budget=0.3, episodes=3, segment=8, block=16)
    runs = [session.run(method, question=ids_of(5, low=low, high=low + 18), max_new_tokens=2) for low in (2, 82, 2)]
    kept = [run.plan.tiers for run in runs]
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert runs[0].plan.timeline is runs[2].plan.timeline
    assert all("EpiCache answers from episode" in run.plan.notes[-1] for run in runs)


# -- scores and room


def test_a_score_is_the_most_attention_of_any_query_of_the_group_among_what_is_held() -> None:
    logits = numbers(2, 3, 4, 9)  # [k, g, q, m + own]
    rows = logits.softmax(dim=-1)[..., :7]
    got = most_attended(rows)
    for head in range(2):
        for slot in range(7):
            shares = [logits[head, g, q, :7].softmax(dim=-1)[slot] for g in range(3) for q in range(4)]
            assert float(got[head, slot]) == pytest.approx(float(max(shares)), abs=1e-6)


def test_the_best_of_all_heads_stay_and_one_of_each_at_least() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.05, 0.3]])
    assert best(scores, 4, equal=False).tolist() == [[True, True, True, False], [False, False, False, True]]
    assert best(scores, 5, equal=True).tolist() == [[True, True, False, False], [False, True, False, True]]
    sunk = with_sinks(scores, torch.tensor([[0, 1, 5, 9]]), 2)
    assert best(sunk, 4, equal=False).tolist() == [[True, True, False, False]] * 2


def test_room_is_in_proportion_to_the_weights_within_what_is_held_and_the_floor() -> None:
    held, floor = torch.tensor([100, 100, 100]), torch.tensor([10, 10, 10])
    assert layer_counts(120, torch.tensor([1.0, 2.0, 3.0]), held, floor).tolist() == [20, 40, 60]
    assert layer_counts(120, torch.tensor([0.0, 1.0, 1.0]), held, floor).tolist() == [10, 55, 55]
    assert layer_counts(120, torch.tensor([0.0, 1.0, 100.0]), held, floor).tolist() == [10, 10, 100]
    assert layer_counts(90, torch.zeros(3), held, floor).tolist() == [30, 30, 30]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_similarity_is_that_of_keys_read_whole_and_read_in_blocks(architecture: str) -> None:
    model, ids, sinks = tiny(architecture, window=640), ids_of(240), 3
    got = key_similarity(model, ids, sinks)
    whole = read(model, facts(model), Prompt(ids, chat=False))
    seen = torch.zeros(240, 240, dtype=torch.bool)
    for i in range(240):
        for j in range(i + 1):
            seen[i, j] = j < sinks or j // 60 == i // 60 or (j // 60 == i // 60 - 1 and j % 60 >= 30)
    keys = keys_under(model, ids, seen)
    for layer in whole.layers:
        values = []
        for head in range(layer.kv_heads):
            for start in (0, 100, 200):
                pair = (x[head, start : start + 100].double().flatten() for x in (layer.keys, keys[layer.index]))
                values.append(float(torch.cosine_similarity(*pair, dim=0)))
        assert float(got[layer.index]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert float(got[0]) == pytest.approx(1, abs=1e-5) and float(got[2]) < 0.9999
    assert float(key_similarity(model, ids, sinks=20)[2]) > float(key_similarity(model, ids, sinks=0)[2])


def keys_under(model: Any, ids: Tensor, seen: Tensor) -> dict[int, Tensor]:
    class Alone:
        def __init__(self) -> None:
            self.keys: dict[int, Tensor] = {}

        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            self.keys[layer] = key.clone()
            return attend(query, key, value, scoring, visible=seen[None])[0]

    alone = Alone()
    forward(model, alone, ids, torch.arange(len(ids)))
    return alone.keys


def test_one_eviction_keeps_what_the_patched_prompt_attends_to_most() -> None:
    found = testing.fresh_reading(tokens=48)
    ids = found.trace.ids
    method = EpiCache(budget=0.95, episodes=2, segment=8, medoids=1, block=8, alpha=0.0, heads="equal", sinks=2)
    plan = make_plan(found.trace, [method], torch.float32, model=found.model)
    held = int(plan.tiers[0, 0].sum())
    assert 40 <= held < 48  # the last block of eight is the only one that has no room
    patched = method.matched(reading_of(ids, None)).patched
    again = read(found.model, facts(found.model), Prompt(torch.cat([ids[:40], patched]), chat=False))
    for layer in again.layers:
        for head in range(layer.kv_heads):
            score = torch.zeros(40)
            for g in range(layer.groups):
                for q in range(40, 48):
                    query = layer.queries[head * layer.groups + g, q].double()
                    shares = (layer.keys[head, :40].double() @ query * layer.scale).softmax(dim=-1)
                    score = torch.maximum(score, shares.float())
            score[:2] = 2
            want = set(score.topk(held - 8).indices.tolist()) | set(range(40, 48))
            assert set(plan.tiers[layer.index, head].nonzero()[:, 0].tolist()) == want


def test_sensitive_layers_get_more_and_none_less_than_a_quarter() -> None:
    found = testing.fresh_reading(tokens=200)

    def kept(alpha: float) -> list[int]:
        plan = make_plan(
            found.trace, [EpiCache(budget=0.25, segment=8, alpha=alpha)], torch.bfloat16, model=found.model
        )
        return [int(layer.sum()) for layer in plan.tiers]

    even, uneven = kept(0.0), kept(1.1)
    assert max(even) - min(even) <= 1
    similar = key_similarity(found.model, found.trace.ids, sinks=4)
    order = sorted(range(3), key=lambda layer: -float(similar[layer]))
    assert sorted(range(3), key=lambda layer: uneven[layer]) == order
    # The least sensitive layer gets the least there may be: before the last block a quarter of the mean.
    assert min(even) // 4 <= min(uneven) < min(even) // 2 and max(uneven) > max(even) * 1.2


def test_layers_weights_lie_between_the_least_and_the_most_sensitive() -> None:
    similarity = torch.tensor([0.999, 0.95, 0.99, 0.97], dtype=torch.float64)
    want = [((0.999 - s) / 0.049) ** 1.1 for s in similarity.tolist()]
    assert layer_weights(similarity, 1.1).tolist() == pytest.approx(want)
    assert layer_weights(torch.full((3,), 0.5), 1.1).tolist() == [1, 1, 1]


def test_the_patched_prompt_begins_with_an_instruction_where_there_are_words(byte_tokenizer: Any) -> None:
    ids = conversation()
    words = SimpleNamespace(
        model=tiny("llama"), prompt=Prompt(ids, chat=False, tokenizer=byte_tokenizer), question=None
    )
    method = EpiCache(episodes=3, segment=8, medoids=2)
    with_words, without = method.matched(words), method.matched(reading_of(ids, None))
    more = len(with_words.patched) - len(without.patched)
    assert torch.equal(with_words.patched[more:], without.patched)
    assert "Pick out what matters" in byte_tokenizer.decode(with_words.patched[:more])


@pytest.mark.parametrize("heads", ["layer", "equal"])
@pytest.mark.parametrize("architecture", ["llama", "mqa", "gemma3"])
def test_memory_stays_within_the_limit_for_a_text_ten_times_as_long(architecture: str, heads: Any) -> None:
    session = wb.Session((tiny(architecture), None))
    session.read(ids_of(640), record=False)
    plan = session.plan(EpiCache(budget="64 tokens", segment=16, heads=heads))
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    kv = [sum(nbytes for name, nbytes in sample.categories.items() if name.startswith("kv")) for sample in reads]
    assert len(reads) > 40 and max(kv) <= 0.1 * plan.full_nbytes
    assert plan.nbytes > 0.093 * plan.full_nbytes  # and the room is used
    assert plan.host_nbytes == 0  # the caches of other episodes are not built
