"""What several test modules share: tiny models, a tokenizer that fits them, and the default model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import workbench as wb
from tests import byte_tokens
from tests.widgets.browser import chromium, served_app  # noqa: F401  fixtures
from workbench.models import cached, tiny
from workbench.testing import Subjects

DEFAULT = "smollm2-135m"

# On a machine that does much else drawing an example takes seconds now and then, which says nothing about the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from more, and on a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_draw() -> None:
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """A tiny random model by architecture, made once; tests leave it as it is."""
    return cache(tiny)


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def subjects() -> Subjects:
    """What promises are checked on, made once."""
    return Subjects()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as many as a tiny model knows; "~" ends a turn of its chat template."""
    made = byte_tokens.byte_tokenizer(eos_token="~", clean_up_tokenization_spaces=False)
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


@pytest.fixture(scope="session")
def default_session() -> wb.Session:
    """The default model, loaded once. Tests read what they need first."""
    if cached(DEFAULT) is None and not os.environ.get("CI"):
        pytest.skip(f"the default model is not in the cache: run `workbench models fetch {DEFAULT}`")
    return wb.Session(DEFAULT)


@pytest.fixture(scope="session")
def tiny_session() -> wb.Session:
    """workbench-tiny, which ships with the package and retrieves in a second. Tests read what they need first."""
    return wb.Session("workbench-tiny")
