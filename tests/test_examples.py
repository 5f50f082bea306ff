"""Ready prompts, and haystacks of any length."""

from __future__ import annotations

import re

import pytest

import workbench as wb
from workbench.errors import BadParameter
from workbench.examples import example, examples, needle
from workbench.models import cached


def test_the_ready_examples_hold_their_own_answer_once() -> None:
    assert [ready.key for ready in examples()] == ["haystack", "needle", "code", "dialogue"]
    for ready in examples():
        assert ready.question.endswith("?") and ready.title
        assert ready.answer is not None
        assert len(re.findall(rf"\b{ready.answer}\b", ready.text)) == 1
        assert ready.answered_by(f"It is {ready.answer.upper()}.") and not ready.answered_by("I do not know.")


def test_an_unknown_example_names_those_there_are() -> None:
    with pytest.raises(BadParameter, match="haystack, needle, code, dialogue"):
        example("barn")


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("tokens", [32, 300, 5000])
def test_a_haystack_fills_the_length_asked_for_and_never_exceeds_it(tokens: int) -> None:
    made = needle(tokens, count=words)
    assert 0.97 * tokens - 25 <= words(made.text) <= tokens
    assert made.answer is not None and made.text.count(made.answer) == 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_fact_stands_where_it_was_asked_to(depth: float) -> None:
    made = needle(3000, depth)
    assert made.answer is not None
    assert made.text.index(made.answer) / len(made.text) == pytest.approx(depth, abs=0.03)


def test_the_same_arguments_give_the_same_text_and_another_seed_another() -> None:
    assert needle(500, seed=4) == needle(500, seed=4)
    assert needle(500, seed=4).text != needle(500, seed=5).text


def test_no_sentence_comes_twice_in_a_long_haystack() -> None:
    sentences = re.split(r"(?<=\.)\s+", needle(20_000).text)
    assert len(sentences) > 800 and len(set(sentences)) == len(sentences)


def test_impossible_haystacks_are_refused() -> None:
    with pytest.raises(BadParameter, match="at least 32"):
        needle(5)
    for depth in (-0.1, 1.5, float("nan")):
        with pytest.raises(BadParameter, match="depth"):
            needle(500, depth)


@pytest.mark.model
@pytest.mark.skipif(cached("smollm2-135m") is None, reason="workbench models fetch smollm2-135m")
def test_the_default_model_answers_the_examples_and_a_built_haystack() -> None:
    session = wb.Session("smollm2-135m")
    assert session.tokenizer is not None
    tokenizer = session.tokenizer
    built = needle(300, count=lambda text: len(tokenizer(text)["input_ids"]))
    for ready in (*examples(), built):
        trace = session.read(ready.text)
        assert 290 <= trace.tokens <= 650
        answer = session.run("full", question=ready.question, max_new_tokens=24).text
        assert ready.answered_by(answer), f"{ready.key}: {answer!r}"
    assert len(tokenizer(built.text)["input_ids"]) <= 300
