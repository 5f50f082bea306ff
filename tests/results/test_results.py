"""Results: rows that are stored are there, once each, whatever happens to those who write and read them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest

import workbench as wb
from workbench.errors import BadParameter, InputError, WorkbenchError
from workbench.results import COLUMNS, Results, key_of, parquet_files

ROOT = Path(__file__).resolve().parents[2]


def row(number: int, **values: Any) -> dict[str, Any]:
    about = {"model": "m", "model_fingerprint": "f", "recipe": "r", "recipe_json": {"r": 1}, "task_json": {"t": 1}}
    return {"key": key_of({"number": number}), "status": "done", "case_number": number, **about, **values}


def raw(folder: Path) -> list[str]:
    """The keys of all rows in all files, also of those that others replace."""
    files = f"{folder}/runs-*.parquet"
    return [key for (key,) in duckdb.connect().execute(f"SELECT key FROM read_parquet('{files}')").fetchall()]


def test_what_was_added_comes_back_with_its_types_and_every_column(tmp_path: Path) -> None:
    results = wb.Results(tmp_path / "new" / "folder")
    assert len(results) == 0 and list(results.frame().columns) == list(COLUMNS)
    values = {
        "kl": float("inf"), "nll": float("nan"), "kv_nbytes": 2**53 + 1, "correct": False, "tokens": (1, 2),
        "text": "a\nb 'c' \"d\" \ud800", "started": datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001  UTC, as the column holds it
    }  # fmt: skip
    results.add(row(1, **values))
    (found,) = Results(results.path).rows()
    assert found["kl"] == float("inf") and found["nll"] is None and found["kv_nbytes"] == 2**53 + 1
    assert found["correct"] is False and found["tokens"] == "[1,2]" and found["started"] == values["started"]
    assert found["text"] == "a\nb 'c' \"d\" ?" and found["recipe_json"] == '{"r":1}' and found["pinned"] is None
    assert set(found) == set(COLUMNS) and all(column.help for column in COLUMNS.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"colour": 1}, "'extra'"),
        ({"status": "fine"}, "done, failed"),
        ({"key": ""}, "key_of"),
        ({"kl": "low"}, "DOUBLE"),
        ({"correct": 1}, "BOOLEAN"),
        ({"kv_nbytes": 1.5}, "BIGINT"),
        ({"started": "today"}, "TIMESTAMP"),
        ({"recipe": 3}, "VARCHAR"),
    ],
)
def test_a_wrong_row_is_refused_and_nothing_of_its_batch_is_stored(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    results = Results(tmp_path)
    with pytest.raises(BadParameter, match=message):
        results.add([row(1), row(2, **wrong)])
    assert len(results) == 0 and not list(tmp_path.iterdir())


def test_the_newest_row_of_a_key_counts_also_after_files_were_folded(tmp_path: Path) -> None:
    mine, other = Results(tmp_path), Results(tmp_path)
    mine.add([row(1, kl=1.0), row(2, kl=2.0)])
    other.add(row(1, status="failed", error="no"))
    assert mine.keys("failed") == {row(1)["key"]} and [each["revision"] for each in other.rows()] == [1, 0]
    mine.add(row(1, kl=3.0))
    mine.note(row(2)["key"], "look here")
    other.pin(row(2)["key"])
    mine.delete([row(1)["key"]])
    for results in (mine, other, Results(tmp_path)):
        (left,) = results.rows()
        assert (left["kl"], left["note"], left["pinned"], left["revision"]) == (2.0, "look here", True, 2)
    mine.fold(everything=True)
    assert len(list(tmp_path.iterdir())) == 1 and len(raw(tmp_path)) == 2  # one of them says that the other is gone
    assert other.rows() == Results(tmp_path).rows() and len(other) == 1
    mine.add(row(1, kl=4.0))
    assert len(other) == 2
    with pytest.raises(BadParameter, match="no row"):
        mine.note("nowhere", "x")


def test_a_writer_puts_its_many_files_into_one_and_leaves_those_of_others(tmp_path: Path) -> None:
    mine, other = Results(tmp_path), Results(tmp_path)
    other.add(row(1000))
    for number in range(70):
        mine.add(row(number))
    assert len(list(tmp_path.iterdir())) < 10 and len(mine) == len(other) == 71 == len(set(raw(tmp_path)))


def test_the_front_is_what_a_plain_loop_finds(tmp_path: Path) -> None:
    results = Results(tmp_path)
    figures = [(5, 0.1, True), (4, 0.1, True), (3, 0.5, False), (2, 0.4, True), (1, 0.9, False), (2, 0.4, True)]
    results.add(
        row(
            100 * r + case, recipe=f"r{r}", recipe_json={"r": r}, case_number=case, kv_nbytes=size, kl=kl, correct=right
        )
        for r, (size, kl, right) in enumerate(figures)
        for case in range(2)
    )
    results.add(row(999, recipe="quick", recipe_json={"q": 1}, case_number=0, kv_nbytes=0, kl=0.0, correct=True))
    results.add(row(998, status="failed", recipe="quick", recipe_json={"q": 1}, case_number=1))
    for x, y, sign in (("kv_nbytes", "kl", 1), ("kv_nbytes", "correct", -1)):
        table = {
            each.recipe: (getattr(each, x), sign * getattr(each, y)) for each in results.recipes(x, y).itertuples()
        }
        del table["quick"]  # it was not measured on every case
        best = {
            name
            for name, (a, b) in table.items()
            if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in table.values())
        }
        front = results.front(x, y)
        assert set(front.recipe) == best and front[x].is_monotonic_increasing
    assert results.front("kv_nbytes", "kl", complete=False).recipe.tolist() == ["quick"]
    assert results.front("kv_nbytes", "kl", where="recipe = 'r2'").recipe.tolist() == ["r2"]
    assert results.front("kl", "correct").iloc[0].recipe in ("r0", "r1")
    with pytest.raises(BadParameter, match="no figure"):
        results.front("kv_nbytes", "recipe")


def test_sql_csv_and_words(tmp_path: Path) -> None:
    import pandas as pd

    results = Results(tmp_path / "r")
    results.add(row(number, kl=number / 10, task="t") for number in range(3))
    assert results.sql("SELECT max(kl) AS most FROM runs").most.tolist() == [0.2]
    assert pd.read_csv(results.to_csv(tmp_path / "a.csv", "kl > 0")).kl.tolist() == [0.1, 0.2]
    assert "3 runs" in results.summary() and results.numbers()["tasks"] == ["t"]
    for query in (
        "SELECT nothing FROM runs",
        "SELECT",
        "DROP VIEW runs",
        "SELECT 1; DROP VIEW runs",
        "",
        "COPY runs TO 'x'",
    ):
        with pytest.raises(BadParameter) as refused:
            results.sql(query)
        assert "\n" not in str(refused.value)
    assert len(results) == 3
    with pytest.raises(InputError, match="cannot write"):
        results.to_csv("/no/such/folder/a.csv")


def test_files_of_a_newer_version_are_refused_and_those_without_a_column_are_read(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(row(1, kl=1.0))
    (file,) = tmp_path.iterdir()
    fewer = tmp_path / "runs-v1-0-0.parquet"
    duckdb.connect().execute(f"COPY (SELECT * EXCLUDE (kl, note) FROM '{file}') TO '{fewer}' (FORMAT parquet)")
    file.unlink()
    (found,) = Results(tmp_path).rows()
    assert found["kl"] is None and found["model"] == "m"
    fewer.rename(tmp_path / "runs-v99-0-0.parquet")
    with pytest.raises(InputError, match="newer workbench"):
        Results(tmp_path)
    (tmp_path / "runs-v99-0-0.parquet").write_text("no")
    (tmp_path / "runs-v99-0-0.parquet").rename(tmp_path / "runs-v1-1-1.parquet")
    with pytest.raises(WorkbenchError, match="cannot read the results"):
        Results(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        Results(tmp_path / "runs-v1-1-1.parquet")


# -- killed, and without room


WRITER = """
import sys
from workbench.results import Results, parquet_files, results
results._MANY = 3
found = Results(sys.argv[1])
for number in range(int(sys.argv[2]), 10**6):
    found.add({"key": f"{number:032d}", "status": "done", "text": "x" * 1000})
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_writers_lose_no_row_that_was_stored_and_leave_none_twice(tmp_path: Path) -> None:
    told: list[int] = []
    for turn, patience in enumerate((0.0, 0.013, 0.031)):  # in different moments of writing and folding
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), str(1000 * (2 * turn + each))],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for each in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            told += [int(writer.stdout.readline()) for _ in range(5)]
        time.sleep(patience)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            told += map(int, writer.communicate()[0].split())
    left = Results(tmp_path)
    stored = [int(found["key"]) for found in left.rows()]
    assert set(told) <= set(stored) and len(stored) == len(set(stored))
    assert len(set(stored) - set(told)) <= 6  # of each writer the row that it was about to tell
    for unfinished in tmp_path.glob(".unfinished-*"):
        os.utime(unfinished, (0, 0))
    left.fold(everything=True)
    assert len(list(tmp_path.iterdir())) == 1 and sorted(map(int, raw(tmp_path))) == sorted(stored)


FULL = """
import resource, sys
from workbench.errors import WorkbenchError
from workbench.results import Results
found = Results(sys.argv[1])
found.add({"key": "a", "status": "done"})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # from here on no file may be longer
more = [{"key": f"b{n}", "status": "done", "text": str(hash(str(n)) ** 9)} for n in range(2000)]
try:
    found.add(more)
except WorkbenchError as error:
    print(error)
assert len(found) == 1 == len(Results(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
found.add(more)
assert len(found) == 2001
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_disk_without_room_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "make room" in done.stdout
    assert len(list(tmp_path.iterdir())) == 2  # and nothing unfinished


def test_readers_go_on_while_files_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = Results(tmp_path), Results(tmp_path)
    writer.add(row(1))
    writer.add(row(2))
    load = parquet_files.load

    def late(database: Any, table: str, folder: Path, names: Any) -> None:
        monkeypatch.setattr(parquet_files, "load", load)
        writer.fold()  # between listing and reading
        load(database, table, folder, names)

    monkeypatch.setattr(parquet_files, "load", late)
    assert len(reader) == 2 and len(list(tmp_path.iterdir())) == 1


# -- of earlier versions


def test_old_tables_come_in_once(tmp_path: Path) -> None:
    old = tmp_path / "sweep.csv"
    old.write_text(
        "recipe,budget,kv_share,kv_mib,host_mib,attention,score_share,weights_mib,kl,top1,nll_difference,perplexity,"
        "first_divergence,first_token_s,tokens_per_s,text,error\n"
        "snapkv 0.25,0.25,0.25,1.5,0.0,,1.0,512.0,0.125,0.5,0.1,1.1,3,0.5,20.0,hello,\n"
        "snapkv 0.001,0.001,,,,,,,,,,,,,,,too small\n"
    )
    results = Results(tmp_path / "r")
    assert (results.import_old(old), results.import_old(old)) == (2, 0)
    done, failed = sorted(results.rows(), key=lambda each: str(each["status"]))
    assert (done["kv_nbytes"], done["weight_nbytes"], done["kl"], done["first_divergence"]) == (
        3 << 19,
        1 << 29,
        0.125,
        3,
    )
    assert (failed["status"], failed["error"], failed["study"]) == ("failed", "too small", "sweep.csv")
    results = Results(tmp_path / "q")
    table = ROOT / "benchmarks" / "results" / "kv_quality.json"
    assert results.import_old(table) == len(results) > 1000
    for name, text in (("a.csv", "no,table\n1,2\n"), ("a.json", "{}"), ("a.json", "["), ("a.txt", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            results.import_old(tmp_path / name)


def test_ten_thousand_rows_are_filtered_and_their_front_found_in_a_blink(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add(
        row(
            n,
            recipe=f"r{n % 100}",
            recipe_json={"r": n % 100},
            case_number=n // 100,
            kl=n % 100 / 7,
            kv_nbytes=100 - n % 100,
        )
        for n in range(10_000)
    )
    assert len(results) == 10_000
    began = time.process_time()
    assert len(results.frame("kl < 2 AND case_number < 50")) == 700
    assert len(results.front("kv_nbytes", "kl")) == 100
    assert time.process_time() - began < 2  # 0.1 s, where nothing else runs
