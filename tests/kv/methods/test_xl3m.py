"""XL3M: segments judged by how sure the model is after them and the question; the surest are read together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of
from workbench import testing
from workbench.kv import XL3M
from workbench.kv.asked import asked
from workbench.kv.segments import entropy, surest
from workbench.kv.stores import SlidingStore
from workbench.models import tiny
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.plan import Plan

SHORT = {"segment": 8, "query": 6, "chunk": 8}


def planned(found: testing.Reading, question: Tensor | None, **parameters: object) -> Plan:
    return make_plan(
        found.trace, [XL3M(**{**SHORT, **parameters})], torch.float32, model=found.model, question=question
    )


def plain_entropy(found: testing.Reading, ids: Tensor) -> float:
    """By the model itself and a loop."""
    with torch.no_grad():
        chances = found.model(ids[None]).logits[0, -1].double().softmax(dim=0).tolist()
    return -sum(p * math.log(p) for p in chances if p > 0)


@pytest.mark.parametrize(("overlap", "step"), [(0.0, 8), (0.25, 6), (0.5, 4)])
@pytest.mark.parametrize("question", [None, ids_of(5, 3)])
def test_the_segments_kept_are_those_after_which_the_model_is_surest(
    question: Tensor | None, overlap: float, step: int
) -> None:
    found = testing.fresh_reading(tokens=100)
    plan = planned(found, question, budget="40 tokens", overlap=overlap)
    ids, each = found.trace.ids, int(plan.counts[0, 0])
    asked = ids[-6:] if question is None else question
    segments, end = [list(range(4, 12))], 12
    while end < 94:  # each begins with the end of the one before
        start, end = segments[-1][0] + step, min(segments[-1][0] + step + 8, 94)
        segments.append(list(range(start, end)))
    found_entropies = [plain_entropy(found, torch.cat([ids[:4], ids[part], asked])) for part in segments]
    kept = [0, 1, 2, 3, *range(94, 100)]
    for index in sorted(range(len(segments)), key=lambda index: found_entropies[index]):
        kept += [at for at in segments[index] if at not in kept][: each - len(kept)]
    assert 34 <= each <= 40
    assert all(plan.kept(layer, head).tolist() == sorted(kept) for layer in range(3) for head in range(2))


def test_a_question_is_judged_with_the_templates_tokens_after_it_or_without(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    prompt = Prompt.of("some text to read", byte_tokenizer)
    question = prompt.question_ids("what?", byte_tokenizer)
    words = asked(replace(prompt, tokenizer=byte_tokenizer), question)
    assert byte_tokenizer.decode(words).strip() == "what?" and torch.equal(question[: len(words)], words)
    assert len(words) < len(question)
    assert torch.equal(asked(prompt, ids_of(5)), ids_of(5)) and torch.equal(asked(prompt, question), question)


def test_the_key_context_is_read_as_one_text_at_its_true_positions() -> None:
    found = testing.fresh_reading(tokens=100)
    plan = planned(found, ids_of(5, 3), budget="40 tokens")
    where = plan.kept(0, 0)
    with torch.no_grad():
        logits = found.model(found.trace.ids[where][None], position_ids=where[None]).logits[0, -1]
    assert torch.allclose(plan.logits, logits, atol=1e-4) and plan.position == 100


def test_entropy_is_lowest_where_one_token_is_certain() -> None:
    assert float(entropy(torch.zeros(8))) == pytest.approx(math.log(8))
    assert float(entropy(torch.tensor([50.0, 0.0, 0.0]))) == pytest.approx(0, abs=1e-6)


def test_the_last_segment_that_fits_gives_its_beginning() -> None:
    segments = (torch.arange(0, 4), torch.arange(4, 8), torch.arange(8, 10))
    assert surest(segments, torch.tensor([2.0, 1.0, 1.5]), 8).tolist() == [0, 1, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("question", [None, 60])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mqa"])
def test_a_text_of_ten_times_the_bound_is_read_within_it(architecture: str, question: int | None) -> None:
    session = wb.Session((tiny(architecture), None))
    trace = session.read(ids_of(800), record=False)
    asked = None if question is None else ids_of(question)
    plan = make_plan(trace, [XL3M(**SHORT, budget=0.1)], torch.bfloat16, model=session.model, question=asked)
    kv = [sum(v for name, v in s.categories.items() if name.startswith("kv")) for s in plan.timeline.samples]
    assert len(kv) > 60 and 0.9 * 0.1 * plan.full_nbytes < max(kv) <= 0.1 * plan.full_nbytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", ["64 tokens", 0.5, 1.0])
def test_texts_longer_than_the_models_positions_close_up(architecture: str, budget: str | float) -> None:
    session = wb.Session((tiny(architecture), None))
    length = session.facts.max_positions + 200
    session.read(ids_of(length), record=False)
    method = XL3M(segment=256, budget=0.1 if budget == "64 tokens" and architecture == "gemma3" else budget)
    run = session.run(method, question=ids_of(9), max_new_tokens=5)
    each = int(run.plan.counts.max())
    assert run.plan.position == each <= session.facts.max_positions * 7 // 8
    assert all(torch.equal(row.cpu(), torch.arange(each)) for row in run.plan.stores()[1].positions)
    kept = run.plan.kept(1, 0)
    assert kept[-1] == length - 1 and len(kept) == each and run.plan.share <= 1
    assert "longer than the model's 2,048 positions" in " ".join(run.plan.notes)
    assert len(run.tokens) == 5 and run.ask(ids_of(4), max_new_tokens=2).tokens
    assert run.decoder is not None and run.decoder.position == each + 9 + 4


def test_a_sliding_layer_sees_only_its_window_of_a_text_with_gaps() -> None:
    # Where tokens are left out, entries in a window's store are nearer to each other than their positions.
    generator = torch.Generator().manual_seed(2)
    empty = torch.empty(2, 0, 4)
    store, window, held = SlidingStore(empty, empty, 0, 5), 5, {}
    for positions in ([0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10], [11, 15], [16], [17, 18], [19], [30], [31]):
        keys, values = torch.randn(2, 2, len(positions), 4, generator=generator)
        query = torch.randn(4, len(positions), 4, generator=generator)
        held |= {at: (keys[:, i], values[:, i]) for i, at in enumerate(positions)}
        store.append(keys, values, torch.tensor(positions))
        got, _ = store.attend(query, torch.tensor(positions), Scoring(0.5, window))
        for i, at in enumerate(positions):
            seen = [p for p in held if at - window < p <= at]
            for head in range(4):
                rows = torch.stack([held[p][0][head // 2] for p in seen])
                chances = (rows @ query[head, i] * 0.5).softmax(dim=0)
                expected = sum(c * held[p][1][head // 2] for c, p in zip(chances, seen, strict=True))
                assert torch.allclose(got[head, i], expected, atol=1e-5)
        last = positions[-1]
        kept = [p for p in held if p > last - window]
        assert [row.tolist() for row in store.positions] == [kept] * 2
        follow = kept == list(range(last - len(kept) + 1, last + 1))
        assert store.nbytes == len(kept) * (2 * 2 * 4 * 4 + (0 if follow else 4))
        assert torch.equal(store.clone().positions[0], store.positions[0])
