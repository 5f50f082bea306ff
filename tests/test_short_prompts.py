"""Every method at its defaults, on prompts of a few tokens: it runs, or refuses in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import workbench as wb
from tests.readings import session_on
from workbench.errors import InputError
from workbench.registry import registered

LENGTHS = (1, 2, 3, 5, 14)
RUN = [cls.key for family in ("kv", "attention") for cls in registered(family)]


@pytest.fixture(scope="module", params=[(kind, n) for kind in ("llama", "gemma3") for n in LENGTHS], ids=str)
def session(request: pytest.FixtureRequest, tiny_model: Callable[[str], PreTrainedModel]) -> wb.Session:
    """A model of whole attention, and one whose every other layer slides, with a short prompt read."""
    kind, tokens = request.param
    return session_on(tiny_model(kind), torch.arange(7, 7 + tokens))


@pytest.mark.parametrize("key", RUN)
def test_a_method_runs_on_a_short_prompt_or_refuses(key: str, session: wb.Session) -> None:
    try:
        run = session.run(key, max_new_tokens=2)
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        run = session.run(key, budget=1, max_new_tokens=2) if "budget" in str(error) else session.run(max_new_tokens=2)
    assert len(run.tokens) == 2 and bool(torch.isfinite(run.verdict.output_error).all())


@pytest.mark.parametrize("family", ["attention", "operator"])
def test_what_is_looked_at_exists_on_a_short_prompt(family: str, session: wb.Session) -> None:
    for cls in registered(family):
        if family == "operator":
            found = session.operator(cls.key, 0).implied.values
        else:
            found = session.attention(0, 0, cls.key).values
            assert len(session.heads(cls.key)) == 12
        assert bool(torch.isfinite(found).all())
    assert len(session.outliers("keys")) and len(session.attention_grid(pixels=3).values)


@pytest.mark.parametrize("tokens", range(2, 20))
def test_sparse_rows_see_themselves_on_a_short_prompt(tokens: int, tiny_llama: PreTrainedModel) -> None:
    made = wb.Session((tiny_llama, None))
    made.read(torch.arange(tokens))
    shown = made.attention(1, 2, "block-sparse").values
    torch.testing.assert_close(shown.sum(dim=1), torch.ones(tokens), atol=1e-4, rtol=0)
    assert bool((shown.diagonal() > 0).all())
