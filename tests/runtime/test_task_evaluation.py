"""Tasks under recipes: both verdicts in each row, the prompt read once, and a failure in its own row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.byte_tokens import byte_tokenizer
from workbench.errors import BadBudget, BadParameter, BadPrompt, Cancelled, UnknownMethod, UnknownTask
from workbench.models import tiny
from workbench.progress import Progress
from workbench.session import TASK_COLUMNS


@pytest.fixture(scope="module")
def session() -> wb.Session:
    """A random model whose tokens are bytes, and which has no chat template."""
    return wb.Session((tiny("llama"), byte_tokenizer()), kv_dtype="float32")


@pytest.fixture(scope="module")
def small() -> wb.Session:
    return wb.Session("workbench-tiny")


def cases(path: Path, *entries: dict[str, Any]) -> wb.tasks.Task:
    path.write_text("\n".join(map(json.dumps, entries)))
    return wb.task("file", path=str(path), reply_tokens=6)


def test_each_row_is_the_recipes_own_run_and_says_what_the_full_model_is_worth(small: wb.Session) -> None:
    task = wb.task("needle", length=200, seed=1)
    table = small.evaluate(task, ["full", "knorm"], budgets=0.1, cases=2, max_new_tokens=8)
    assert table.columns.tolist() == list(TASK_COLUMNS) and table.error.isna().all()
    assert table[["case", "recipe"]].to_numpy().tolist() == [
        [number, recipe] for number in (1, 2) for recipe in ("full", "knorm 0.1")
    ]
    other = wb.Session("workbench-tiny")
    assert other.tokenizer is not None
    case = task.case(lambda text: other.tokenizer(text)["input_ids"], 1)  # type: ignore[misc]
    assert other.read(case.text).tokens == table.tokens[2]
    end = other.trace.prompt.question_ids(case.question, other.tokenizer)  # type: ignore[union-attr]
    ids = [*end.tolist(), *other.tokenizer(case.lead, add_special_tokens=False)["input_ids"]]
    for row, run in enumerate(
        (other.run(question=ids, max_new_tokens=8), other.run("knorm", budget=0.1, question=ids, max_new_tokens=8)), 2
    ):
        assert table.text[row] == run.text and table.kv_mib[row] == run.plan.nbytes / 2**20
        assert table.right[row] == case.right(run.text) and table.kl[row] == pytest.approx(run.quality.kl)
    full = table[table.recipe == "full"].set_index("case")
    assert (table.full_text == table.case.map(full.text)).all() and (
        table.full_right == table.case.map(full.right)
    ).all()
    assert full.right.all() and not table.right[3] and table.score[3] == 0


def test_workbench_tiny_finds_needles_with_and_without_its_chat_template(small: wb.Session) -> None:
    for chat in (True, False):
        table = small.evaluate(wb.task("needle", length=512), cases=1, chat=chat)
        assert table.right.all() and table.full_right.all()


def test_a_prompt_is_read_once_for_all_recipes_and_for_questions_that_share_it(
    session: wb.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 3
    task = cases(
        tmp_path / "a.jsonl",
        *({"text": text, "question": q, "answer": "x"} for q in ("Who?", "Why?")),
        {"text": "Another text."},
    )
    read, calls = wb.Session.read, []

    def counted(self: wb.Session, text: Any, **options: Any) -> Any:
        calls.append(text)
        return read(self, text, **options)

    monkeypatch.setattr(wb.Session, "read", counted)
    table = session.evaluate(task, ["full", "knorm", "snapkv"])
    assert len(table) == 3 * 5 and table.error.isna().all()
    assert calls == [text, "Another text."]
    assert table.right[10:].isna().all() and table.right[:10].notna().all()  # nothing is expected of the last


def test_the_sessions_own_prompt_and_runs_stay(session: wb.Session) -> None:
    trace = session.read("What was read before stays as it is.")
    run = session.run(max_new_tokens=2)
    session.evaluate(wb.task("needle", length=200), cases=1)
    assert session.trace is trace and session.runs == [run] and run.decoder is not None


def test_the_question_is_asked_as_plain_text_where_there_is_no_template(session: wb.Session, tmp_path: Path) -> None:
    task = cases(
        tmp_path / "a.jsonl",
        {"text": "The sky is blue.", "question": "Which colour?", "lead": "It is", "answer": "blue"},
    )
    table = session.evaluate(task)
    session.read("The sky is blue.")
    assert table.text[0] == session.run(question="\n\nQuestion: Which colour?\nAnswer: It is", max_new_tokens=6).text


def test_perplexity_is_that_of_the_model_itself(session: wb.Session) -> None:
    task = wb.task("perplexity", length=150, predicted=20, seed=2)
    table = session.evaluate(task, ["full", "knorm"], budgets=0.5, cases=1)
    case = task.case(lambda text: byte_tokenizer()(text)["input_ids"])
    ids = torch.tensor([[*case.text, *case.continuation]])
    with torch.no_grad():
        loss = session.model(ids).logits[0, 149:-1].log_softmax(-1).gather(1, ids[0, 150:, None]).mean()
    assert table.perplexity[0] == pytest.approx(float((-loss).exp()), rel=1e-4)
    assert table.kl[0] == pytest.approx(0, abs=1e-6) and table.kl[1] > 1e-6
    assert table.right.isna().all() and table.text.isna().all()


def test_what_fails_has_its_reason_in_its_own_rows(session: wb.Session, tmp_path: Path) -> None:
    task = cases(
        tmp_path / "a.jsonl", {"text": "long " * 500}, {"txt": "?"}, {"text": "Some text that is read.", "answer": "x"}
    )
    rows = list(session.evaluate_rows(task, ["full", "snapkv"], budgets=[0.5, 1e-6]))
    assert [row["case"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert all("positions" in row["error"] for row in rows[:3])
    assert all(row["error"].startswith("a.jsonl, line 2: unknown field") for row in rows[3:6])
    assert [row["error"] for row in rows[6:8]] == [None, None] and "smallest" in rows[8]["error"]
    assert all(set(row) == set(TASK_COLUMNS) and "\n" not in (row["error"] or "") for row in rows)


def test_what_is_wrong_with_all_of_it_raises_before_anything_is_read(session: wb.Session, tmp_path: Path) -> None:
    for error, options in (
        (UnknownTask, {"task": "neddle"}),
        (UnknownMethod, {"recipes": "snapvk"}),
        (BadBudget, {"recipes": "snapkv", "budgets": 2}),
        (BadParameter, {"cases": 0}),
        (BadParameter, {"chat": "yes"}),
        (BadParameter, {"max_new_tokens": 0}),
        (BadPrompt, {"task": wb.task("file", path=str(tmp_path / "none.jsonl"))}),
    ):
        with pytest.raises(error):
            session.evaluate_rows(**{"task": "needle", **options})  # type: ignore[arg-type]
    with pytest.raises(BadPrompt, match="tokenizer"):
        wb.Session((tiny("llama"), None)).evaluate_rows("needle")


def test_a_cancelled_evaluation_keeps_the_rows_so_far(session: wb.Session) -> None:
    progress = Progress(lambda stage, done, total: progress.cancel() if (stage, done) == ("evaluating", 1) else None)
    with pytest.raises(Cancelled) as caught:
        session.evaluate(wb.task("needle", length=200), cases=3, progress=progress)
    assert caught.value.finished.case.tolist() == [0]
