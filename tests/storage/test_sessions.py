"""Saved sessions: everything comes back, nothing is overwritten by mistake, and damage is said in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.models.test_rotary import built
from tests.readings import session_on
from workbench.errors import CheckpointRefused, InputError, ModelNotFound, NotRead, WorkbenchError
from workbench.models import tiny
from workbench.storage import sessions

IDS = torch.arange(60) * 11 % 256
QUESTION = [5, 9, 200]


def made(architecture: str = "llama", **options: Any) -> wb.Session:
    return session_on(tiny(architecture), IDS, **options)


def run(session: wb.Session, recipe: Any = "snapkv") -> Any:
    budget = {"budget": 0.5} if recipe == "snapkv" else {}
    return session.run(recipe, question=QUESTION, max_new_tokens=6, **budget)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    session = made(seed=3, kv_dtype="float32")
    run(session).quality  # noqa: B018  measured before saving
    run(session, "full")
    return session.save(tmp_path_factory.mktemp("saved") / "session")


def reopened(saved: Path, **options: Any) -> wb.Session:
    return wb.Session.load(saved, **{"model": (tiny("llama"), None), **options})


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "mistral", "gpt-oss"])
def test_a_loaded_session_plans_and_answers_exactly_as_the_saved_one_did(architecture: str, tmp_path: Path) -> None:
    session = made(architecture)
    recipe = "full" if architecture == "mistral" else "snapkv"
    before = run(session, recipe)
    session.save(tmp_path / "s")
    again = wb.Session.load(tmp_path / "s", model=(tiny(architecture), None))
    after = run(again, recipe)
    assert after.tokens == before.tokens
    assert torch.equal(after.plan.tiers, before.plan.tiers)
    assert after.plan.nbytes == before.plan.nbytes and after.plan.exact == before.plan.exact
    assert after.quality.kl == pytest.approx(before.quality.kl, abs=1e-9)


def test_what_was_read_comes_back_bit_for_bit(saved: Path) -> None:
    want, got = made().trace, reopened(saved).trace
    assert want is not None and got is not None
    assert torch.equal(got.ids, want.ids) and torch.equal(got.logits, want.logits)
    for a, b in zip(want.layers, got.layers, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keys", "values", "queries"))
        assert (a.scale, a.window, a.softcap) == (b.scale, b.window, b.softcap)
        assert torch.allclose(a.unrotated_queries(), b.unrotated_queries())


def test_how_positions_weigh_comes_back(tmp_path: Path) -> None:
    model = built("Falcon", alibi=True, ffn_hidden_size=128)
    session = wb.Session((model, None), kv_dtype="float32")
    session.read(IDS)
    session.save(tmp_path / "s")
    again = wb.Session.load(tmp_path / "s", model=(model, None))
    assert [layer.scoring for layer in again.trace.layers] == [layer.scoring for layer in session.trace.layers]
    assert again.trace.layers[0].scoring.slopes is not None and again.trace.layers[0].scoring.rounded
    assert run(again, "full").tokens == run(session, "full").tokens


def test_settings_come_back_and_may_be_overridden(saved: Path) -> None:
    session = reopened(saved)
    assert (session.seed, session.kv_dtype) == (3, torch.float32)
    assert reopened(saved, kv_dtype="bfloat16").kv_dtype == torch.bfloat16


def test_runs_come_back_as_records_with_the_quality_that_had_been_measured(saved: Path) -> None:
    first, second = reopened(saved).runs
    fresh = run(made(kv_dtype="float32"))
    assert (first.tokens, first.recipe) == (fresh.tokens, fresh.recipe)
    assert first.quality.kl == pytest.approx(fresh.quality.kl, abs=1e-9)
    assert torch.allclose(first.verdict.output_error, fresh.verdict.output_error)
    assert torch.equal(first.plan.tiers, fresh.plan.tiers)
    assert first.kv_nbytes == fresh.plan.nbytes and len(first.memory) == len(fresh.memory)
    assert first.to_dict()["text"] == fresh.text and "snapkv" in str(first)
    with pytest.raises(NotRead, match=r"loaded from disk.*run its recipe again"):
        second.quality  # noqa: B018
    with pytest.raises(NotRead, match=r"loaded from disk.*cannot be asked"):
        first.ask("more?")


def test_saving_measures_nothing_and_a_loaded_session_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    session = reopened(saved)
    session.save(tmp_path / "again")
    description = json.loads((tmp_path / "again" / sessions.DESCRIPTION).read_text())
    assert [record["quality"] is None for record in description["runs"]] == [False, True]
    assert description == json.loads((saved / sessions.DESCRIPTION).read_text())


def test_a_session_that_read_nothing_can_be_saved(tmp_path: Path) -> None:
    wb.Session((tiny(), None)).save(tmp_path / "s")
    session = reopened(tmp_path / "s")
    assert session.trace is None and session.runs == []


def test_saving_again_replaces_a_saved_session_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    session = made()
    session.save(tmp_path / "s")
    run(session)
    session.save(tmp_path / "s")
    assert len(reopened(tmp_path / "s").runs) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_with_anything_else_in_it_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(InputError, match="nothing was overwritten"):
            made().save(target)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]


def test_a_save_that_fails_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = made()
    session.save(tmp_path / "s")

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions, "save_file", full_disk)
    with pytest.raises(WorkbenchError, match="No space left"):
        session.save(tmp_path / "s")
    assert reopened(tmp_path / "s").trace is not None
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_another_model_is_refused_by_shape_and_by_weights(saved: Path) -> None:
    with pytest.raises(InputError, match="kv_heads 2"):
        reopened(saved, model=(tiny("mqa"), None))
    with pytest.raises(InputError, match="other weights"):
        reopened(saved, model=(tiny("llama", seed=1), None))


def test_the_same_model_in_another_precision_is_the_same_model(saved: Path) -> None:
    session = reopened(saved, model=(tiny("llama").bfloat16(), None))
    assert session.trace is not None and session.trace.layers[0].keys.dtype == torch.bfloat16
    assert len(run(session).tokens) == 6


def test_a_model_that_is_not_found_is_asked_for(saved: Path) -> None:
    with pytest.raises(ModelNotFound, match="give it as model="):
        wb.Session.load(saved)


def copy(saved: Path, target: Path) -> Path:
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: _cut(f / sessions.TENSORS), CheckpointRefused, "damaged"),
        (lambda f: (f / sessions.TENSORS).unlink(), CheckpointRefused, "missing"),
        (lambda f: (f / sessions.TENSORS).write_bytes(pickle.dumps({"a": 1})), CheckpointRefused, "damaged"),
        (lambda f: (f / sessions.DESCRIPTION).write_text('{"format": '), CheckpointRefused, "not JSON"),
        (lambda f: (f / sessions.DESCRIPTION).write_bytes(b"\xff\xfe\x00"), CheckpointRefused, "not text"),
        (lambda f: (f / sessions.DESCRIPTION).write_text("[1]"), InputError, "not a saved session"),
        (lambda f: (f / sessions.DESCRIPTION).unlink(), InputError, "not a saved session"),
        (lambda f: _edit(f / sessions.DESCRIPTION, version=99), InputError, "newer workbench"),
        (lambda f: _edit(f / sessions.DESCRIPTION, version="1"), CheckpointRefused, "no version"),
        (lambda f: _edit(f / sessions.DESCRIPTION, model={}), CheckpointRefused, "damaged"),
        (lambda f: _edit(f / sessions.DESCRIPTION, trace={"layers": []}), CheckpointRefused, "damaged"),
        (lambda f: _edit(f / sessions.DESCRIPTION, runs=[{}]), CheckpointRefused, "damaged"),
        (lambda f: _edit(f / sessions.DESCRIPTION, runs=7), CheckpointRefused, "damaged"),
    ],
)
def test_damage_is_said_in_one_line(saved: Path, tmp_path: Path, damage: Any, kind: type, message: str) -> None:
    folder = copy(saved, tmp_path / "copy")
    damage(folder)
    with pytest.raises(kind, match=message) as caught:
        reopened(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_file_are_no_sessions(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match="not a saved session"):
            reopened(path)


def test_nothing_on_disk_is_a_pickle(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [sessions.DESCRIPTION, sessions.TENSORS]
    assert not any(b"torch" in path.read_bytes()[:2] for path in saved.iterdir())
    json.loads((saved / sessions.DESCRIPTION).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
