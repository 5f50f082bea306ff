"""What a prompt of Python shows of a result is one short line, however large its tensors are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.formatting import Brief, readable_bytes, readable_share, times_smaller

TEXT = "The access code of the harbour is 51884. Shortly before noon, the miller counted the apples in the cellar. " * 4

# name -> (how to get it, how its line begins)
RESULTS: dict[str, tuple[Callable[[wb.Session, Any], Any], str]] = {
    "session": (lambda s, run: s, "<Session workbench-tiny: "),
    "prompt": (lambda s, run: s.trace.prompt, "Prompt(ids=int64 ["),
    "trace": (lambda s, run: s.trace, "<Trace of "),
    "layer": (lambda s, run: s.trace.layers[0], "LayerTrace(index=0, keys_held="),
    "plan": (lambda s, run: run.plan, "<Plan of snapkv 0.5 for "),
    "run": (lambda s, run: run, "<Run of snapkv 0.5: "),
    "verdict": (lambda s, run: run.verdict, "Evaluation(figures="),
    "memory": (lambda s, run: run.memory, "<Timeline of "),
    "contents": (lambda s, run: run.plan.stores()[0].contents(torch.float32), "Dequantised(keys="),
    "map": (lambda s, run: s.attention(layer=1, head=1, pixels=16), "PooledMap(values=float32 [16, 16], "),
    "grid": (lambda s, run: s.attention_grid(pixels=8), "GridOfMaps(values=float32 [8, 8, 8, 8], "),
    "operator": (lambda s, run: s.operator("soft", layer=1, head=1, pixels=8), "Study(operator=SOFT"),
    "spectra": (lambda s, run: s.spectra(), "Spectra(spectra=(Spectrum(name="),
}


@pytest.fixture(scope="module")
def run(tiny_session: wb.Session) -> wb.Run:
    tiny_session.read(TEXT)
    return tiny_session.run("snapkv", budget=0.5, max_new_tokens=4)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_one_short_line(tiny_session: wb.Session, run: wb.Run, name: str) -> None:
    get, begins = RESULTS[name]
    line = repr(get(tiny_session, run))
    assert line.startswith(begins), line
    assert "\n" not in line and len(line) < 500, line


def test_a_recording_that_was_not_kept_says_so(tiny_session: wb.Session) -> None:
    session = wb.Session((tiny_session.model, tiny_session.tokenizer))
    session.read(TEXT, record=False)
    assert repr(session.trace).endswith("nothing recorded>")


def test_fields_that_are_not_for_show_are_left_out() -> None:
    @dataclass(repr=False)
    class Held(Brief):
        rows: torch.Tensor
        names: tuple[str, ...]
        secret: int = field(default=0, repr=False)

    held = Held(torch.zeros(2, 3, dtype=torch.bfloat16), tuple("abcdef"))
    assert repr(held) == "Held(rows=bfloat16 [2, 3], names=('a', 'b', 'c', ...))"


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1023, "0.999 KiB"), (1000 * 2**10, "0.977 MiB"),
        (11.3 * 2**20, "11.3 MiB"), (1010 * 2**20, "0.99 GiB"), (12.5 * 2**30, "12.5 GiB"),
    ],
)  # fmt: skip
def test_bytes_have_three_digits_and_no_exponent(nbytes: float, said: str) -> None:
    assert readable_bytes(nbytes) == said


def test_a_small_share_is_not_told_as_nothing() -> None:
    assert [readable_share(x) for x in (0, 0.002, 0.0051, 0.254, 1)] == ["0%", "under 1%", "1%", "25%", "100%"]


def test_what_is_not_smaller_says_so() -> None:
    told = [times_smaller(100, now) for now in (25, 100, 200)]
    assert told == ["4 times smaller", "as large as before", "2 times larger"]
