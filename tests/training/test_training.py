"""Training workbench-tiny: rows are what a session reads, answers stand in the text, nothing held out is seen."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import workbench as wb
from training.corpus import KINDS, Corpus, build_corpus, documentation, standard_library
from training.mixture import CURRICULUM, make_batch, stage_at
from training.tasks import (
    ANSWER,
    CONTEXT,
    PADDING,
    WEIGHTS,
    Sources,
    Task,
    copying,
    lookups,
    needles,
    needles_in_documents,
    variables,
)
from training.train import learning_rate, train, weighted_loss
from training.vocabulary import END, chat_tokenizer
from training.wordings import HELD_OUT_THINGS, assignments, everyday_facts, pairs, sums
from workbench.models import tiny
from workbench.prompt import Prompt

ASKED = (needles, needles_in_documents, lookups, variables)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A documentation and a library of sixty small documents each, with words of their own."""
    root = tmp_path_factory.mktemp("sources")
    pages, modules = root / "pages", root / "modules"
    (modules / "test").mkdir(parents=True)
    pages.mkdir()
    draw = random.Random(7)
    words = [f"{a}{b}{c}" for a in "klmnprst" for b in "aeiou" for c in "dgmnrs"]
    for index in range(60):
        lines = "\n\n".join(" ".join(draw.choices(words, k=12)) + f" page{index}." for _ in range(40))
        (pages / f"page{index}.rst").write_text(lines)
        code = "\n\n".join(f"def {draw.choice(words)}_{index}({draw.choice(words)}):\n    pass" for _ in range(40))
        (modules / f"module{index}.py").write_text(code)
        (modules / "test" / f"test{index}.py").write_text(code)
    return pages, modules


@pytest.fixture(scope="module")
def corpus(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    pages, modules = folders
    return build_corpus(pages, tmp_path_factory.mktemp("corpus"), modules, size=600)


@pytest.fixture(scope="module")
def sources(corpus: Corpus) -> Sources:
    return Sources(corpus.tokenizer, {kind: corpus.tokens(kind) for kind in KINDS})


@pytest.fixture(scope="module")
def chatting(corpus: Corpus) -> PreTrainedTokenizerFast:
    return chat_tokenizer(corpus.tokenizer, 2048)


def test_what_is_held_out_is_in_no_training_file(corpus: Corpus, folders: tuple[Path, Path]) -> None:
    pages, modules = folders
    documents = [*documentation(pages), *standard_library(modules)]
    assert {d.kind for d in documents if d.held_out} == set(KINDS)
    for kind in KINDS:
        training, held = (corpus.tokenizer.decode(corpus.tokens(kind, part).tolist()) for part in ("train", "held-out"))
        for document in documents:
            if document.kind == kind:
                assert (document.text in held) == document.held_out and (document.text in training) != document.held_out
        nbytes = sum(len(d.text.encode()) for d in documents if d.kind == kind and d.held_out)
        tokens = len(corpus.tokens(kind, "held-out"))
        assert corpus.bytes_per_token(kind, "held-out") == pytest.approx(nbytes / tokens)


def test_every_document_of_a_token_file_ends_with_the_end_token(corpus: Corpus, folders: tuple[Path, Path]) -> None:
    tokens = corpus.tokens("documentation")
    assert tokens[-1] == END
    assert (tokens == END).sum() == sum(not document.held_out for document in documentation(folders[0]))


def test_digits_are_tokens_of_their_own(corpus: Corpus) -> None:
    pieces = corpus.tokenizer.encode("room 48213.").tokens
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("48213")


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("length", [256, 1024])
def test_a_row_is_what_a_session_would_have_read(
    task: Task, length: int, sources: Sources, chatting: PreTrainedTokenizerFast
) -> None:
    draw = random.Random(f"{task.__name__} {length}")
    compared = 0
    for _ in range(20):
        row = task(draw, length, sources)
        text = chatting.decode(row.ids, skip_special_tokens=False)
        if not text.startswith("<|user|>"):
            continue  # plain statements: no conversation
        first, *turns = text.removeprefix("<|user|>").removesuffix("<|end|>").split("<|end|><|user|>")
        told, answer = first.split("<|end|><|assistant|>")
        body, _, question = told.rpartition("\n\n")
        prompt = Prompt.of(body, chatting)
        ids = [*prompt.ids.tolist(), *prompt.question_ids(question, chatting).tolist()]
        ids += [*chatting.encode(answer, add_special_tokens=False), END]
        for turn in turns:
            question, answer = turn.split("<|end|><|assistant|>")
            ids += prompt.next_ids(question, chatting, ended="<|end|>").tolist()
            ids += [*chatting.encode(answer, add_special_tokens=False), END]
        if task is lookups:  # documents are cut between any two tokens, and so are paragraphs
            assert ids == row.ids
        else:
            tail = len(ids) - len(prompt.ids)
            assert ids[-tail:] == row.ids[-tail:]
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("task", ASKED)
def test_every_answer_of_a_row_stands_in_its_text(task: Task, sources: Sources) -> None:
    draw = random.Random(3)
    for length in (256, 2048):
        for _ in range(10):
            row = task(draw, length, sources)
            assert len(row.ids) <= length and len(row.ids) == len(row.worth)
            text = sources.tokenizer.decode([i for i, w in zip(row.ids, row.worth, strict=True) if w == CONTEXT])
            answers = "".join(
                sources.tokenizer.decode([i], skip_special_tokens=False) if w == ANSWER else "\0"
                for i, w in zip(row.ids, row.worth, strict=True)
            )
            for answer in filter(None, answers.split("\0")):
                value = answer.removesuffix("<|end|>").removesuffix(".").split()[-1]
                assert value in text


def test_copied_tokens_came_before_in_the_same_order(sources: Sources) -> None:
    row = copying(random.Random(0), 1024, sources)
    assert row.worth.count(ANSWER) > 100
    for index, worth in enumerate(row.worth):
        if worth == ANSWER:
            run = row.ids[index - 2 : index + 1]
            assert any(row.ids[first : first + 3] == run for first in range(index - 2))


def test_no_two_facts_of_a_text_answer_the_same_question() -> None:
    draw = random.Random(1)
    for make in (everyday_facts, pairs, assignments):
        for count in (1, 5, 14):
            facts = make(draw, count)
            assert len(facts) == len({fact.question for fact in facts}) == count


def test_names_kept_for_the_evaluation_are_in_no_fact() -> None:
    draw = random.Random(2)
    for fact in everyday_facts(draw, 300):
        assert not any(thing in fact.statement for thing in HELD_OUT_THINGS)


def test_assigned_names_lead_to_their_number() -> None:
    for seed in range(20):
        facts = assignments(random.Random(seed), 12)
        values: dict[str, str] = {}
        for fact in facts:
            name, right = fact.statement.split(" = ")
            values[name] = values.get(right, right)
            assert fact.answer.removesuffix(".").split(" = ")[-1] == values[name]


def test_sums_are_right_and_those_held_out_never_come_in_training() -> None:
    draw = random.Random(0)
    seen = [{sums(draw, held_out).answer for _ in range(2000)} for held_out in (False, True)]
    assert not seen[0] & seen[1]
    for answer in seen[0] | seen[1]:
        left, right = answer.removesuffix(".").split(" = ")
        assert eval(left.replace("×", "*")) == int(right)


def test_batches_of_every_stage_hold_rows_of_one_length(sources: Sources) -> None:
    draw = random.Random(0)
    for stage in CURRICULUM:
        ids, worth = make_batch(draw, stage, 4096, sources)
        assert ids.shape == worth.shape and ids.shape[1] in stage.lengths and ids.size == 4096
        assert worth.max() <= ANSWER and (ids[worth == PADDING] < 600).all()
    assert [stage_at(share) for share in (0.0, CURRICULUM[0].until, 0.99, 1.5)] == [0, 1, 2, 2]


def test_the_loss_is_the_weighted_mean_of_each_tokens_own() -> None:
    model = tiny("llama")
    torch.manual_seed(0)
    ids, worth = torch.randint(0, 256, (2, 9)), torch.randint(0, len(WEIGHTS), (2, 9))
    weights = torch.tensor(WEIGHTS)
    total = mass = 0.0
    for row in range(2):
        for place in range(1, 9):
            logits = model(ids[row : row + 1, :place]).logits[0, -1]
            weight = WEIGHTS[int(worth[row, place])]
            total -= weight * float(logits.log_softmax(-1)[ids[row, place]])
            mass += weight
    loss, _, _ = weighted_loss(model, ids, worth.byte(), weights)
    assert float(loss) == pytest.approx(total / mass, rel=1e-4)


def test_the_learning_rate_rises_stays_and_ends_at_nothing() -> None:
    rates = [learning_rate(1.0, step, step / 1000) for step in range(1001)]
    assert rates[0] < 0.01 and rates[300] == 1.0 and rates[-1] == pytest.approx(0)
    assert np.all(np.diff(rates[:200]) > 0) and np.all(np.diff(rates[600:]) < 0)


def test_training_lowers_the_loss_and_leaves_a_model_that_a_session_reads(corpus: Corpus, tmp_path: Path) -> None:
    shape = {"layers": 1, "width": 64, "heads": 2, "kv_heads": 1}
    report = train(corpus, tmp_path, 0.1, batch_tokens=1024, peak=0.1, workers=0, shape=shape)
    with torch.no_grad():
        session = wb.Session(tmp_path)
        first = np.log(session.model.config.vocab_size)
        ids = torch.from_numpy(corpus.tokens("documentation", "held-out")[:512].astype("int64"))
        loss = session.model(ids[None], labels=ids[None]).loss
    assert report["steps"] > 2 and float(loss) < 0.9 * first
    assert session.facts.checkpoint_dtype == torch.bfloat16 and session.facts.eos_ids == (END,)
    session.read("The secret number of the quarry is 12345.")
    assert session.run("full", question="What is it?", max_new_tokens=4).tokens
