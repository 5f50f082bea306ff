"""Kernels compile beside the reading of a prompt, and progress says so."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.errors import Cancelled
from workbench.models import tiny
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.runtime import rehearsal
from workbench.runtime.compiling import STAGE, hooked, telling
from workbench.runtime.rehearsal import Rehearsal, begin, rehearse


@pytest.fixture(scope="module")
def session() -> wb.Session:
    return wb.Session((tiny("llama"), None), trust=True)


@pytest.mark.parametrize("recipe", ["full", "snapkv+kivi", "h2o", "streammem", "adalog", "rtn"])
def test_a_recipe_is_played_through_on_the_models_heads(
    recipe: str, session: wb.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def look(readings: Any) -> None:
        layer = readings.plain.layers[0]
        shapes.append((layer.heads, layer.kv_heads, layer.keys.shape[-1], layer.tokens))

    monkeypatch.setattr(rehearsal, "_LONGEST", 96)
    before = torch.random.get_rng_state()
    cpu = torch.device("cpu")
    rehearse(session.facts, 133, Recipe.of(recipe), torch.bfloat16, torch.float32, cpu, None, look)
    known = session.facts
    assert shapes == [(known.heads, known.kv_heads, known.head_dim, 96 + 133 % 16)]
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing that everybody shares has moved


def test_nothing_is_rehearsed_without_a_gpu(session: wb.Session) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert begin(session.model, session.facts, 64, Recipe.of("full"), torch.bfloat16) is None
    session.read(list(range(3, 40)), expecting="snapkv")
    assert session.run("snapkv", budget=0.5, max_new_tokens=2).tokens


def test_who_needs_the_kernels_waits_and_says_so() -> None:
    over, stages = threading.Event(), []

    def told(stage: str, _done: int, _total: int) -> None:
        stages.append(stage)
        over.set()

    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    Rehearsal(thread).finish(Progress(told))
    assert not thread.is_alive() and stages[0] == STAGE
    asked = Progress()
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait, daemon=True)
    thread.start()
    asked.cancel()
    rehearsed = Rehearsal(thread)
    with pytest.raises(Cancelled):
        rehearsed.finish(asked)
    assert rehearsed.progress.cancelled
    waiting.set()


def test_compiling_is_reported_to_its_own_thread_and_leaves_no_hook() -> None:
    runtime = pytest.importorskip("triton").knobs.runtime
    stages: list[str] = []
    others: list[dict[str, Any]] = []
    mine = Progress(lambda stage, _done, _total: stages.append(stage))
    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = lambda **given: others.append(given)
    theirs = runtime.jit_cache_hook
    try:
        first, second = hooked(mine), hooked(Progress())
        first.__enter__()
        second.__enter__()
        runtime.jit_cache_hook(key="a")
        assert stages == [STAGE] and others == [{"key": "a"}]
        elsewhere = threading.Thread(target=lambda: runtime.jit_cache_hook(key="b"))
        elsewhere.start()
        elsewhere.join()
        assert stages == [STAGE] and len(others) == 2
        first.__exit__(None, None, None)  # in another order than they came
        runtime.jit_cache_hook(key="c")
        assert stages == [STAGE] and len(others) == 3
        second.__exit__(None, None, None)
        assert runtime.jit_cache_hook is theirs
    finally:
        runtime.jit_cache_hook = before
    with telling(None):
        assert runtime.jit_cache_hook is before
