"""`workbench cost` and `workbench hardware`: the same figures as the function's, in words and as JSON."""

from __future__ import annotations

import json

import pytest

import workbench as wb
from workbench.cli import main


def test_an_estimate_is_printed_and_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["cost", "kivi", "--set", "bits=2", "--model", "workbench-tiny", "--context", "500", "--batch", "2"]
    assert main(arguments) == 0
    told = wb.cost("workbench-tiny", wb.method("kivi", bits=2), context=500, batch=2)
    assert capsys.readouterr().out.strip() == told.summary()
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(told.numbers()))
    assert main([*arguments, "--explain"]) == 0
    assert "decode step" in capsys.readouterr().out


def test_what_is_wrong_is_one_line_and_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--hardware", "H900"], ["--model", "org/nothing"], ["--budget", "9"], ["--context", "9999999"]):
        assert main(["cost", "snapkv", "--model", "workbench-tiny", *arguments]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_devices_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware"]) == 0
    assert "RTX-4090" in capsys.readouterr().out
    assert main(["hardware", "--json"]) == 0
    assert all(device["bandwidth"]["source"] for device in json.loads(capsys.readouterr().out))
