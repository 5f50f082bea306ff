"""workbench-tiny: it ships with the package, was never quantised, and does what its card says."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import workbench as wb
from workbench.examples import needle
from workbench.models import cached, catalogue, fetch

FOLDER = Path(wb.__file__).parent / "models" / "workbench_tiny"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The evaluation that was written when the model was trained."""
    found: dict[str, Any] = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def tokens(session: wb.Session, text: str) -> int:
    assert session.tokenizer is not None
    return len(session.tokenizer(text)["input_ids"])


def test_the_weights_are_bfloat16_tied_and_under_25_megabytes() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 25e6
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors


def test_no_weight_lies_on_a_grid_that_quantising_would_have_left() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            weight = file.get_tensor(name)
            if weight.ndim == 2:
                for group in weight[:4, :128].reshape(-1, 128):  # at 4 bits there would be at most 16 values
                    assert len(group.unique()) > 90, name


def test_it_is_in_the_catalogue_and_always_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "nothing"))
    (entry,) = [entry for entry in catalogue() if entry.name == "workbench-tiny"]
    assert cached("workbench-tiny") == fetch("workbench-tiny") == FOLDER
    assert entry.download_bytes == 0 and not (tmp_path / "nothing").exists()


def test_it_is_what_the_catalogue_says(tiny_session: wb.Session) -> None:
    (entry,) = [entry for entry in catalogue() if entry.name == "workbench-tiny"]
    facts = tiny_session.facts
    assert (facts.parameters, facts.max_positions) == (entry.parameters, entry.positions)
    assert 8e6 < facts.parameters < 12e6 and facts.checkpoint_dtype == torch.bfloat16
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim) == (8, 8, 4, 32)


def test_it_loads_and_answers_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    session = wb.Session("workbench-tiny")
    session.read("The gardener sang. The secret number of the chapel is 90417. The miller slept.")
    run = session.run("full", question="What is the secret number of the chapel?", max_new_tokens=24)
    assert run.text == "The secret number of the chapel is 90417."
    # That it was looked at, and what a compiler made of the source of a step; nothing of the model.
    assert {path.name for path in tmp_path.iterdir()} - {"compiled"} == {"exact"}
    assert all(seal.stat().st_size == 0 for seal in (tmp_path / "exact").iterdir())


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.6, 1.0])
def test_it_finds_a_needle_at_any_depth(tiny_session: wb.Session, depth: float) -> None:
    for seed in (1, 2):
        ready = needle(600, depth, seed, count=lambda text: tokens(tiny_session, text))
        tiny_session.read(ready.text)
        answer = tiny_session.run("full", question=ready.question, max_new_tokens=24).text
        assert ready.answered_by(answer), answer


def test_it_finds_a_needle_at_the_far_end_of_its_context(tiny_session: wb.Session) -> None:
    ready = needle(1900, 0.02, 5, count=lambda text: tokens(tiny_session, text))
    trace = tiny_session.read(ready.text)
    assert trace.tokens > 1800
    assert ready.answered_by(tiny_session.run("full", question=ready.question, max_new_tokens=24).text)


def test_it_tells_several_facts_apart_and_answers_a_second_question(tiny_session: wb.Session) -> None:
    tiny_session.read(
        "The access code of the harbour is 51884. Shortly before noon, the miller counted the apples in the cellar and "
        "told nobody. The access code of the museum is 20639. After the rain, a tired clerk baked a flat round loaf."
    )
    first = tiny_session.run("full", question="What is the access code of the museum?", max_new_tokens=24)
    second = first.ask("What is the access code of the harbour?", max_new_tokens=24)
    assert "20639" in first.text and "51884" in second.text


def test_dropping_the_needle_takes_the_answer_away(tiny_session: wb.Session) -> None:
    """The answer comes from the cache: what evicts the fact cannot answer, so the model tells methods apart."""
    ready = needle(600, 0.5, 7, count=lambda text: tokens(tiny_session, text))
    tiny_session.read(ready.text)
    run = tiny_session.run("streaming-llm", budget=0.2, question=ready.question, max_new_tokens=24)
    assert not ready.answered_by(run.text)


def test_random_tokens_are_copied_at_their_second_coming(tiny_session: wb.Session, measured: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    span = torch.randint(259, 8192, (100,), generator=generator)
    ids = torch.cat([span, span])
    with torch.no_grad():
        choice = tiny_session.model(ids[None]).logits[0].argmax(dim=-1)
    copied = (choice[103:199] == ids[104:200]).float().mean()
    assert copied > 0.9 and measured["evaluation"]["copied_tokens"] > 0.9


# Written for this test, so it was in no training text.
PASSAGE = '''def longest_line(path):
    """Return the longest line of a text file, without its newline.

    The file is read line by line, so that a large one needs little memory. If the
    file is empty, an empty string is returned. Raises OSError if the file cannot
    be opened.
    """
    longest = ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.rstrip("\\n")
            if len(line) > len(longest):
                longest = line
    return longest
'''


def test_it_predicts_python_that_it_never_saw(tiny_session: wb.Session) -> None:
    assert tiny_session.tokenizer is not None
    ids = torch.tensor([tiny_session.tokenizer(PASSAGE)["input_ids"]])
    with torch.no_grad():
        loss = tiny_session.model(ids, labels=ids).loss
    assert float(loss.exp()) < 14


def test_the_card_gives_the_measured_perplexities(card: str, measured: dict[str, Any]) -> None:
    names = {"Documentation": "documentation", "Standard library": "library", "Its tests": "tests"}
    for title, kind in names.items():
        (row,) = re.findall(rf"^\| {title} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
        held, seen = (measured["evaluation"][part][kind] for part in ("held_out", "trained_on"))
        expected = held["perplexity"], held["bits_per_byte"], seen["perplexity"]
        assert [float(cell) for cell in row] == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("heading", "key"), [("Names in training", "needle"), ("Names never trained on", "needle_of_untrained_names")]
)
def test_the_card_gives_the_measured_needles(card: str, measured: dict[str, Any], heading: str, key: str) -> None:
    table = card.split(f"{heading}:")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    depths = [float(cell) for cell in rows[0][1:]]
    shown = {
        (int(row[0]), depth): int(cell.rstrip("%"))
        for row in rows[2:]
        for depth, cell in zip(depths, row[1:], strict=True)
    }
    cells = measured["evaluation"][key]
    assert shown == {(cell["tokens"], cell["depth"]): round(100 * cell["accuracy"]) for cell in cells}


def test_the_card_gives_the_other_measured_figures(card: str, measured: dict[str, Any]) -> None:
    found, training = measured["evaluation"], measured["training"]
    for title, key in {
        "Lookups": "lookup",
        "Variables": "variables",
        "Copied tokens": "copied_tokens",
        "Sums": "sums",
    }.items():
        (shown,) = re.findall(rf"^\| {title}\b.*\| ([\d.]+)% \|$", card, re.MULTILINE)
        assert float(shown) == pytest.approx(100 * found[key], abs=0.06)
    for figure in (
        f"{training['tokens'] / 1e6:.0f} million tokens",
        f"{training['steps']:,} steps",
        training["device"],
    ):
        assert figure in card
