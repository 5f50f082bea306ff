"""The search as a whole, on workbench-tiny: what it finds, that it goes on where it ended, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import workbench as wb
from workbench.errors import BadParameter, BudgetTooSmall, Cancelled, InputError, MissingExtra
from workbench.recipe import Recipe
from workbench.search import Found, Goal, Measured, NothingServes, Tried
from workbench.search.journal import study_in

METHODS = ("snapkv", "kivi", "kvtuner")
NEEDLE = "needle length=320"
QUICK: dict[str, Any] = {"tasks": NEEDLE, "cases": 3, "methods": METHODS, "minutes": None, "max_new_tokens": 4}
KV: dict[str, Any] = {**QUICK, "limit": "32 KB", "memory": "kv"}


def made(found: Found) -> list[tuple[int, str, Measured]]:
    return [(each.number, each.recipe.label, each.measured) for each in found.tried]


@pytest.fixture(scope="module")
def session(tiny_llama: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast) -> wb.Session:
    """A random model of three layers: what it answers means nothing, how it is searched does."""
    return wb.Session((tiny_llama, byte_tokenizer))


@pytest.fixture(scope="module")
def whole(session: wb.Session, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A search of 14 trials that nothing interrupted."""
    return wb.search(session, **KV, trials=14, results=tmp_path_factory.mktemp("whole"))


def test_the_best_keeps_to_the_limit_and_is_what_a_session_measures(whole: Found, session: wb.Session) -> None:
    best = whole.best()
    tried = next(each for each in whole.tried if each.recipe == best)
    assert 0 < tried.measured.memory <= 32_000 and tried.measured.cases == 3
    budget = best.budget or best.methods[0].budget
    assert budget is not None
    rows = session.evaluate(wb.task("needle", length=320), best, budgets=[budget], cases=3, max_new_tokens=4)
    assert rows["kl"].mean() == pytest.approx(tried.measured.kl, abs=1e-6)
    assert int(rows["right"].sum()) == tried.measured.correct
    assert rows["kv_mib"].max() * 2**20 == tried.measured.memory


def test_the_best_is_no_worse_than_any_method_by_itself(whole: Found) -> None:
    able = [each for each in whole.tried if each.measured.error is None and not whole.goal.excess(each.measured)]
    finished = {each.number for each in whole.finished()}
    best = next(each for each in whole.tried if each.recipe == whole.best())
    assert best.number in finished and {each.number for each in able} - finished  # not all were measured on all cases
    for each in whole.finished():
        assert whole.goal.place(best.measured) <= whole.goal.place(each.measured)
    assert {"snapkv", "kivi", "kvtuner"} <= {each.recipe.methods[0].key for each in whole.tried}


def test_the_front_is_what_nothing_beats_and_the_rows_are_stored(whole: Found) -> None:
    front = whole.front()
    assert front["memory_nbytes"].is_monotonic_increasing and (front["cases"] == 3).all()
    for row in front.to_dict("records"):
        assert Recipe.from_dict(__import__("json").loads(row["recipe_json"])).label == row["recipe"]
    assert whole.keys() >= set(whole.frame("study LIKE 'search-%' AND status = 'done'")["key"])
    assert {"kl", "kv_nbytes"} <= set(whole.front("kv_nbytes", "kl").columns)
    assert "best" in whole.summary() and whole.numbers()["best"] == whole.best().to_dict()


def test_the_same_seed_finds_the_same(whole: Found, session: wb.Session) -> None:
    again = wb.search(session, **KV, trials=14)
    assert made(again) == made(whole)
    assert made(wb.search(session, **KV, trials=14, seed=1)) != made(whole)


class Killed(BaseException):
    """Ends a search at once, as a signal would: nothing is told, nothing cleaned up."""


@pytest.mark.parametrize("rows", [3, 15])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(
    rows: int, whole: Found, session: wb.Session, tmp_path: Path
) -> None:
    def kill(_: Found) -> None:
        kill.seen += 1  # type: ignore[attr-defined]
        if kill.seen == rows:  # type: ignore[attr-defined]
            raise Killed

    kill.seen = 0  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        wb.search(session, **KV, trials=14, results=tmp_path, on_front=kill)
    journal = next(tmp_path.glob("*.journal"))
    with journal.open("ab") as half:
        half.write(b'{"op_code": 4, "worker')  # as a process that is killed leaves it
    measured: list[int] = []
    rest = wb.search(session, **KV, trials=14, results=tmp_path, on_front=lambda _: measured.append(1))
    assert made(rest) == made(whole)
    assert len(measured) == len(whole) - rows == len(rest) - rows  # no row is measured twice
    assert not list(tmp_path.glob("*.lock"))


def test_more_trials_continue_a_search(whole: Found, session: wb.Session, tmp_path: Path) -> None:
    wb.search(session, **KV, trials=8, results=tmp_path)
    assert made(wb.search(session, **KV, trials=14, results=tmp_path)) == made(whole)


def test_what_was_found_before_it_was_cancelled_is_kept(session: wb.Session, tmp_path: Path) -> None:
    progress = wb.Progress()
    with pytest.raises(Cancelled) as stopped:
        wb.search(session, **KV, trials=14, results=tmp_path, on_front=lambda _: progress.cancel(), progress=progress)
    found = stopped.value.finished
    assert isinstance(found, Found) and len(found) >= 1 and found.ended == "it was stopped"


def test_one_process_searches_at_a_time(session: wb.Session, tmp_path: Path) -> None:
    with study_in(tmp_path, "one"), pytest.raises(InputError, match="running already"), study_in(tmp_path, "one"):
        pass
    with study_in(tmp_path, "one") as study:
        assert study.study_name == "one"


def test_weights_make_room_within_a_total(session: wb.Session) -> None:
    found = wb.search(
        session, NEEDLE, cases=2, methods=["snapkv", "rtn"], limit="500 KB", trials=6, minutes=None, max_new_tokens=4
    )
    best = found.best()
    assert [method.key for method in best.family("weights")] == ["rtn"]
    assert max(each.measured.memory for each in found.finished() if found.goal.serves(each.measured)) <= 500_000


def test_the_smallest_that_is_good_enough(tiny_session: wb.Session) -> None:
    bounds = {"correct": 0.95, "kl": 0.05}
    given: dict[str, Any] = {"cases": 2, "methods": ["turbomind", "knorm"], "memory": "kv", "minutes": None}
    found = wb.search(tiny_session, "needle length=128", quality=bounds, trials=8, **given)
    best = next(each for each in found.tried if each.recipe == found.best())
    assert best.measured.kl <= 0.05 and best.measured.correct >= 0.95 * best.measured.full_correct
    full = next(each for each in found.tried if each.recipe == Recipe.of("full"))
    assert best.measured.memory < 0.6 * full.measured.memory


def test_what_nothing_meets_is_said_in_one_line_with_the_smallest_that_would(session: wb.Session) -> None:
    with pytest.raises(BudgetTooSmall, match=r"weights alone take at least [\d,]+ bytes, rtn bits=2") as weights:
        wb.search(session, **{**QUICK, "methods": ["rtn"]}, limit="100 KB", trials=4)
    assert weights.value.smallest > 100_000
    with pytest.raises(BudgetTooSmall, match=r"nothing here fits into 100 bytes: .* by itself is [\d,]+ bytes, snapkv"):
        wb.search(session, **{**KV, "limit": "100 B"}, trials=14)
    none = Found.__new__(Found)
    none.goal, none.tried, none.cases = Goal(100, "kv", (("kl", 0.01),)), (), 1
    bad = Tried(0, Recipe.of("kivi"), Measured(1, memory=90, kl=0.3))
    good = Tried(1, Recipe.of("full"), Measured(1, memory=400, kl=0.0))
    none.tried = (bad, good)
    with pytest.raises(NothingServes, match=r"nearest has KL 0.3 \(kivi\), and the smallest of that quality takes"):
        none.best()


def test_what_is_no_search_is_refused_before_anything_is_measured(session: wb.Session) -> None:
    for wrong, error, said in (
        ({"limit": None}, BadParameter, "needs a limit"),
        ({"trials": 0}, BadParameter, "trials"),
        ({"tasks": "nedle"}, InputError, "did you mean needle"),
        ({"methods": ["snapvk"]}, InputError, "did you mean snapkv"),
    ):
        with pytest.raises(error, match=said):
            wb.search(session, **{**KV, "trials": 2, **wrong})


def test_without_optuna_it_says_what_to_install(
    session: wb.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"inference-workbench\[search\]"):
        wb.search(session, **KV, trials=2, results=tmp_path)


def test_the_page_on_searching_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "search.md").read_text(encoding="utf-8")
    blocks = [dedent(block) for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    names: dict[str, Any] = {"wb": wb}
    for block in blocks[1:]:  # the first one shows three goals, and would take minutes
        exec(block, names)
    assert "in front" in capsys.readouterr().out
    assert names["found"].goal.serves(next(e.measured for e in names["found"].tried if e.recipe == names["best"]))
