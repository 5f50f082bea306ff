"""The command line: exit codes, one line for what went wrong, one JSON document, and a quick start."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.byte_tokens import byte_tokenizer
from workbench.cli import main
from workbench.models import tiny

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "widgets"))}
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun comes up again. " * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "workbench", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        **options,
    )


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- starting


@pytest.mark.parametrize(
    "code",
    [
        "import workbench",
        "import workbench.examples; workbench.examples.needle()",
        "from workbench.cli import main; main(['--help'])",
        "from workbench.cli import main; main(['run', '--help'])",
        "from workbench.cli import main; main(['models', 'list', '--json'])",
        "from workbench.cli import main; main(['tasks'])",
        "from workbench.cli import main; main(['evaluate', '--task', 'neddle'])",
        "from workbench.cli import main; main(['results', '/no/such/folder'])",
        "from workbench.cli import main; main(['run', 'snapkv', '--text', ''])",
        "from workbench.cli import main; main(['compare', 'snapkv', '--text', 'a', '--budgets', 'nan'])",
    ],
)
def test_light_work_imports_neither_torch_nor_transformers(code: str) -> None:
    heavy = python(f"{code}\nimport sys; print([name for name in ('torch', 'transformers') if name in sys.modules])")
    assert heavy.splitlines()[-1] == "[]"


# -- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "--bogus"),
        (["frobnicate"], "frobnicate"),
        (["run", "snapkv", "--text", "hi", "--max-new-tokens", "x"], "--max-new-tokens"),
        (["compare"], "METHOD"),
        (["run", "snapvk", "--text", "hi"], "did you mean snapkv"),
        (["run", "snapkv"], "--text-file"),
        (["run", "snapkv", "--text", "hi", "--example", "code"], "--text and --example together"),
        (["run", "snapkv", "--text", "  "], "empty"),
        (["run", "snapkv", "--text", "hi", "--question", " "], "question is empty"),
        (["run", "snapkv", "--text", "hi", "--budget", "0"], "budget 0"),
        (["run", "snapkv", "--text", "hi", "--budget", "nan"], "budget 'nan'"),
        (["run", "snapkv", "--text", "hi", "--budget", "5 parsecs"], "parsecs"),
        (["run", "snapkv", "--text", "hi", "--set", "window=0"], "window=0"),
        (["run", "snapkv", "--text", "hi", "--set", "kernel=4"], "odd"),
        (["run", "snapkv", "--text", "hi", "--set", "windw=3"], "did you mean 'window'"),
        (["run", "snapkv", "--text", "hi", "--set", "window"], "name=value"),
        (["run", "snapkv", "kivi", "--text", "hi", "--set", "window=3"], "snapkv.window=3"),
        (["run", "snapkv", "--text", "hi", "--set", "h2o.decode=true"], "h2o is not among"),
        (["run", "snapkv", "h2o", "--text", "hi"], "snapkv"),
        (["run", "--text", "hi", "--model", "no-such-model"], "no-such-model"),
        (["run", "--example", "poem"], "needle, code, dialogue"),
        (["compare", "snapkv", "--text", "hi", "--budgets", ","], "--budgets"),
        (["compare", "snapkv", "--text", "hi", "--budgets", "0.5,2"], "budget 2"),
        (["sweep", "snapkv", "--seeds", "3-1"], "0-7"),
        (["sweep", "snapkv", "--task", "neddle"], "needle"),
        (["sweep", "snapkv", "--task", "needle 512"], "name=value"),
        (["sweep", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["sweep", "a.yaml", "snapkv"], "alone"),
        (["sweep", "snapkv", "--executor", "tcp://x:1", "--workers", "2"], "--workers"),
        (["results", "/no/such/folder"], "/no/such/folder"),
        (["search"], "needs a limit"),
        (["search", "--limit", "25%"], "is no size"),
        (["search", "--limit", "1MiB", "--quality", "kl"], "kl=0.02"),
        (["search", "--limit", "1MiB", "--quality", "kl=low"], "is no number"),
        (["search", "--limit", "1MiB", "--quality", "ppl=3"], "kl, correct, top1"),
        (["search", "--limit", "1MiB", "--memory", "peak"], "memory"),
        (["search", "snapvk", "--limit", "1MiB"], "did you mean snapkv"),
        (["search", "--limit", "1MiB", "--task", "neddle"], "needle"),
        (["evaluate", "--task", "neddle"], "did you mean needle"),
        (["evaluate", "--task", "needle", "--length", "3"], "length=3"),
        (["evaluate", "--task", "file", "--length", "300"], "unknown parameter 'length'"),
        (["evaluate", "--task-set", "depth"], "name=value"),
        (["evaluate", "--task-set", "dept=0.1"], "did you mean 'depth'"),
        (["evaluate", "--task", "file"], "path is missing"),
        (["evaluate", "--task", "ruler", "--task-set", "path=/no/such/file.jsonl"], "No such file"),
        (["evaluate", "snapvk", "--task", "needle"], "did you mean snapkv"),
        (["evaluate", "snapkv", "--budgets", "2"], "budget 2"),
        (["methods", "--family", "poetry"], "kv, weights, attention"),
        (["models", "fetch", "no-such-model"], "no-such-model"),
        (["models", "info", "no-such-model"], "no-such-model"),
        (["models", "audit", "no-such-model"], "no-such-model"),
        (["models", "audit", "llama", "--weights", "snapkv"], "changes no weights"),
        (["app", "--port", "99999"], "--port"),
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_wrong_input_is_as_short_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = command("run", "snapkv", "--text-file", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_files_that_cannot_be_read_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (tmp_path / "old.txt").write_bytes("Größe".encode("latin-1"))
    cases = {
        "": "directory",
        "none.txt": "No such file",
        "empty.txt": "empty",
        "image.png": "UTF-8",
        "old.txt": "UTF-8",
    }
    for name, message in cases.items():
        assert main(["run", "--text-file", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert main(["run", "--text-file", "bad\0name"]) == 2


def test_a_pickled_checkpoint_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert main(["run", "--text", "hi", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


def test_a_text_beyond_the_positions_of_the_model_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", model, "--text", "word " * 1000]) == 2
    err = capsys.readouterr().err
    assert "5000 tokens" in err and "2048 positions" in err and err.count("\n") == 1


def test_a_budget_that_cannot_be_met_names_the_smallest(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "snapkv", "--model", model, "--text", TEXT, "--budget", "0.00001"]) == 2
    assert "smallest possible is" in capsys.readouterr().err


# -- working


def test_run_as_json_is_one_document_with_the_answer_and_its_figures(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["run", "snapkv", "--budget", "0.5", "--set", "window=4", "--model", model, "--text", TEXT]
    assert main([*asked, "--question", "Why?", "--max-new-tokens", "5", "--kv-dtype", "float32", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert err == ""
    assert found["recipe"]["methods"][0] == {
        "method": "snapkv",
        "budget": 0.5,
        "window": 4,
        "kernel": 7,
        "pooling": "max",
    }
    assert len(found["tokens"]) == 5 and found["kv_dtype"] == "float32" and found["question"] == "Why?"
    assert 0.4 < found["kv_share"] <= 0.5
    assert found["quality"]["kl"] > 0


def test_run_gives_the_same_answer_as_the_session(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    import workbench as wb

    session = wb.Session(model)
    session.read(TEXT)
    want = session.run("knorm", budget=0.3, max_new_tokens=6)
    assert (
        main(["run", "knorm", "--budget", "30%", "--model", model, "--text", TEXT, "--max-new-tokens", "6", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["tokens"] == list(want.tokens)


def test_methods_are_joined_into_one_recipe_by_plus_or_by_naming_several(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", model, "--text", TEXT, "--max-new-tokens", "3", "--no-quality", "--set", "kivi.bits=4", "--json"]
    seen = []
    for names in (["snapkv+kivi"], ["snapkv", "kivi"]):
        assert main(["run", *names, *rest]) == 0
        seen.append(json.loads(capsys.readouterr().out))
    assert seen[0]["recipe"] == seen[1]["recipe"] and seen[0]["tokens"] == seen[1]["tokens"]
    assert [part["method"] for part in seen[0]["recipe"]["methods"]] == ["snapkv", "kivi"]
    assert seen[0]["recipe"]["methods"][1]["bits"] == 4 and seen[0]["quality"] is None


def test_standard_input_is_read_where_the_text_is_a_dash(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in ("--text", "--text-file"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfsome text")))
        assert main(["run", option, "-", "--model", model, "--max-new-tokens", "2", "--json", "--no-quality"]) == 0
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len("some text")


def test_streamed_or_not_the_answer_is_printed_once(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "--model", model, "--text", TEXT, "--max-new-tokens", "8", "--no-quality"]
    shown = []
    for option in ("--stream", "--no-stream"):
        assert main([*asked, option]) == 0
        shown.append(capsys.readouterr().out.split("\n\nfull:")[0].rstrip("\n\ufffd"))
    assert shown[0] == shown[1] and shown[0]


def test_compare_has_a_row_for_each_recipe_and_budget(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "compare",
        "full",
        "snapkv",
        "--budgets",
        "0.5,0.00001",
        "--model",
        model,
        "--text",
        TEXT,
        "--max-new-tokens",
        "4",
    ]
    assert main([*asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert [row["budget"] for row in rows][1:] == [0.5, 0.00001]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert "smallest" in rows[2]["error"] and rows[2]["kl"] is None
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "snapkv 0.5" in shown and "smallest" in shown


def test_evaluate_has_a_row_for_each_case_and_recipe_and_says_how_many_were_right(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"text": TEXT, "question": "Who?", "answer": "fox"}) + "\n{broken\n")
    asked = ["evaluate", "full", "knorm", "--budgets", "0.5", "--model", model, "--task", "file"]
    asked += ["--task-set", f"path={path}", "--task-set", "match=all", "--max-new-tokens", "3"]
    assert main([*asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert [(row["case"], row["recipe"]) for row in rows] == [
        (0, "full"),
        (0, "knorm 0.5"),
        (1, "full"),
        (1, "knorm 0.5"),
    ]
    assert [row["right"] for row in rows] == [False, False, None, None] and rows[0]["full_right"] is False
    assert rows[2]["error"].startswith("mine.jsonl, line 2: not JSON")
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "knorm 0.5: 0 of 1 right; the uncompressed model: 0" in shown and "line 2" in shown


def test_a_search_prints_its_front_and_its_best(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["search", "snapkv", "--model", model, "--memory", "kv", "--limit", "48KB", "--trials", "3", "--cases", "1"]
    asked += ["--task", "needle length=320", "--max-new-tokens", "3", "--results", str(tmp_path)]
    assert main([*asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert said["limit"] == 48_000 and said["memory"] == "kv" and said["best"]["methods"][0]["method"] == "snapkv"
    assert all(row["memory_nbytes"] > 0 and row["recipe_json"]["methods"] for row in said["front"])
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert "best: snapkv" in shown.out and "3 trials were done" in shown.err
    assert main(["search", "snapkv", "--model", model, "--limit", "40 KB", "--trials", "2", "--cases", "1"]) == 2
    assert "weights alone take at least" in capsys.readouterr().err


def test_tasks_as_json_describe_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--json"]) == 0
    found = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    depth = next(parameter for parameter in found["needle"]["parameters"] if parameter["name"] == "depth")
    assert (depth["default"], depth["low"], depth["high"], depth["kind"]) == (0.5, 0, 1, "float")
    assert main(["tasks"]) == 0
    assert "variable-tracking" in capsys.readouterr().out


def test_methods_as_json_describe_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--family", "kv", "--json"]) == 0
    found = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert {row["family"] for row in found.values()} == {"kv"}
    window = next(p for p in found["snapkv"]["parameters"] if p["name"] == "window")
    assert (window["default"], window["low"], window["unit"], window["kind"]) == (32, 1, "tokens", "int")
    assert main(["methods"]) == 0
    assert "snapkv" in capsys.readouterr().out


def test_models_are_listed_and_described(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "smollm2-135m"
    assert main(["models", "info", model, "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert (known["layers"], known["kv_heads"], known["checkpoint_dtype"]) == (3, 2, "float32")
    assert main(["models", "info", model]) == 0
    assert "kv_heads            2" in capsys.readouterr().out


def test_models_are_audited(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "audit", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] is True
    assert [row["layers"] for row in found["findings"] if row["part"] == "attention"] == [[0], [1], [2]]
    assert main(["models", "audit", "mistral"]) == 0  # a kind, without weights
    out = capsys.readouterr().out
    assert "0-31" in out and "sliding window of 4096" in out and "self_attn.q_proj" in out


def test_doctor_reports_what_is_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(b"12345")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"]["folder"] == str(tmp_path) and found["cache"]["bytes"] == 5
    assert found["default_model"] == {
        "name": "smollm2-135m",
        "title": "SmolLM2-135M-Instruct",
        "here": False,
        "folder": None,
    }
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"]["cpu"]["cores"] == os.cpu_count() and set(found["extras"]) == {
        "app",
        "gpu",
        "notebooks",
        "weights",
        "export",
        "tasks",
    }
    room = found["devices"]["room"]
    assert room["one GPU"] <= room["all GPUs"] < room["with host memory"]
    assert (
        room["with host memory"] * 2
        < sum(x["memory_bytes"] for x in found["devices"]["cuda"]) + (found["devices"]["cpu"]["memory_bytes"])
    )
    assert main(["doctor"]) == 0
    assert "workbench models fetch smollm2-135m" in capsys.readouterr().out


# -- ending


def test_what_nobody_expected_is_one_line_with_a_hint_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("line one\nline two")

    monkeypatch.setattr("workbench.cli.inputs.prompt", broken)
    assert main(["run", "--text", "hi"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "ZeroDivisionError" in err and "--debug" in err
    assert main(["run", "--text", "hi", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def _heeding_control_c() -> None:
    """In a child: also where tests run in the background of a shell, whose jobs ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_control_c_during_work_ends_with_130_and_one_line(model: str) -> None:
    asked = ["run", "--model", model, "--text", TEXT, "--max-new-tokens", "1800", "--stream", "--no-quality"]
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench", *asked],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_heeding_control_c,  # noqa: PLW1509  it only sets a signal's handler
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"workbench: cancelled\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"], ["--help"]])
def test_a_reader_who_leaves_early_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "workbench", *arguments],
            check=False,
            env=ENVIRONMENT,
            cwd=ROOT,
            stdout=closed,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_app_without_panel_says_which_extra_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.cli.commands.find_spec", lambda name: None if name == "panel" else find_spec(name))
    assert main(["app"]) == 2
    assert "inference-workbench[app]" in capsys.readouterr().err


def test_the_app_is_whatever_package_registers_itself_as_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    class Point:
        def load(self) -> Any:
            return lambda **options: given.append(options)

    points = {("workbench.commands", "app"): [Point()]}
    monkeypatch.setattr("workbench.cli.commands.entry_points", lambda group, name: points.get((group, name), []))
    assert main(["app", "--port", "0", "--no-open", "--allow-host", "a.b"]) == 0
    plain = {"model": "smollm2-135m", "address": "127.0.0.1", "port": 0, "open_browser": False}
    assert given == [{**plain, "models": (), "hosts": ["a.b"], "results": "results"}]
    points.clear()
    assert main(["app"]) == 2
    assert "inference-workbench[app]" in capsys.readouterr().err


# -- what is finished stays


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes during the third run."""
    from workbench.session import Session

    plain = Session.run

    def run(self: Session, *arguments: Any, **options: Any) -> Any:
        if len(self.runs) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", run)


def many(model: str, command: str, *more: str) -> list[str]:
    return [
        command, "knorm", "--budgets", "0.3,0.4,0.5", "--model", model, "--text", TEXT, "--max-new-tokens", "2", *more,
    ]  # fmt: skip


@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_comparison_shows_its_finished_rows(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(many(model, "compare", "--json")) == 130
    out, err = capsys.readouterr()
    assert [row["budget"] for row in json.loads(out)] == [0.3, 0.4] and err.count("\n") == 1 and "2 rows" in err
    assert main(many(model, "compare")) == 130
    assert "knorm 0.4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value",
    ["[" * 10**5, "{" * 10**5, "9" * 10**5, "NaN", "Infinity", "1e999", "true", '"3"', "[3]"],
    ids=range(9),
)
def test_a_setting_of_any_text_is_refused_in_one_short_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "snapkv", "--text", "hi", "--set", f"window={value}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "window=" in err and len(err) < 400
