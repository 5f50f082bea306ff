"""Tasks from files: the fields of what was published, and one line for each entry that is malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from workbench.errors import BadParameter, BadPrompt
from workbench.tasks import Case, Task


def encode(text: str) -> list[int]:
    return list(text.encode())


def written(path: Path, *entries: Any) -> str:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in entries) + "\n")
    return str(path)


def problems(task: Task) -> list[str]:
    found = []
    for number in range(task.count()):
        try:
            task.case(encode, number)
        except BadPrompt as problem:
            found.append(str(problem))
    return found


def test_ones_own_prompts_are_read_with_their_answers(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.jsonl",
        {"text": "The sky is blue.", "question": "Which colour?", "answer": "blue"},
        {"text": "One and two.", "answers": ["one", 2], "lead": "They are"},
        {"text": "Go on from here"},
    )
    first, second, third = wb.task("file", path=path).cases(encode)
    assert (first.text, first.question, first.answers) == ("The sky is blue.", "Which colour?", ("blue",))
    assert (second.question, second.answers, second.lead) == (None, ("one", "2"), "They are")
    assert first.right("It is BLUE.") and not first.right("red") and third.score("anything") is None
    assert second.right("one") and not wb.task("file", path=path, match="all").case(encode, 1).right("one")
    assert next(wb.task("file", path=path, seed=1).cases(encode)) == second


def test_each_malformed_line_has_one_line_about_it_and_the_rest_is_used(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.jsonl",
        {"text": "good", "answer": "x"},
        "{not json",
        [1],
        {"question": "where is the text?"},
        {"text": "", "answer": "x"},
        {"text": "y", "answers": "x"},
        {"text": "y", "anwser": "x"},
        "",
        {"text": "good too"},
    )
    task = wb.task("file", path=path)
    assert problems(task) == [
        "mine.jsonl, line 2: not JSON: Expecting property name enclosed in double quotes at character 2",
        "mine.jsonl, line 3: a JSON object is expected, found list",
        "mine.jsonl, line 4: 'text' is missing",
        "mine.jsonl, line 5: 'text' must be a text with something in it, not ''",
        "mine.jsonl, line 6: 'answers' must be a list of texts, not 'x'",
        "mine.jsonl, line 7: unknown field 'anwser': there are text, question, answer, answers, lead",
    ]
    assert [task.case(encode, number).text for number in (0, 7)] == ["good", "good too"]


def test_a_folder_of_texts_and_of_lines_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A long text.")
    (tmp_path / "a.question.txt").write_text("What kind of text?\n")
    (tmp_path / "a.answer.txt").write_text("long\nlengthy\n")
    (tmp_path / "b.txt").write_bytes("Größe".encode("latin-1"))
    written(tmp_path / "c.jsonl", {"text": "c", "answer": "d"})
    (tmp_path / "notes.md").write_text("not a case")
    task = wb.task("file", path=str(tmp_path))
    case = task.case(encode)
    assert (case.text, case.question, case.answers) == ("A long text.", "What kind of text?", ("long", "lengthy"))
    assert len(problems(task)) == 1 and "UTF-8" in problems(task)[0]
    assert task.case(encode, 2).text == "c" and task.count() == 3


def test_gsm8k_asks_after_other_problems_and_wants_the_number_after_the_mark(tmp_path: Path) -> None:
    solved = [
        {"question": f"What is {n} + {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
        for n in range(6)
    ]
    path = written(tmp_path / "test.jsonl", *solved, {"question": "no mark", "answer": "7"})
    task = wb.task("gsm8k", path=path, shots=3)
    case = task.case(encode, 1)
    assert isinstance(case.text, str) and case.question == "What is 1 + 1?"
    assert "1 + 1" not in case.text and all(f"What is {n} + {n}?" in case.text for n in (2, 3, 4))
    assert case.right("thinking\n#### 2") and not case.right("2") and not case.right("#### 3")
    assert problems(task) == ["test.jsonl, line 7: 'answer' must end with #### and the number"]
    with pytest.raises(BadParameter, match="too few problems"):
        wb.task("gsm8k", path=path, shots=6).case(encode)


def test_rulers_lines_keep_their_question_in_the_text_and_their_answer_prefix(tmp_path: Path) -> None:
    line = {"index": 0, "input": "The number is 7. What is it?", "outputs": ["7", "8"], "length": 9}
    path = written(tmp_path / "ruler.jsonl", {**line, "answer_prefix": " The number is"}, line, {"input": "x"})
    task = wb.task("ruler", path=path)
    case = task.case(encode)
    assert (case.text, case.question, case.lead) == (line["input"], None, "The number is")
    assert case.score("it is 7") == 1 / 2 and wb.task("ruler", path=path, match="any").case(encode).score("7") == 1
    assert task.case(encode, 1).lead == ""
    assert problems(task) == ["ruler.jsonl, line 3: 'outputs' must be a list of texts, not None"]


def test_locomos_file_gives_a_case_for_each_question(tmp_path: Path) -> None:
    conversation = {
        "speaker_a": "Ann",
        "speaker_b": "Ben",
        "session_2_date_time": "2 May",
        "session_2": [{"speaker": "Ben", "dia_id": "D2:1", "text": "Look!", "blip_caption": "a red kite"}],
        "session_1_date_time": "1 May",
        "session_1": [{"speaker": "Ann", "dia_id": "D1:1", "text": "I like pottery."}],
        "session_10": [],
    }
    asked = [
        {"question": "What does Ann like?", "answer": "pottery", "category": 4, "evidence": ["D1:1"]},
        {"question": "When?", "answer": 2023, "category": 2},
        {"question": "Would she?", "answer": "Yes; she likes it", "category": 3},
        {"question": "Who is Zoe?", "adversarial_answer": "a friend", "category": 5},
        {"question": "What?", "category": 1},
        {"question": "What?", "answer": "x", "category": 9},
    ]
    (tmp_path / "locomo.json").write_text(
        json.dumps([{"sample_id": "s", "conversation": conversation, "qa": asked}, {}])
    )
    task = wb.task("locomo", path=str(tmp_path / "locomo.json"))
    first, dated, inferred, unknown = (task.case(encode, number) for number in range(4))
    assert first.text == "1 May:\nAnn: I like pottery.\n\n2 May:\nBen: Look! [shows a picture: a red kite]"
    assert (dated.answers, inferred.answers) == (("2023",), ("Yes",)) and dated.question != "When?"
    assert [case.scorer for case in (first, dated, inferred, unknown)] == ["f1", "f1", "f1", "unanswerable"]
    assert unknown.right("It is not mentioned.") and not unknown.right("a friend")
    assert [problem.split(": ")[0] for problem in problems(task)] == [
        "locomo.json, entry 1, question 5",
        "locomo.json, entry 1, question 6",
        "locomo.json, entry 2",
    ]


@pytest.mark.parametrize("key", ["file", "gsm8k", "ruler", "locomo"])
def test_a_file_that_cannot_be_read_is_one_line(key: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\0\1")
    for name, message in {"none.jsonl": "No such file", "empty.jsonl": "is empty", "binary.jsonl": "UTF-8"}.items():
        with pytest.raises(BadPrompt, match=message) as caught:
            wb.task(key, path=str(tmp_path / name)).count()
        assert "\n" not in str(caught.value)
    with pytest.raises(BadParameter, match="path is missing"):
        wb.task(key).count()


def test_more_cases_than_a_file_has_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(BadParameter, match="has 2"):
        wb.task("file", path=path).count(3)
    assert isinstance(wb.task("file", path=path, seed=1).case(encode), Case)
    with pytest.raises(BadParameter, match="has 2 cases"):
        wb.task("file", path=path, seed=2).case(encode)
