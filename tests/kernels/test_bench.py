"""What writes down GPU measurements, as far as it needs no GPU: limits, records of runs cut short, tables, plots, and
the bookkeeping of the baselines' bytes. The committed page must show the committed results.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from bench import baselines, promises, table, weights
from bench.__main__ import main, measure, names
from bench.measure import Ceilings, TimeUp, relative_error, shares, time_limit
from torch.nn.functional import scaled_dot_product_attention

CEILINGS = Ceilings(copy=4e12, matmul=8e14, launch_us=2.0)
WHERE = {
    "device": "NVIDIA H200", "driver": "580", "torch": "2.11", "triton": "3.6", "transformers": "5.17",
    "date": "2026-11-24", "command": "python -m bench some", "load_before": 0,
}  # fmt: skip


def result(rows: list[dict[str, Any]], stopped: str | None = None) -> dict[str, Any]:
    return {"environment": WHERE, "ceilings": CEILINGS.to_dict(), "stopped": stopped, "rows": rows}


# -- limits and errors


def test_the_limit_is_the_slower_of_moving_and_computing() -> None:
    assert CEILINGS.limit_us(4e6) == pytest.approx(1.0)
    assert CEILINGS.limit_us(4e6, 8e8) == pytest.approx(1.0)  # where the two meet: 200 operations a byte
    assert CEILINGS.limit_us(4e6, 16e8) == pytest.approx(2.0)


def test_a_row_gets_its_rates_and_its_share_of_the_limit() -> None:
    row = shares({"what": "copy", "us": 2.0, "bytes": 4_000_000}, CEILINGS)
    assert row["GB/s"] == pytest.approx(2000) and row["limit"] == pytest.approx(0.5) and "TFLOP/s" not in row
    row = shares({"what": "product", "us": 4.0, "bytes": 4_000_000, "flops": 16e8}, CEILINGS)
    assert row["TFLOP/s"] == pytest.approx(400) and row["limit"] == pytest.approx(0.5)
    for incomplete in ({"what": "x", "failed": "no"}, {"what": "x", "us": 3.0}, {"what": "x", "bytes": 5}):
        assert shares(incomplete, CEILINGS) == incomplete


def test_an_error_is_relative_to_the_norm_and_infinite_for_what_was_never_written() -> None:
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan]), wanted) == math.inf
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(3), wanted)


def test_time_runs_out_also_where_failures_are_caught() -> None:
    def caught() -> None:
        for _ in range(1000):
            try:
                time.sleep(0.01)
            except Exception:  # noqa: BLE001 (what a kernel raises may be anything)
                continue

    with pytest.raises(TimeUp), time_limit(0.05):
        caught()
    with time_limit(None):
        time.sleep(0.1)


# -- records


def test_every_row_is_on_disk_before_the_next_is_measured(tmp_path: Path) -> None:
    def produce() -> Iterator[dict[str, Any]]:
        yield {"what": "first", "us": 2.0, "bytes": 4_000_000}
        held = json.loads((tmp_path / "some.json").read_text())
        assert held["stopped"] == "still running" and [row["limit"] for row in held["rows"]] == [pytest.approx(0.5)]
        yield {"what": "second", "failed": "RuntimeError: no"}

    assert measure("some", produce, WHERE, CEILINGS, folder=tmp_path) is None
    held = json.loads((tmp_path / "some.json").read_text())
    assert held["environment"] == WHERE and held["ceilings"]["copy"] == 4e12 and held["stopped"] is None
    assert [row["what"] for row in held["rows"]] == ["first", "second"]
    assert "RuntimeError: no" in (tmp_path / "some.md").read_text()


@pytest.mark.parametrize("ending", ["time", "error"])
def test_a_run_cut_short_keeps_what_it_measured_and_says_so(tmp_path: Path, ending: str) -> None:
    def produce() -> Iterator[dict[str, Any]]:
        yield {"what": "first", "us": 2.0, "bytes": 4_000_000}
        if ending == "error":
            raise RuntimeError("the device is gone")
        time.sleep(10)
        yield {"what": "never"}

    stopped = measure("some", produce, WHERE, CEILINGS, seconds=0.2, folder=tmp_path)
    assert stopped and ("stopped after" in stopped if ending == "time" else "the device is gone" in stopped)
    held = json.loads((tmp_path / "some.json").read_text())
    assert [row["what"] for row in held["rows"]] == ["first"] and held["stopped"] == stopped
    assert f"Not complete: {stopped}" in (tmp_path / "some.md").read_text()


def test_a_run_without_rows_leaves_earlier_results(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text("earlier")
    measure("some", list, WHERE, CEILINGS, folder=tmp_path)
    assert (tmp_path / "some.json").read_text() == "earlier"


def test_unknown_names_are_refused_and_a_machine_without_a_gpu_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "baselines" in names() and "measure" not in names()
    with pytest.raises(SystemExit) as refused:
        main(["no-such"])
    assert refused.value.code == 2 and "no such module: no-such" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["baselines"]) == 2 and "CUDA" in capsys.readouterr().err


# -- tables and plots


def test_a_table_shows_cases_first_then_figures_and_no_empty_column() -> None:
    rows = [
        {"what": "a|b", "us": 1234.5, "n": 8192, "bytes": 33_554_432, "limit": 0.5},
        {"what": "c", "shape": [8, 128], "n": 8192, "failed": "ValueError: <no>"},
    ]
    head, first, second = table.cells(rows)
    assert head == ["what", "n", "shape", "µs", "MB", "of the limit", "instead of a figure"]
    assert first == ["a\\|b", "8,192", "", "1,234.5", "33.6", "50%", ""]
    assert second == ["c", "8,192", "8 × 128", "", "", "", "ValueError: &lt;no>"]


def test_checks_and_sweeps_have_tables_of_their_own_and_no_part_in_plots() -> None:
    rows = [
        {"what": "kernel", "way": "tiles", "us": 2.0, "error": 1e-3, "limit": 0.5},
        {"what": "kernel", "way": "scratch", "us": 4.0, "limit": 0.25},
        {"what": "kernel", "n": 509, "error": 2e-3},
        {"what": "sweep: kernel", "us": 1.0, "limit": 0.9},
        {"what": "kernel", "way": "plain", "failed": "RuntimeError: no"},
    ]
    assert table.bars(rows) == ("", [("kernel, tiles", 0.5), ("kernel, scratch", 0.25)])
    times, errors, sweeps = table.markdown_of(result(rows)).split("<details>")
    assert "tiles" in times and "RuntimeError: no" in times and "509" not in times and "sweep" not in times
    assert "| 2.0e-03 |" in errors and "Checks against references" in errors
    assert "sweep: kernel" in sweeps and "NVIDIA H200, driver 580" in sweeps


def over_lengths() -> list[dict[str, Any]]:
    rows = [
        {"what": what, "batch": batch, "n": n, "us": us * batch * n / 1000, "bytes": batch * n * 4096}
        for batch in (1, 8)
        for n in (8192, 32768, 131072)
        for what, us in (("fast", 2.0), ("slow", 8.0))
    ]
    return [*(shares(row, CEILINGS) for row in rows), {"what": "broken", "batch": 8, "n": 131072, "failed": "no"}]


def test_bars_show_the_last_of_the_settings_measured_most() -> None:
    found = table.bars(over_lengths())
    assert found is not None
    title, shown = found
    assert title == "batch 8, n 131,072" and [what for what, _ in shown] == ["fast", "slow"]
    assert shown[0][1] == pytest.approx(4 * shown[1][1]) == pytest.approx(0.512)


def test_lines_join_the_lengths_of_one_setting() -> None:
    found = table.lines(over_lengths())
    assert found is not None
    title, shown = found
    assert title == "batch 1"
    assert shown["fast"] == [(n, pytest.approx(2 * n / 1000)) for n in (8192, 32768, 131072)]
    assert table.lines(over_lengths()[:2]) is None


def test_plots_are_drawings_with_one_mark_for_each_thing_measured() -> None:
    text, plots = table.rendered({"some": result(over_lengths(), stopped="stopped after 3 s")})
    assert set(plots) == {"kernels-some.svg", "kernels-some-time.svg"}
    assert all(f"(images/{name})" in text for name in plots) and "Not complete: stopped after 3 s." in text
    space = "{http://www.w3.org/2000/svg}"
    bars = ET.fromstring(plots["kernels-some.svg"]).findall(f"{space}rect")
    widths = [float(bar.attrib["width"]) for bar in bars if bar.attrib["width"] != "100%"]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    lines = ET.fromstring(plots["kernels-some-time.svg"]).findall(f"{space}polyline")
    assert len(lines) == 3  # fast, slow and the limit
    heights = [[float(spot.split(",")[1]) for spot in line.attrib["points"].split()] for line in lines]
    assert all(height == sorted(height, reverse=True) for height in heights)  # longer takes longer: higher up
    assert heights[2][0] > heights[0][0] > heights[1][0]  # the limit below both


def test_the_page_shows_the_committed_results() -> None:
    assert table.main(["--check"]) == 0


def test_only_what_stands_between_the_markers_changes() -> None:
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter"
    assert table.updated(page, "new") == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter"
    assert table.updated(table.updated(page, "new"), "new") == table.updated(page, "new")


# -- baselines


def test_the_exact_attention_is_softmax_attention_with_grouped_heads() -> None:
    query, keys, values = torch.randn(2, 32, 1, 128), torch.randn(2, 8, 20, 128), torch.randn(2, 8, 20, 128)
    wanted = scaled_dot_product_attention(query.double(), keys.double(), values.double(), enable_gqa=True)
    assert relative_error(baselines.exact_attention(query, keys, values), wanted) < 1e-12
    rows = baselines._backend("flash", True, query, keys, values)  # 4 query heads as rows of one: the same numbers
    grouped = scaled_dot_product_attention(query.view(2, 8, 4, 128), keys, values).view(query.shape)
    assert relative_error(grouped, wanted) < 1e-5 and callable(rows)


def test_quantised_caches_count_codes_scales_and_zeros() -> None:
    full = 2 * 8 * 1024 * 128 * 2
    assert baselines.packed_bytes(1, 1024, 4, 64) == full // 4 + full // 2 // 64 * 4
    parts = baselines.kivi_bytes(1, 1024, 2)
    assert parts["step"] == baselines.packed_bytes(1, 1024, 2, 32)
    assert parts["keys"] == parts["values"] == parts["step"] // 2 + 2 * 32 * 1024


@pytest.mark.parametrize("bits", [2, 4])
def test_kivis_products_are_checked_against_the_codes_one_by_one(bits: int) -> None:
    torch.manual_seed(0)
    outputs, inputs, group = 64, 5, baselines.KIVI_GROUP
    codes = torch.randint(0, 2**bits, (8, outputs, inputs))
    scales, zeros = torch.rand(8, outputs // group, inputs), torch.rand(8, outputs // group, inputs)
    packed = torch.zeros(8, outputs * bits // 32, inputs, dtype=torch.int64)
    for output in range(outputs):  # the first of each word in its lowest bits
        packed[:, output * bits // 32] |= codes[:, output] << bits * (output % (32 // bits))
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    given = torch.randn(32, 1, inputs)
    got = baselines._dequantised_product(given, (packed, scales, zeros), bits)
    for head in range(32):
        for output in range(outputs):
            at = head // 4, output // group
            weights = codes[head // 4, output] * scales[at] + zeros[at]
            assert float(got[head, 0, output]) == pytest.approx(float(given[head, 0] @ weights), abs=1e-5)


def test_what_cannot_be_measured_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise RuntimeError("no kernel\nand a long explanation")

    monkeypatch.delenv("WORKBENCH_KIVI", raising=False)
    assert [row["failed"] for row in baselines._kivi(1, 8192)] == ["WORKBENCH_KIVI names no built extension"]
    row = baselines._measured("x", 1, 8192, 5, refuse)
    assert row == {"what": "x", "batch": 1, "n": 8192, "bytes": 5, "failed": "RuntimeError: no kernel"}


# -- promises


def test_promises_find_the_worst_of_their_figures_and_say_whether_they_hold() -> None:
    case = {"heads": promises.LLAMA, "n": promises.LONGEST, "batch": promises.MOST}
    results = {
        "decode": result([
            {"what": "full cache, fastest SDPA", **case, "kept": 1.0, "us": 1000.0},
            {"what": "dense", **case, "kept": 1.0, "us": 1100.0, "limit": 0.93},
            {"what": "ragged", **case, "kept": 0.25, "us": 200.0, "limit": 0.8},
            {"what": "ragged", **case, "n": 8192, "kept": 0.25, "us": 1.0, "limit": 0.1},
            {"what": "dense", "error": 1e-3}, {"what": "ragged", "error": 6e-3},
        ]),
        "decode_bitmap": result([{"what": "bitmap, 70% pruned", **case, "us": 550.0}]),
        "baselines": result([{"what": "SDPA flash", "batch": 8, "n": promises.LONGEST, "us": 900.0}]),
    }  # fmt: skip
    lines = {line[0]: line[1:] for line in promises.table(results)}
    assert lines["dense, of copy bandwidth"] == ["≥ 90%", "93%", "yes"]
    assert lines["ragged, 25 % kept, of copy bandwidth"] == ["≥ 90%", "80%", "**no**"]
    assert lines["error of dense and ragged"] == ["≤ 5.0e-03", "6.0e-03", "**no**"]
    assert lines["bitmap, 70 % pruned, times as fast as dense"] == ["≥ 1.6", "2", "yes"]
    assert lines["ragged, 25 % kept, times as fast as the fastest full cache"] == ["≥ 3.5", "4.5", "yes"]
    assert "4 bit, of copy bandwidth" not in lines  # nothing was measured


def test_promises_stand_apart_for_each_device() -> None:
    """The slower of two devices' figures is not the other's."""
    row = {"what": "full", "n": promises.LONGEST, "us": 9.0, "tokens/s": 100.0}
    one = {"end_to_end": result([{**row, "limit": 0.9}]), "end_to_end_b": result([{**row, "limit": 0.6}])}
    one["end_to_end"]["environment"] = {**WHERE, "device": "A"}
    one["end_to_end_b"]["environment"] = {**WHERE, "device": "B"}
    page, _ = table.rendered(one)
    first, second = page.split("## What must hold, on ")[1:3]
    assert first.startswith("A") and "90%" in first and "60%" not in first
    assert second.startswith("B") and "60%" in second.split("\n## ")[0] and "**no**" in second


# -- weights


def test_small_layers_are_measured_beside_the_plain_one_and_what_is_missing_is_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "DEVICE", "cpu")
    monkeypatch.setattr(weights, "KIND", torch.float32)
    monkeypatch.setattr(weights, "SHAPES", ((48, 256),))
    monkeypatch.setattr(weights, "run_poisoned", lambda work: work())
    monkeypatch.setattr(weights, "peak_bytes", lambda work: 0)
    monkeypatch.setattr(weights, "time_us", lambda work, **options: 2.0 if work() is not None else 0.0)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    monkeypatch.setattr(weights, "LIBRARIES", {("sparse, 2:4", "torch"): lambda *shape: 1 / 0})
    rows = list(weights.rows(quick=False))
    assert len(rows) == 3 * (len(weights.OURS) + len(weights.GEMLITE)) + 1
    ours = [row for row in rows if row["way"] in ("torch", "ours", "tiles") and "us" in row]
    assert len(ours) == 3 * len(weights.OURS) and all(row["speedup"] == 1.0 for row in ours)
    for row in ours:  # 16-bit scales of the packed ones are exact in float32; integers round their inputs
        assert row["error"] < (0.02 if row["what"].startswith("integers") else 1e-5), row
    held = {row["what"]: row["bytes"] - 4 * row["n"] * (48 + 256) for row in ours if row["n"] == 512}
    assert held["nn.Linear"] == 4 * 48 * 256 and held["sparse, 2:4"] == 2 * 48 * 128 + 48 * 256 // 8
    assert held["packed 4 bit, group 64"] == 48 * 256 // 2 + 4 * 48 * 256 // 64
    failed = [row["failed"] for row in rows if "failed" in row]
    assert failed == ["ZeroDivisionError: division by zero"] + ["not installed: gemlite"] * 9


def test_a_capture_that_failed_is_not_tried_again_nor_are_equal_failures_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def time_us(work: Any, *, graph: bool = True, **options: Any) -> float:
        asked.append(graph)
        if graph:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1.0

    def work(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1 and what == "few":
            raise ValueError("one token at most")
        return x

    monkeypatch.setattr(weights, "DEVICE", "cpu")
    monkeypatch.setattr(weights, "run_poisoned", lambda work: work())
    monkeypatch.setattr(weights, "peak_bytes", lambda work: 0)
    monkeypatch.setattr(weights, "time_us", time_us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for what, wanted in (("many", [1, 16, 512]), ("few", [1, "16, 512"])):
        asked.clear()
        rows = list(weights.measured(what, "ours", lambda *shape: weights.Candidate(work, 0), 8, 8, {}))
        assert [row["n"] for row in rows] == wanted and asked[:2] == [True, False] and not any(asked[1:])
        assert all(row["launched"] == "one by one" for row in rows if "us" in row)
    assert rows[-1]["failed"] == "ValueError: one token at most"


def test_random_weights_are_drawn_in_the_form_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "DEVICE", "cpu")
    codes, scale, zero = weights.grid(4, 64, 16, 128)
    assert int(codes.max()) < 16 and scale.shape == zero.shape == (16, 2)
    kept = weights.two_of_four(torch.randn(8, 64))
    assert bool((kept.unflatten(1, (-1, 4)).sum(dim=-1) == 2).all())
