"""`workbench sweep` and `workbench results`: a file or options make the same grid, and what is wrong is one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import workbench as wb
from tests.byte_tokens import byte_tokenizer
from tests.waiting import until
from workbench.cli import main
from workbench.models import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_file_and_options_make_the_same_rows(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "Foxes run and sleep and eat.", "question": "Who?", "answer": "Fox"}))
    folder, file = str(tmp_path / "results"), tmp_path / "sweep.yaml"
    file.write_text(
        f"models: [{model}]\nrecipes: [knorm, 'full', {{method: kivi, group: 16}}]\nbudgets: [0.8, 80%, 0.6]\n"
        f"tasks: [{{task: file, path: {prompts}, reply_tokens: 2}}]\nresults: {folder}\n"
    )
    assert main(["sweep", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["done"] + said["failed"] == 5 == len(wb.Results(folder)) and len(said["means"]) == 5
    task = f"file path={prompts} reply_tokens=2"
    options = ["--budgets", "0.8,0.6", "--task", task, "--model", model, "--results", folder]
    assert main(["sweep", "knorm", "full", "kivi group=16", *options]) == 0
    assert len(wb.Results(folder)) == 5 and "knorm 0.6" in capsys.readouterr().out
    assert main(["sweep", "kivi", "knorm", "--set", "kivi.group=16", *options]) == 0
    assert len(wb.Results(folder)) == 5


def test_results_are_shown_filtered_exported_and_taken_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "results")
    old = tmp_path / "old.csv"
    old.write_text("recipe,budget,kv_share,kv_mib,kl,error\na,0.5,0.5,2,0.1,\nb,0.25,0.25,1,0.4,\nc,0.5,0.6,2,0.2,\n")
    assert main(["results", folder, "--import", str(old)]) == 0
    assert main(["results", folder, "--front", "kv_share,kl", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 rows taken in\n") and [row["recipe"] for row in json.loads(out[16:])] == ["b", "a"]
    assert main(["results", folder, "--rows", "--where", "kl > 0.3", "--json"]) == 0
    assert [row["recipe"] for row in json.loads(capsys.readouterr().out)] == ["b"]
    assert main(["results", folder, "--sql", "SELECT max(kl) AS most FROM runs"]) == 0
    assert "0.4" in capsys.readouterr().out
    assert main(["results", folder, "--csv", str(tmp_path / "new.csv"), "--fold"]) == 0
    assert (tmp_path / "new.csv").read_text().count("\n") == 4
    assert main(["results", folder]) == 0
    assert "3 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("recipes: [knorm", "line 1: this is not YAML"),
        ("- knorm", "a sweep is names and values"),
        ("models: [a]", "recipes is missing"),
        ("recipes: [knorm]\ncolour: 1", "unknown name 'colour'"),
        ("recipes: 3", "recipes is 3"),
        ("recipes: [nope]", "unknown method 'nope'"),
        ("recipes: [{method: knorm, colour: 1}]", "colour"),
        ("recipes: [knorm]\nbudgets: [2]", "budget 2"),
        ("recipes: [knorm]\ntasks: [neddle]", "needle"),
        ("recipes: [knorm]\nseeds: 5-2", "0-7"),
        ("recipes: [knorm]\nworkers: 0", "workers is 0"),
    ],
)
def test_a_file_that_describes_no_sweep_is_one_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    assert main(["sweep", str(file), "--results", str(tmp_path / "results")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and told in err and not (tmp_path / "results").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_control_c_during_a_sweep_keeps_the_rows_so_far(model: str, tmp_path: Path) -> None:
    budgets = ",".join(f"0.{step}" for step in range(100, 999))
    folder = tmp_path / "results"
    asked = [
        "sweep",
        "knorm",
        "--budgets",
        budgets,
        "--model",
        model,
        "--task",
        "needle length=64",
        "--results",
        str(folder),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", *asked],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    until(lambda: process.poll() is not None or len(list(folder.glob("runs-*"))) > 3, 240)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count(b"\n") == 1 and b"the same command goes on" in err
    assert 3 < len(wb.Results(folder)) < 899
