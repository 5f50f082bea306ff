"""SentenceKV: sentences in host memory, found by the mean of their keys."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import SHORT, ids_of, reading
from workbench import testing
from workbench.kv import SentenceKV, SnapKV
from workbench.kv.base import Study
from workbench.kv.methods.offload.sentencekv import votes
from workbench.kv.stores.format import Shape
from workbench.kv.stores.offload import OffloadStore
from workbench.kv.stores.sentences import SentenceIndex, Sentences, sentence_ends
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan

QUICK = SHORT["sentencekv"]


class Letters:
    """A tokenizer of one token a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def ends_of(text: str, longest: int = 100) -> tuple[int, ...]:
    return sentence_ends(torch.tensor([ord(letter) for letter in text]), Letters(), longest)


def index_of(found: testing.Reading, **parameters: object) -> SentenceIndex:
    method = SentenceKV(**{**QUICK, **parameters})
    return cast("SentenceIndex", method.retrieve(Study(found.trace, found.model), []))


def random_others(heads: int, tokens: int, seed: int = 0, equal: bool = False) -> Tensor:
    chosen = torch.rand(heads, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    return chosen[:1].expand(heads, -1).clone() if equal else chosen


def test_sentences_end_at_their_marks_and_at_the_latest_after_so_many_tokens() -> None:
    assert ends_of("Ah. Why? No") == (3, 8, 11)
    assert ends_of("abcdefgh", 3) == (3, 6, 8)
    assert ends_of("ab.cdefgh", 4) == (3, 7, 9)
    assert sentence_ends(torch.arange(10), None, 4) == (4, 8, 10)

    class Words(Letters):
        def decode(self, ids: list[int]) -> str:
            return ["He", " said", '."', "\n\n", " 你", "。", ".5", "."][ids[0]]

    # A mark that is a token of its own, nothing more.
    assert sentence_ends(torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 0, 7, 1]), Words(), 100) == (5, 7, 10, 11)


@pytest.mark.parametrize("factor", [1.0, 2.0, 100.0])
@pytest.mark.parametrize("equal", [True, False])
def test_the_best_sentences_are_fetched_until_there_are_enough_tokens(factor: float, equal: bool) -> None:
    found = reading()
    index, layer = index_of(found, factor=factor), found.trace.layers[1]
    others = random_others(2, 70, equal=equal)
    retriever = index.build(layer, others)
    queries = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(4))
    slots, counts = retriever.find_at(queries, torch.arange(70, 75), layer.scale)
    weights = votes(layer, 8)
    ends = [0, *index.ends]
    for head in range(2):
        there = others[head].nonzero()[:, 0].tolist()  # slot -> position
        known = sorted(there, key=lambda p: (-float(weights[head, p]), p))[: int(factor * 8)]
        sentences = [sorted(p for p in known if a <= p < b) for a, b in pairwise(ends)]
        for q in range(5):  # the first of a sentence finds all that can be found
            asked = queries[2 * head : 2 * head + 2, : q + 1].mean(dim=(0, 1))
            likeness = []
            for members in sentences:
                mean = layer.keys[head, members].mean(dim=0) if members else torch.zeros(16)
                likeness.append(float(mean.to(torch.bfloat16).float() @ asked))
            ranked = sorted(range(len(sentences)), key=lambda s: -likeness[s])
            expected = [p for s in ranked for p in sentences[s]][: 8 if q else None]
            got = [there[slot] for slot in slots[head, q, counts[head, q]].tolist()]
            assert sorted(got) == sorted(expected)


def test_votes_are_the_pooled_attention_of_the_prompts_last_queries() -> None:
    layer = reading().trace.layers[1]
    rows = torch.zeros(2, 70)
    for head in range(4):
        for query in range(62, 70):
            logits = layer.keys[head // 2, : query + 1] @ layer.queries[head, query] * layer.scale
            rows[head // 2, : query + 1] += logits.softmax(dim=0) / 2
    pooled = torch.stack([rows[:, max(i - 3, 0) : i + 4].amax(dim=1) for i in range(70)], dim=1)
    assert torch.allclose(votes(layer, 8), pooled, atol=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_an_index_takes_the_bytes_foretold(equal: bool) -> None:
    found = reading()
    for parameters in ({}, {"factor": 100.0}, {"longest": 3}):
        index, layer = index_of(found, **parameters), found.trace.layers[1]
        others = random_others(2, 70, equal=equal)
        taken = sum(held.untyped_storage().nbytes() for held in index.build(layer, others).tensors())
        assert taken == index.nbytes(Shape(2, 70, 16, 16, 2), others.sum(dim=1)[None])


def told(retriever: Sentences, text: str, begin: int) -> None:
    retriever.reads(torch.tensor([ord(letter) for letter in text]), torch.arange(begin, begin + len(text)))


def test_what_moves_out_while_decoding_joins_the_sentence_that_it_was_written_in() -> None:
    found = reading()
    layer = found.trace.layers[1]
    others = random_others(2, 70)
    index = replace(index_of(found, fetch=8, longest=100, factor=100.0), ends=(30, 70), tokenizer=Letters())
    retriever = index.build(layer, others)
    assert isinstance(retriever, Sentences)
    before, twin = others.sum(dim=1).tolist(), retriever.clone()
    told(retriever, "abc. defgh! ij", 70)
    assert retriever.ends == [30, 70, 74, 81] and twin.ends == [30, 70]
    keys = torch.randn(2, 14, 16, generator=torch.Generator().manual_seed(9))
    for part in (slice(0, 2), slice(2, 9), slice(9, 14)):  # sentences are cut where entries move
        where = torch.arange(70 + part.start, 70 + part.stop).expand(2, -1)
        retriever.add(keys[:, part], keys[:, part], where)
    assert twin.means.shape[1] == 2 and twin.owners.shape[1] == max(before)
    written = [(0, 4), (4, 11), (11, 14)]
    assert retriever.means.shape[1] == 5 and retriever.lengths[:, 2:].tolist() == [[4, 7, 3]] * 2
    for number, (begin, end) in enumerate(written, start=2):
        mean = keys[:, begin:end].mean(dim=1)
        assert torch.allclose(retriever.means[:, number].float(), mean, atol=0.02)
        for head in range(2):
            slots = (retriever.owners[head] == number).nonzero()[:, 0].tolist()
            assert slots == list(range(before[head] + begin, before[head] + end))


def test_the_query_is_the_mean_of_the_sentence_in_progress_and_its_ends_see_everything() -> None:
    found = reading()
    index = replace(index_of(found, fetch=8, longest=100), ends=(70,), tokenizer=Letters())
    retriever = index.build(found.trace.layers[1], random_others(2, 70))
    assert isinstance(retriever, Sentences)
    text = "ab. cde! fg"
    told(retriever, text, 70)
    queries = torch.randn(4, 11, 16, generator=torch.Generator().manual_seed(5))
    parts = [(0, 3), (3, 4), (4, 11)]
    got = [retriever.in_progress(queries[:, a:b], torch.arange(70 + a, 70 + b)) for a, b in parts]
    means, everything = torch.cat([m for m, _ in got], dim=1), [whole for _, each in got for whole in each]
    begins = [0, 0, 0, 3, 3, 3, 3, 3, 8, 8, 8]
    for at, begin in enumerate(begins):
        for head in range(2):
            expected = queries[2 * head : 2 * head + 2, begin : at + 1].mean(dim=(0, 1))
            assert torch.allclose(means[head, at], expected, atol=1e-6)
    # The first token of a sentence, and the mark that ends one.
    assert [at for at, whole in enumerate(everything) if whole] == [0, 2, 3, 7, 8]


def test_a_run_tells_its_tokens_to_the_index_and_a_sentence_ends_where_its_mark_was_read() -> None:
    found = testing.fresh_reading(tokens=120)
    found.trace.prompt = replace(found.trace.prompt, tokenizer=Letters())
    plan = make_plan(found.trace, [SentenceKV(**QUICK, budget=0.4)], torch.float32, model=found.model)
    decoder = Decoder(found.model, plan.stores(), plan.position)
    decoder.feed(torch.tensor([ord(letter) for letter in "One. Tw"]))
    decoder.feed(torch.tensor([ord("o")]))
    decoder.feed(torch.tensor([ord("!")]))
    for store in decoder.stores:
        assert isinstance(store, OffloadStore) and isinstance(store.retriever, Sentences)
        assert store.retriever.ends[-2:] == [124, 129]


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
def test_fetching_everything_is_exact(architecture: str) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:9], max_new_tokens=24)
    for recipe in ([], [SnapKV(window=8)]):
        asked = [*recipe, SentenceKV(**{**QUICK, "fetch": 500}, budget=0.7)]
        run = session.run(asked, question=ids[:9], max_new_tokens=24)
        assert run.plan.host_nbytes > 0 and run.tokens == full.tokens
        assert run.quality.kl < 1e-8


def test_no_query_sees_more_than_what_is_near_and_what_it_may_fetch() -> None:
    found = testing.fresh_reading(tokens=120)
    plan = make_plan(found.trace, [SentenceKV(**QUICK, budget=0.4)], torch.float32, model=found.model)
    store = plan.stores()[1]
    assert isinstance(store, OffloadStore)
    query = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(3))
    store.retriever.find_at(query[:, :1], torch.tensor([120]), 0.25)  # which begins a sentence
    slots, counts = store.distinct(*store.retriever.find_at(query, torch.arange(121, 124), 0.25))
    assert bool((counts.sum(dim=2) == 8).all()) and slots.shape[1] <= 24
