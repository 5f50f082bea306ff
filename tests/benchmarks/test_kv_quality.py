"""The benchmarks' bookkeeping: rows survive a kill, a resumed run leaves out what is there, verdicts follow; of
views in a browser, the first failure is the end, and tables tell what was measured, what was expected and what was not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention_view
from benchmarks.attention_view import VIEWS, amount, cell, comparison, expected_bytes, longest
from benchmarks.claims import Ablation, Claim, claims
from benchmarks.kv_cases import ASKED_FIRST, HELD, TASKS, Spec, build, specs
from benchmarks.kv_evidence import NEAR, Check, Mean, Rows, claim_check, direction_checks, reason, report
from benchmarks.kv_quality import case_of, items, missing
from benchmarks.kv_recipes import NOTES, OWN, entries
from benchmarks.parts import Part, Row, identity, read_parts, settled
from workbench.recipe import Recipe
from workbench.registry import registered


def row(recipe: str, nll: float, case: str = "needle/512/0.5/0", budget: str = "0.25", **others: object) -> Row:
    task = case.split("/", 1)[0]
    found = {
        "model": "small",
        "case": case,
        "task": task,
        "length": 512,
        "depth": 0.5,
        "recipe": recipe,
        "budget": budget,
    }
    return {**found, "share": 0.25, "nll": nll, "kl": nll, "top1": 0.5, "right": float(nll < 0.1), **others}


def rows_of(recipe: str, losses: Iterable[float], budget: str = "0.25", task: str = "needle") -> list[Row]:
    return [row(recipe, nll, f"{task}/512/0.5/{draw}", budget) for draw, nll in enumerate(losses)]


def verdicts(checks: Iterable[Check]) -> dict[str, str]:
    return {check.expected: check.verdict for check in checks}


# -- rows on disk


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    part = Part(tmp_path / "new")
    part.add(row("snapkv", 1.0))
    assert read_parts(tmp_path / "new") == [row("snapkv", 1.0)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    part = Part(tmp_path)
    part.add(row("snapkv", 1.0))
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("a") as torn:
        torn.write('{"case": "needle/512/0.5/1", "reci')
    assert [identity(found) for found in read_parts(tmp_path)] == [identity(row("snapkv", 1.0))]


def test_parts_merge_and_the_later_row_wins(tmp_path: Path) -> None:
    for name, nll in (("1", 1.0), ("2", 2.0)):
        (tmp_path / f"{name}.jsonl").write_text("")
        part = Part(tmp_path)
        part.add(row("snapkv", nll))
        part.add(row("h2o", nll, budget=f"0.{name}"))
    found = {identity(row): row["nll"] for row in read_parts(tmp_path)}
    case = "needle/512/0.5/0"
    assert found == {(case, "snapkv", "0.25"): 2.0, (case, "h2o", "0.1"): 1.0, (case, "h2o", "0.2"): 2.0}


def test_a_failure_never_hides_a_row_and_is_tried_again(tmp_path: Path) -> None:
    part = Part(tmp_path)
    failed = {**row("h2o", 0.0), "error": "RuntimeError: no"}
    for one in (
        row("snapkv", 1.0),
        {**row("snapkv", 0.0), "error": "no"},
        failed,
        {**row("tova", 0.0), "gap": "small"},
    ):
        part.add(one)
    found = read_parts(tmp_path)
    assert [one.get("error") for one in found] == [None, "RuntimeError: no", None]
    assert {recipe for _, recipe, _ in settled(found)} == {"snapkv", "tova"}


# -- work


def test_cases_are_balanced_from_the_beginning_and_never_repeat() -> None:
    found = specs(TASKS, (512, 1024, 2048), 4)
    assert len({spec.key for spec in found}) == len(found)
    assert [spec.length for spec in found] == [
        length for draw in range(4) for length in (512, 1024, 2048) for spec in found
        if (spec.draw, spec.length) == (draw, length)
    ]  # fmt: skip
    assert {spec.task for spec in found[:9]} == set(TASKS) and all(spec.length == 512 for spec in found[:9])
    assert max(spec.length for spec in found if spec.task == HELD) == 1024


def test_a_case_is_the_same_every_time_and_holds_its_answer() -> None:
    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    for spec in specs([task for task in TASKS if task != HELD], (256,), 2):
        case = build(spec, encode)
        assert case == build(spec, encode)
        (answer,) = case.answers
        assert isinstance(case.text, str) and answer in case.text and answer not in case.lead
        assert (case.question is None) == (spec.task == ASKED_FIRST)


def test_the_cases_are_those_of_which_the_committed_figures_were_measured() -> None:
    """Texts, questions, leads and answers of two draws at three lengths, words for tokens; made before tasks were."""
    found = {}
    for spec in specs([task for task in TASKS if task != HELD], (256, 512, 1024), 2):
        case = build(spec, lambda text: [len(word) for word in text.split()])
        found[spec.key] = _digest(json.dumps([case.text, case.question, case.lead, *case.answers]))
    held = [build(Spec(HELD, 40, None, draw), lambda text: list(text.encode())) for draw in range(3)]
    assert [bytes(case.text).decode()[:20] for case in held if isinstance(case.text, tuple)] == [
        "The harbour town of ",
        '"""A small queue of ',
        "Mira: Did you book a",
    ]
    assert _digest(json.dumps(found, sort_keys=True)) == "6d60bb1eaaa829ef"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_items_cover_every_recipe_of_every_case_and_model_once() -> None:
    cases = specs(("needle", ASKED_FIRST), (512,), 1)
    known = entries(["snapkv", "h2o", "kivi", "knorm"])
    work = items(("a", "b"), cases, known, (0.5,), chunk=3)
    assert sorted((item.model, item.spec.key, name) for item in work for name in item.recipes) == sorted(
        (model, spec.key, name)
        for model in ("a", "b") for spec in cases for name, entry in known.items() if spec.task in entry.tasks
    )  # fmt: skip
    assert max(len(item.recipes) for item in work) == 3


def test_resuming_leaves_out_exactly_what_is_settled() -> None:
    known = {name: entry for name, entry in entries(["fireq", "pyramidkv"]).items() if ":" not in name}
    (item, *_) = items(("m",), specs(("needle",), (512,), 1), known, (0.5, 0.25), chunk=10)
    every = missing(item, known, set())
    assert ("full", OWN) in every and ("fireq", OWN) in every
    assert {budget for name, budget in every if name == "pyramidkv"} == {"0.5", "0.25", "0.12"}  # that of its claim too
    done = {(case_of("m", item.spec), "pyramidkv", "0.5"), ("another case", "full", OWN)}
    assert missing(item, known, done) == [pair for pair in every if pair != ("pyramidkv", "0.5")]


def test_ablations_are_measured_where_their_claim_is() -> None:
    entry = entries()["snapkv: at half"]
    assert entry.budgets((0.25, 0.1)) == ["0.5"] and entry.tasks == (ASKED_FIRST,)
    assert {"snapkv", "snapkv: at half", "full"} <= set(entries(["snapkv"]))


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(SystemExit, match="snapvk"):
        entries(["snapvk"])


# -- verdicts


def test_mean_and_standard_error() -> None:
    found = Mean.of([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.value, found.n) == (2.0, 3) and math.isclose(found.error, 1 / math.sqrt(3))
    assert Mean.of([]) is None and str(Mean.of([1.0])) == "+1.000"


def test_differences_are_paired_over_common_cases() -> None:
    rows = Rows([*rows_of("kvzip", [0.0, 1.0, 5.0]), *rows_of("snapkv", [0.5, 1.5])])
    gained = rows.advantage("kvzip", "snapkv", "0.25")
    assert gained is not None and (gained.value, gained.error, gained.n) == (0.5, 0.0, 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([0.1, 0.2, 0.3], [0.9, 1.1, 1.0], "holds"),
        ([0.9, 1.1, 1.0], [0.1, 0.2, 0.3], "does not hold"),
        ([0.0, 1.0, 0.0], [1.0, 0.0, 0.1], "undecided"),
    ],
)
def test_the_better_recipe_is_told_from_chance(ours: list[float], theirs: list[float], verdict: str) -> None:
    rows = Rows([*rows_of("kvzip", ours), *rows_of("snapkv", theirs)])
    assert verdicts(direction_checks(rows))["kvzip loses less than snapkv at 25%"] == verdict


def test_near_lossless_and_its_opposite() -> None:
    good, bad = [0.01, 0.02, 0.0], [1.0, 2.0, 1.5]
    rows = Rows([*rows_of("kivi 4-bit", good, OWN), *rows_of("per-token 2-bit", bad, OWN)])
    found = verdicts(direction_checks(rows))
    assert found[f"kivi 4-bit loses less than {NEAR:g} nats a token"] == "holds"
    assert found[f"per-token 2-bit loses more than {NEAR:g} nats a token"] == "holds"
    swapped = Rows([*rows_of("kivi 4-bit", bad, OWN), *rows_of("per-token 2-bit", good, OWN)])
    found = verdicts(direction_checks(swapped))
    assert found[f"kivi 4-bit loses less than {NEAR:g} nats a token"] == "does not hold"
    assert found[f"per-token 2-bit loses more than {NEAR:g} nats a token"] == "does not hold"


def test_mikv_is_compared_with_eviction_at_small_budgets_only() -> None:
    losses = [0.1, 0.2]
    rows = Rows(
        row for name in ("mikv", "h2o", "snapkv") for budget in ("0.5", "0.25") for row in rows_of(name, losses, budget)
    )
    found = [check.expected for check in direction_checks(rows) if check.expected.startswith("mikv")]
    assert found == ["mikv loses less than h2o at 25%", "mikv loses less than snapkv at 25%"]


def test_a_claim_is_tested_as_its_note_says() -> None:
    rows = Rows([*rows_of("kivi", [0.3, 0.3], OWN), {**row("think", 0.0, budget=OWN), "gap": "the smallest is 0.7"}])
    assert claim_check(rows, Claim("kivi", near=0.5)).verdict == "holds"
    assert claim_check(rows, Claim("kivi", near=0.2)).verdict == "does not hold"
    impossible = claim_check(rows, Claim("think", near=0.1))
    assert (impossible.verdict, impossible.numbers) == ("not possible", "the smallest is 0.7")
    assert claim_check(rows, Claim("h2o", at="0.25", against="snapkv")).verdict == "not measured"


SMALLER = Claim(
    "snapkv", at="0.25", near=0.1, why="its window is too wide", shown_by=("window 8",),
    ablations={"window 8": Ablation.of("snapkv", {"window": 8}), "half": Ablation.of("snapkv", {"at": 0.5})},
)  # fmt: skip


def test_a_reason_is_given_only_where_an_ablation_shows_it() -> None:
    lost = rows_of("snapkv", [1.0, 1.2, 1.1])
    half = rows_of("snapkv: half", [0.5, 0.7, 0.6], "0.5")
    shown = Rows([*lost, *half, *rows_of("snapkv: window 8", [0.1, 0.2, 0.1])])
    assert reason(shown, SMALLER) == "its window is too wide (window 8 +0.133, half +0.600)"
    refuted = Rows([*lost, *half, *rows_of("snapkv: window 8", [1.1, 1.2, 1.0])])
    assert reason(refuted, SMALLER) == "not known (tried: window 8 +1.100, half +0.600)"
    assert reason(Rows(lost), SMALLER) == "not known"


def test_the_report_gives_a_reason_only_where_a_claim_fails() -> None:
    notes = {"snapkv": SMALLER, "h2o": Claim("h2o", at="0.25", near=9.0, elsewhere="")}
    text = report(
        [*rows_of("snapkv", [1.0, 1.2]), *rows_of("h2o", [1.0, 1.2]), *rows_of("snapkv: window 8", [0.1, 0.2])], notes
    )
    assert text.count("too wide") == 1 and "| snapkv | 0.25 | 25.0% |  | 0/2 |" in text
    assert "| snapkv: window 8 | 0.25" not in text  # an ablation stands where it is named
    elsewhere = {"snapkv": Claim("snapkv", at="0.25", near=0.1, elsewhere="these are no images")}
    text = report(rows_of("snapkv", [1.0, 1.2]), elsewhere)
    assert "not judged | these are no images" in text


def test_claims_are_judged_on_the_first_model_only() -> None:
    small, other = rows_of("snapkv", [1.0, 1.2]), [{**one, "model": "other"} for one in rows_of("snapkv", [0.0, 0.0])]
    text = report([*small, *other], {"snapkv": SMALLER})
    assert text.count("## Claims") == 1 and "does not hold" in text.partition("## small")[0]
    assert "## other, at equal bytes" in text


def test_gaps_and_failures_are_reported() -> None:
    rows = [*rows_of("h2o", [1.0]), {**row("think", 0.0), "gap": "no room"}, {**row("tova", 0.0), "error": "broken"}]
    text = report(rows, {})
    assert "think at 0.25: no room" in text and "tova at 0.25, needle/512/0.5/0: broken" in text


def test_every_method_has_a_claim_that_can_be_read() -> None:
    notes, known = claims(NOTES), entries()
    assert set(notes) == {cls.key for cls in registered("kv")} - {"full"}
    for key, claim in notes.items():
        assert set(claim.tasks) <= set(TASKS), key
        assert {claim.against or "full", claim.judged} <= set(known), key
        assert claim.against != "streaming-llm", key  # no method claims no more than to beat a window


def test_a_claim_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    def refused(text: str) -> str:
        file = tmp_path / "notes.toml"
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            claims(file)
        return str(error.value)

    assert "near a figure or against" in refused("[h2o]\nat = 0.1")
    assert "names the ablations" in refused('[h2o]\nnear = 0.1\nwhy = "of course"')
    assert "no ablation is called x" in refused('[h2o]\nnear = 0.1\nwhy = "of course"\nshown_by = ["x"]')
    assert "unknown becuase" in refused('[h2o]\nnear = 0.1\nbecuase = "of course"')


def test_an_ablation_may_be_a_recipe_of_several_methods() -> None:
    found = Ablation.of("adakv", {"recipe": [{"method": "kvzip", "heads": "equal"}, "adakv"], "at": 0.25})
    assert found.at == "0.25"
    assert [item.key for item in found.recipe.methods] == ["kvzip", "adakv"]
    assert Ablation.of("snapkv", {"window": 8}).recipe == Recipe.of("snapkv", window=8)


# -- attention views in a browser


def pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, maker: str, size: float, paints: int
) -> list[dict[str, Any]]:
    """What is found for a view whose page at 64 tokens has `size` bytes, and that paints up to `paints` tokens."""
    (view,) = (view for view in VIEWS if view.maker == maker)

    def make(view: Any, tokens: int, *paths: Path) -> dict[str, Any]:
        grown = size * (tokens / 64) ** 2 if view.package else size
        return {"compute_s": 0.1, "write_s": 0.2, "page_bytes": int(grown), "tokens": tokens}

    def first_paint(playwright: Any, page: Path, expects: tuple[str, int], *rest: Any) -> dict[str, Any]:
        tokens = round(math.sqrt(expects[1] / attention_view.HEADS)) if expects[0] == "line" else 0
        return {"script_bytes": 1000} | ({"paint_s": 1.5} if tokens <= paints else {"failed": "not painted in 60 s"})

    monkeypatch.setattr(attention_view, "make", make)
    monkeypatch.setattr(attention_view, "first_paint", first_paint)
    recordings = {False: tmp_path, True: tmp_path}
    return attention_view.measure(view, (64, 128, 256, 512), recordings, tmp_path, tmp_path, None)


def test_after_a_view_failed_only_the_size_of_longer_pages_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = pages(monkeypatch, tmp_path, "bertviz.head_view", 1e6, paints=128)
    assert [cell(one) for one in found] == [
        "1.0 MB, 1.50 s",
        "4.0 MB, 1.50 s",
        "16 MB, not painted in 60 s",
        "about 64 MB, failed at 256",
    ]
    assert longest(found) == "128"


def test_a_page_beyond_the_limit_is_never_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = pages(monkeypatch, tmp_path, "bertviz.head_view", 100e6, paints=10_000)
    assert [cell(one) for one in found][-2:] == ["1.6 GB, 1.50 s", "about 6.4 GB, over 2 GB"]
    assert "page_bytes" not in found[-1]


def test_a_view_that_never_failed_may_take_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = pages(monkeypatch, tmp_path, "heatmap", 40_000, paints=0)
    assert longest(found) == "512 or more" and {cell(one) for one in found} == {"41 kB, 1.50 s"}


def test_a_peer_that_is_not_installed_is_named_in_the_table() -> None:
    table = comparison({"heatmap": [{"tokens": 64, "page_bytes": 5000, "paint_s": 0.25}]}, (64,))
    assert {len(row) for row in table} == {4}
    rows = {tuple(row[:2]): row[2:] for row in table}
    assert rows["bertviz head_view", "bertviz is not installed"] == ["", ""]
    assert ["5 kB, 0.25 s", "64 or more"] in rows.values()


def test_sizes_are_told_in_decimal_units_and_grow_with_the_square() -> None:
    assert [amount(size) for size in (5e4, 1.25e6, 4.27e7, 3.2e9)] == ["50 kB", "1.2 MB", "43 MB", "3.2 GB"]
    one, two = {"tokens": 128, "page_bytes": 1e6}, {"tokens": 256, "page_bytes": 2.5e6}
    assert expected_bytes([one], 512) == 16e6
    assert expected_bytes([one, two], 512) == 8.5e6  # half a megabyte of scripts in each


def test_a_shorter_prompt_is_a_prefix_of_the_recording(tmp_path: Path) -> None:
    import torch

    from benchmarks.attention_pages import exact_attention, load

    recording = {
        "queries": torch.randn(2, 4, 9, 8),
        "keys": torch.randn(2, 2, 9, 8),
        "scale": 0.3,
        "tokens": [*"abcdefghi"],
    }
    torch.save(recording, tmp_path / "read.pt")
    short = load(tmp_path / "read.pt", 5)
    assert short["tokens"] == [*"abcde"]
    whole = exact_attention(recording, every=True)
    torch.testing.assert_close(exact_attention(short, every=True), whole[..., :5, :5])
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, 9))
