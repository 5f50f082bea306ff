"""The benchmark of weight quality: its entries exist, its checks follow the figures, and those are the model's own."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from benchmarks.parts import Row
from benchmarks.weight_quality import CHECKS, ENTRIES, OWN, Bench, Check, held, name_of, report, share, verdict, wanted
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights import RTN, compressed


def row(recipe: str, **figures: object) -> Row:
    return {"case": "a model", "recipe": recipe, "budget": OWN, "ppl": 10.0, "kl": 0.1, "top1": 0.9, **figures}


def test_every_entry_is_a_weight_method_with_these_settings_and_named_once() -> None:
    for key, settings in ENTRIES:
        assert wb.method(key, **settings).family == "weights"
    names = [name_of(*entry) for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert {name for check in CHECKS for name in (check.better, check.worse)} <= set(names)


def test_entries_are_chosen_by_method_or_by_name_and_others_are_refused() -> None:
    assert wanted(["gptq bits=4"]) == [("gptq", {"bits": 4})]
    assert {key for key, _ in wanted(["rtn", "awq"])} == {"rtn", "awq"}
    with pytest.raises(SystemExit, match="gtpq"):
        wanted(["gtpq"])


@pytest.mark.parametrize(("better", "want"), [(0.1, "holds"), (0.2, "holds"), (0.3, "does not hold")])
def test_a_check_holds_where_the_figure_is_no_larger(better: float, want: str) -> None:
    rows = {"gptq bits=4": row("gptq bits=4", output=better), "rtn bits=4": row("rtn bits=4", output=0.2)}
    assert verdict(Check("gptq bits=4", "rtn bits=4", "output"), rows) == (want, f"{better:g} and 0.2")
    assert verdict(Check("gptq bits=4", "rtn bits=4", "block"), rows)[0] == "not measured"


def test_the_report_shows_sizes_verdicts_and_what_failed() -> None:
    text = report(
        [
            row("full"),
            row("gptq bits=4", held=275, full=1000, output=0.1, block=0.2, seconds=3.0),
            row("rtn bits=4", held=275, full=1000, output=0.05, block=0.2, seconds=1.0),
            {"case": "a model", "recipe": "svd budget=0.8", "budget": OWN, "gap": "no room"},
        ]
    )
    assert "| gptq bits=4 | 27.5% | 4.40 | 10.00 | 0.1000 | 90.0% | 0.10000 |  | 0.20000 | 3 |" in text
    assert "| gptq bits=4 ≤ rtn bits=4 | output | does not hold | 0.1 and 0.05 |" in text
    assert "- svd budget=0.8: no room" in text


def test_errors_are_those_of_what_is_held() -> None:
    session = wb.Session((tiny("llama"), None))
    session.calibrate("sampled", samples=4, tokens=32)
    bench = Bench("tiny", session, torch.arange(3, 67).view(2, 32))
    assert bench.plain()["ppl"] > 1 and abs(bench.plain()["kl"]) < 1e-4
    found = bench.row("rtn", {"bits": 4})
    twin = compressed(session.model, [RTN()])
    survey = RTN().survey(session.model)
    errors = []
    for _, inputs in session.calibrate().inputs(hessians=True):
        for name, seen in inputs.items():
            weight = session.model.get_submodule(name).weight
            errors.append(share(seen.output_error, twin.get_submodule(name).dequantised() - weight, weight))
    assert found["output"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    layers = [twin.get_submodule(name) for name in survey.linears]
    assert found["held"] == held(survey, session.model, twin) == sum(tensor_bytes(x.buffers()) for x in layers)
    assert 0 < found["block"] < 1 and found["kl"] > 0
    assert "error" in bench.row("rtn", {"bits": 5})
