"""Sweeps: each row once whatever interrupts them, each prompt read once, the same rows wherever they are computed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch

import workbench as wb
from tests.byte_tokens import byte_tokenizer
from tests.waiting import until
from workbench.errors import (
    BadBudget,
    BadParameter,
    Cancelled,
    InputError,
    ModelNotFound,
    UnknownMethod,
    UnknownTask,
    WorkbenchError,
)
from workbench.models import tiny
from workbench.progress import Progress
from workbench.runtime import readings
from workbench.sweep import Bench, ModelSpec, grid_of
from workbench.sweep.grid import tasks_of
from workbench.sweep.measuring import measure
from workbench.sweep.placement import check_fits, choose, needed_nbytes, pinned

ROOT = Path(__file__).resolve().parents[2]
SAME = ["recipe", "task", "case_number", "status", "tokens", "kept_hash", "kl", "nll", "text", "correct", "kv_nbytes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four prompts in a file."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [f"{animal}s run and sleep and eat, again and again." for animal in ("Fox", "Dog", "Hare", "Owl")]
    path.write_text("\n".join(json.dumps({"text": text, "question": "Who?", "answer": text[:3]}) for text in texts))
    return f"file reply_tokens=3 path={path}"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each prompt was read, by its ids, the attention and how many bytes the weights have."""
    counts: Counter[Any] = Counter()
    plain = readings.read

    def counted(model: Any, facts: Any, prompt: Any, **options: Any) -> Any:
        counts[tuple(prompt.ids.tolist()), options.get("method"), options["weight_nbytes"]] += 1
        return plain(model, facts, prompt, **options)

    monkeypatch.setattr(readings, "read", counted)
    return counts


def stored_keys(folder: Path) -> list[str]:
    """The keys of all rows in all files."""
    files = f"{folder}/runs-*.parquet"
    return [key for (key,) in duckdb.connect().execute(f"SELECT key FROM read_parquet('{files}')").fetchall()]


def test_a_grid_is_measured_once_and_each_prompt_read_once(
    model: str, task: str, tmp_path: Path, read: Counter[Any]
) -> None:
    recipes = [
        "full",
        "knorm",
        "rtn bits=8",
        "knorm + kivi",
        "streaming-window window=8",
        "streaming-window window=8 + rtn bits=8",
    ]
    results = wb.sweep(model, recipes, [0.9, 0.6], task, results=tmp_path)
    rows = results.frame()
    assert len(rows) == 4 * 8 and set(rows.status) == {"done"}
    assert len(read) == 4 * 4 and set(read.values()) == {1}  # plain or rtn weights, with or without the window
    again = wb.sweep([model], recipes, [0.9, 0.6], [task], results=results)
    assert again is results and len(stored_keys(tmp_path)) == 32 and set(read.values()) == {1}
    for row in rows[rows.case_number == 2].itertuples():  # each is the run that a session makes
        session = wb.Session(model)
        recipe = wb.Recipe.from_dict(json.loads(row.recipe_json))
        session.read(row.prompt)
        run = session.run(recipe, question="\n\nQuestion: Who?\nAnswer:", max_new_tokens=3)
        assert json.loads(row.tokens) == list(run.tokens) and row.kv_nbytes == run.plan.nbytes
        assert row.kl == pytest.approx(run.quality.kl, rel=1e-9) and row.peak_nbytes >= row.total_nbytes > row.kv_nbytes
        assert row.recipe == recipe.label and row.weight_nbytes == session.readings.variants.nbytes(
            recipe.family("weights")
        )
    assert rows[rows.recipe == "full"].kl.eq(0).all() and (rows.kv_nbytes <= rows.kv_full_nbytes).all()


def test_failures_say_why_and_are_measured_again_on_request(
    model: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = wb.sweep(model, ["knorm", "full"], "1 B", task, cases=1, results=tmp_path)
    failed, done = sorted(results.rows(), key=lambda row: str(row["status"]), reverse=True)
    assert failed["status"] == "failed" and "smallest" in failed["error"] and done["kl"] == 0
    calls: list[Any] = []
    measured = Bench.row
    monkeypatch.setattr(Bench, "row", lambda self, *given: calls.append(given) or measured(self, *given))
    wb.sweep(model, ["knorm", "full"], "1 B", task, cases=1, results=tmp_path)
    assert calls == []
    wb.sweep(model, ["knorm", "full"], "1 B", task, cases=1, results=tmp_path, retry_failed=True)
    assert len(calls) == 1 and [row["revision"] for row in results.rows("status = 'failed'")] == [1]


def test_cancelled_sweeps_keep_their_rows_and_go_on(model: str, task: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def stop_at_three(stage: str, done: int, total: int) -> None:
        if stage == "sweeping":
            told.append((done, total))
            if done == 3:
                progress.cancel()

    progress = Progress(stop_at_three)
    with pytest.raises(Cancelled) as stopped:
        wb.sweep(model, ["full", "knorm"], [0.9, 0.6], task, results=tmp_path, progress=progress)
    assert 3 <= len(stopped.value.finished) <= 4 and told[-1] == (3, 12)
    kept, told[:] = len(stopped.value.finished), []
    wb.sweep(
        model, ["full", "knorm"], [0.9, 0.6], task, results=tmp_path, progress=Progress(lambda *a: told.append(a[1:]))
    )
    assert told[-1] == (12 - kept, 12 - kept) and len(stored_keys(tmp_path)) == 12


def test_readings_are_kept_for_rows_to_come_and_then_let_go(task: str, tmp_path: Path) -> None:
    bench = Bench(wb.Session((tiny("llama"), byte_tokenizer())))
    items = grid_of("any", ["full", "rtn"], (), [task], (0,), cases=2).items
    held: list[int] = []
    measure(bench, items, lambda row: held.append(len(bench._read)), Progress())
    assert held == [1, 2, 2, 1] and not bench._read and bench.readings == 4
    assert len(bench.session.runs) == 1 and len(bench.session.readings.timelines) <= 3


def test_keys_follow_what_decides_a_row(model: str, task: str) -> None:
    network, tokenizer = tiny("llama"), byte_tokenizer()
    bench = Bench(wb.Session((network, tokenizer)))
    (chosen,) = tasks_of(task)
    recipe = wb.Recipe.of("knorm", budget=0.5)
    key = bench.key(recipe, chosen, 0)
    assert key == Bench(wb.Session((network, tokenizer))).key(wb.Recipe.of("knorm budget=0.5"), chosen, 0)
    others = [
        bench.key(recipe, chosen, 1),
        bench.key(wb.Recipe.of("knorm", budget=0.4), chosen, 0),
        bench.key(recipe, tasks_of(task.replace("reply_tokens=3", "reply_tokens=4"))[0], 0),
        Bench(wb.Session((network, tokenizer)), max_new_tokens=2).key(recipe, chosen, 0),
        Bench(wb.Session((network, tokenizer), kv_dtype="float32")).key(recipe, chosen, 0),
    ]
    changed = tiny("llama")
    changed.load_state_dict(network.state_dict())
    next(changed.parameters()).data[-1, -1] += 1e-3
    others.append(Bench(wb.Session((changed, tokenizer))).key(recipe, chosen, 0))
    assert len({key, *others}) == 1 + len(others)


def test_without_texts_there_are_hashes_and_tokens(model: str, task: str, tmp_path: Path) -> None:
    (row,) = wb.sweep(model, "full", (), task, cases=1, keep_text=False, results=tmp_path, study="secret").rows()
    assert row["prompt_hash"] and row["tokens"] and row["study"] == "secret"
    assert not any(row[name] for name in ("prompt", "question", "expected", "text", "full_text"))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"recipes": "nope"}, UnknownMethod),
        ({"recipes": "knorm colour=1"}, BadParameter),
        ({"budgets": 2}, BadBudget),
        ({"tasks": "nope"}, UnknownTask),
        ({"tasks": []}, BadParameter),
        ({"seeds": [-1]}, BadParameter),
        ({"seeds": []}, BadParameter),
        ({"models": []}, BadParameter),
        ({"models": "/no/such/model"}, ModelNotFound),
        ({"executor": 3}, InputError),
        ({"threads": 0}, BadParameter),
    ],
)
def test_a_wrong_grid_is_refused_at_once_in_one_line(
    wrong: dict[str, Any], error: type[Exception], model: str, tmp_path: Path
) -> None:
    given = {"models": model, "recipes": "knorm", "budgets": 0.5, "tasks": "needle", "results": tmp_path} | wrong
    with pytest.raises(error) as refused:
        wb.sweep(**given)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_loaded_takes_no_other_with_it(model: str, task: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="1 of 2 models"):
        wb.sweep(["/no/such/model", model], "full", (), task, cases=1, results=tmp_path)
    assert len(wb.Results(tmp_path)) == 1


SWEEP = """
import sys, workbench as wb
wb.sweep(sys.argv[1], ["full", "knorm", "keydiff", "kivi"], [0.9, 0.8, 0.7, 0.6], sys.argv[2], results=sys.argv[3])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_sweep_goes_on_and_repeats_at_most_the_row_it_was_at(
    model: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.Popen([sys.executable, "-c", SWEEP, model, task, str(tmp_path)], cwd=ROOT)
    until(lambda: killed.poll() is not None or len(list(tmp_path.glob("runs-*"))) > 4, 120)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    kept = len(set(stored_keys(tmp_path)))
    calls: list[Any] = []
    measured = Bench.row
    monkeypatch.setattr(Bench, "row", lambda self, *given: calls.append(given) or measured(self, *given))
    budgets = [0.9, 0.8, 0.7, 0.6]
    results = wb.sweep(model, ["full", "knorm", "keydiff", "kivi"], budgets, task, results=tmp_path)
    total = 4 * (1 + 3 * 4)
    assert 4 < kept < total and len(calls) == total - kept
    assert len(results) == total == len(stored_keys(tmp_path))


FULL = """
import resource, sys, workbench as wb
from workbench.errors import WorkbenchError
from workbench.progress import Progress
from workbench.sweep import Bench

def fill(stage, done, total):
    if stage == "sweeping" and done == 3:  # from here on no file may have more bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

def sweep(progress=None):
    return wb.sweep(sys.argv[1], ["full", "knorm"], [0.9, 0.8], sys.argv[2], results=sys.argv[3], progress=progress)

try:
    sweep(Progress(fill))
except WorkbenchError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
measured, plain = [], Bench.row
Bench.row = lambda self, *given: measured.append(given) or plain(self, *given)
assert len(sweep()) == 12 and len(measured) == 9, len(measured)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_sweep_whose_disk_was_full_goes_on_where_it_was(model: str, task: str, tmp_path: Path) -> None:
    asked = [sys.executable, "-c", FULL, model, task, str(tmp_path)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "make room, and run the same again" in done.stdout
    assert len(stored_keys(tmp_path)) == 12 == len(set(stored_keys(tmp_path)))


# -- on a cluster


@pytest.fixture
def cluster() -> Any:
    """A cluster of two workers in another process; what remains of it is killed."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("cluster.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_two_workers_of_which_one_is_killed_give_the_table_of_one_process_and_a_lost_scheduler_loses_no_row(
    cluster: Any, model: str, task: str, tmp_path: Path
) -> None:
    process, at = cluster
    recipes = ["full", "knorm", "keydiff", "kivi", "rtn bits=8 + knorm", "streaming-window window=8"]
    alone = wb.sweep(model, recipes, [0.9, 0.7], task, results=tmp_path / "alone", threads=1)

    def kill_a_worker(stage: str, done: int, total: int) -> None:
        if done >= 5 and len(at["workers"]) == 2:
            os.kill(at["workers"].pop(), signal.SIGKILL)

    there = tmp_path / "there"
    together = wb.sweep(
        model, recipes, [0.9, 0.7], task, executor=at["address"], results=there, threads=1,
        progress=Progress(kill_a_worker),
    )  # fmt: skip
    assert len(at["workers"]) == 1
    tables = [results.frame().set_index("key").sort_index()[SAME] for results in (alone, together)]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 40 == len(stored_keys(there))

    def kill_the_scheduler(stage: str, done: int, total: int) -> None:
        if done >= 3 and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    lost = tmp_path / "lost"
    with pytest.raises(WorkbenchError, match=r"scheduler|worker") as error:
        wb.sweep(
            model, recipes, [0.8, 0.6], task, executor=at["address"], results=lost, threads=1,
            progress=Progress(kill_the_scheduler),
        )  # fmt: skip
    assert "\n" not in str(error.value)
    kept = len(stored_keys(lost))
    assert 3 <= kept < 40
    wb.sweep(model, recipes, [0.8, 0.6], task, results=lost, threads=1)
    assert len(stored_keys(lost)) == 40 == len(set(stored_keys(lost)))


def test_workers_cannot_be_given_what_they_cannot_load(task: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="workers load a model by its name"):
        wb.sweep((tiny("llama"), byte_tokenizer()), "full", (), task, executor="tcp://127.0.0.1:1", results=tmp_path)
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        wb.sweep("workbench-tiny", "full", (), task, executor="nowhere", results=tmp_path)


def test_models_go_where_they_are_and_where_they_fit() -> None:
    small, large, unknown = (ModelSpec(name) for name in ("workbench-tiny", "smollm2-135m", "org/elsewhere"))
    needed = {model: needed_nbytes(model) for model in (small, large, unknown)}
    assert needed[unknown] is None and 2**25 < needed[small] < 2**26 < 2**29 < needed[large] < 2**30
    assert needed_nbytes(ModelSpec("smollm2-135m", dtype="bfloat16")) == needed[large] // 2
    assert needed_nbytes(ModelSpec("smollm2-135m", device="cuda")) is None
    waiting = {small: 4, large: 6, unknown: 0}
    assert choose(waiting, small, {}, needed, None) == small  # what it holds
    assert choose(waiting, None, {}, needed, 2**40) == large  # where most waits
    assert choose(waiting, None, {large: 1}, needed, 0) == small
    assert choose(waiting, large, {}, needed, 2**27) == small  # what fits
    assert choose(waiting, None, {}, needed, 2**20) is None
    check_fits(needed, [2**20, 2**30])
    with pytest.raises(InputError, match=r"smollm2-135m takes about 0\.6 GiB, and the largest worker has 0.1"):
        check_fits(needed, [2**27])
    assert [pinned(None, rank, 2) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert pinned(None, 1, 1) is None and pinned("cpu", 1, 4) == "cpu"


def test_cases_stay_together_and_weights_are_made_once_in_each_piece(model: str, task: str) -> None:
    grid = grid_of(model, ["rtn", "knorm", "full"], [0.5, 0.4], [task, "needle length=64"], range(3))
    pieces = grid.units(grid.items, 2)
    assert len(pieces) == 2 and sum(map(len, pieces)) == len(grid.items) == 7 * 4
    where = Counter(
        (item.task, item.number) for piece in pieces for item in {(i.task, i.number): i for i in piece}.values()
    )
    assert set(where.values()) == {1}
    for piece in pieces:
        weights = [bool(item.recipe.family("weights")) for item in piece]
        assert weights == sorted(weights)
    plain = [item for item in grid.items if not item.recipe.family("weights")]
    assert [len({(item.task, item.number) for item in piece}) for piece in grid.units(plain, 2)] == [1] * 7


def test_threads_are_as_before_after_a_sweep(model: str, task: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    wb.sweep(model, "full", (), task, cases=1, threads=before + 1, results=tmp_path)
    assert torch.get_num_threads() == before
