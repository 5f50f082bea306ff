"""The benchmark of weight quality: its entries exist, its checks follow the figures, and those are the model's own."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from benchmarks.claims import Ablation, Claim, claims
from benchmarks.parts import Row
from benchmarks.weight_quality import CLAIMS, ENTRIES, OWN, Bench, held, judged, name_of, recipes, report, share, wanted
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.recipe import Recipe
from workbench.registry import registered
from workbench.weights import RTN, compressed


def row(recipe: str, **figures: object) -> Row:
    return {"case": "a model", "recipe": recipe, "budget": OWN, "ppl": 10.0, "kl": 0.1, "top1": 0.9, **figures}


def test_every_entry_changes_weights_and_is_named_once() -> None:
    assert len({name_of(entry) for entry in ENTRIES}) == len(ENTRIES)
    for recipe in recipes().values():
        assert {method.family for method in recipe.methods} == {"weights"}


def test_every_method_but_baselines_has_a_claim_about_rows_that_are_measured() -> None:
    notes, known = claims(CLAIMS), recipes()
    claiming = {cls.key for cls in registered("weights") if cls.fidelity and cls.fidelity.standing != "baseline"}
    assert {key.split(maxsplit=1)[0] for key in notes} >= claiming
    for key, claim in notes.items():
        assert claim.judged in known and claim.against in {*known, ""}, key


def test_entries_are_chosen_by_method_or_by_name_and_others_are_refused() -> None:
    assert wanted(["gptq bits=4"]) == {"gptq bits=4": Recipe.of("gptq", bits=4)}
    assert all({method.key for method in recipe.methods} & {"rtn", "awq"} for recipe in wanted(["rtn", "awq"]).values())
    with pytest.raises(SystemExit, match="gtpq"):
        wanted(["gtpq"])


@pytest.mark.parametrize(("better", "want"), [(0.1, "holds"), (0.2, "holds"), (0.3, "does not hold")])
def test_a_claim_holds_where_the_divergence_is_no_larger(better: float, want: str) -> None:
    rows = {"gptq bits=4": row("gptq bits=4", kl=better), "rtn bits=4": row("rtn bits=4", kl=0.2)}
    claim = Claim("gptq bits=4", against="rtn bits=4")
    assert judged(claim, rows)[:3] == ["gptq bits=4 ≤ rtn bits=4", f"{better:g} and 0.2", want]
    assert judged(Claim("gptq bits=4", near=0.2), rows)[2] == want
    assert judged(Claim("awq bits=4", against="rtn bits=4"), rows)[2] == "not measured"
    assert judged(Claim("gptq bits=4", elsewhere="it is one of speed"), rows)[2:] == [
        "not judged",
        "it is one of speed",
    ]


def test_a_reason_is_given_only_where_an_ablation_diverges_less() -> None:
    claim = Claim(
        "gptq bits=2", against="rtn bits=2", why="its range is that of the group", shown_by=("range search",),
        ablations={"range search": Ablation.of("gptq bits=2", {"bits": 2})},
    )  # fmt: skip
    rows = {"gptq bits=2": row("gptq bits=2", kl=3.0), "rtn bits=2": row("rtn bits=2", kl=2.0)}
    assert judged(claim, rows)[3] == "not known"
    better = rows | {"gptq bits=2: range search": row("", kl=1.0)}
    assert judged(claim, better)[3] == "its range is that of the group (range search 1)"
    worse = rows | {"gptq bits=2: range search": row("", kl=4.0)}
    assert judged(claim, worse)[3] == "not known (tried: range search 4)"


def test_the_report_shows_sizes_verdicts_and_what_failed() -> None:
    text = report(
        [
            row("full"),
            row("gptq bits=4", held=275, full=1000, output=0.1, block=0.2, seconds=3.0),
            row("rtn bits=4", held=275, full=1000, output=0.05, block=0.2, seconds=1.0, kl=0.05),
            {"case": "a model", "recipe": "svd budget=0.8", "budget": OWN, "gap": "no room"},
        ],
        {"gptq bits=4": Claim("gptq bits=4", against="rtn bits=4")},
    )
    assert "| gptq bits=4 | 27.5% | 4.40 | 10.00 | 0.1000 | 90.0% | 0.10000 |  | 0.20000 | 3 |" in text
    assert "| gptq bits=4 ≤ rtn bits=4 | 0.1 and 0.05 | does not hold | not known |" in text
    assert "- svd budget=0.8: no room" in text


def test_errors_are_those_of_what_is_held() -> None:
    session = wb.Session((tiny("llama"), None))
    session.calibrate("sampled", samples=4, tokens=32)
    bench = Bench("tiny", session, torch.arange(3, 67).view(2, 32))
    assert bench.plain()["ppl"] > 1 and abs(bench.plain()["kl"]) < 1e-4
    found = bench.row("rtn bits=4", Recipe.of("rtn", bits=4))
    twin = compressed(session.model, [RTN()])
    survey = RTN().survey(session.model)
    errors = []
    for _, inputs in session.calibrate().inputs(hessians=True):
        for name, seen in inputs.items():
            weight = session.model.get_submodule(name).weight
            errors.append(share(seen.output_error, twin.get_submodule(name).dequantised() - weight, weight))
    assert found["output"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    layers = [twin.get_submodule(name) for name in survey.linears]
    assert found["held"] == held(survey.linears, session.model, twin) == sum(tensor_bytes(x.buffers()) for x in layers)
    assert 0 < found["block"] < 1 and found["kl"] > 0
    both = bench.row("both", Recipe.of([wb.method("wanda", budget=0.5625), wb.method("rtn", bits=4)]))
    assert both["held"] < found["full"] / 2 and both["kl"] > 0
    narrow = bench.row("narrow", Recipe.of("cfsp", budget=0.9))
    assert 0.8 * narrow["full"] < narrow["held"] <= 0.9 * narrow["full"]  # whole weights, at two bytes a number
