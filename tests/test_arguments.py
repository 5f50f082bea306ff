"""What a caller gives: a parameter of the wrong type or out of its bounds is refused by name, in one short line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import workbench as wb
from tests.readings import session_on
from workbench import arguments
from workbench.budget import Budget
from workbench.errors import BadBudget, BadParameter, InputError
from workbench.formatting import quoted
from workbench.measure import Thresholds, head_stats, massive_activations, pooled_map, sink_mass, sinks
from workbench.registry import Method, registered
from workbench_kernels import Scoring

TOKENS = 50
NO_COUNT = ["a", 0.0, 1.5, math.nan, math.inf, True, -1, [1], (1, 2), {}, b"x", np.float64(1), torch.tensor(0)]
NO_NUMBER = ["a", math.nan, math.inf, True, None, [1], 10**400]
NO_NAME = [None, "no such name", 0.0, 3, True, ["keys"], b"keys", {}]
NO_SPAN = [
    *("a", "ab", 0.0, math.nan, True, 5, {}, (), (1,), (1, 2, 3)),
    *((3, 1), (2, 2), (-5, 3), (0, 10**30), (0, TOKENS + 1), ("a", "b"), (0.0, 3.0), (None, 3), (True, 3)),
]
NO_PATH = [None, 5, 0.0, True, "a\0b", "", b"folder", ["folder"]]


@pytest.fixture(scope="module")
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    return session_on(tiny_llama, torch.arange(TOKENS))


COUNTS: dict[str, tuple[str, Callable[[wb.Session, Any], Any]]] = {
    "attention layer": ("layer", lambda s, x: s.attention(x, 0)),
    "attention head": ("head", lambda s, x: s.attention(0, x)),
    "attention pixels": ("pixels", lambda s, x: s.attention(0, 0, pixels=0 if x == [1] else x)),
    "grid pixels": ("pixels", lambda s, x: s.attention_grid(pixels=x)),
    "received layer": ("layer", lambda s, x: s.received(x)),
    "received head": ("head", lambda s, x: s.received(0, x)),
    "map of a grid": ("layer", lambda s, x: s.attention_grid(pixels=2).map(x, 0)),
    "operator layer": ("layer", lambda s, x: s.operator("slab", x)),
    "operator head": ("head", lambda s, x: s.operator("slab", 0, x)),
    "operator heads": ("head", lambda s, x: s.operator("slab", 0, heads=[x])),
    "run": ("max_new_tokens", lambda s, x: s.run("full", max_new_tokens=x)),
    "stream": ("max_new_tokens", lambda s, x: s.stream("full", max_new_tokens=x)),
    "compare": ("max_new_tokens", lambda s, x: s.compare(["full"], max_new_tokens=x)),
    "spectra layer": ("layer", lambda s, x: s.spectra(layer=x)),
    "rounding bits": ("bits", lambda s, x: s.rounding(bits=x)),
    "rounding texts": ("texts", lambda s, x: s.rounding(texts=x)),
    "sensitivity tokens": ("tokens", lambda s, x: s.sensitivity("rtn", tokens=x)),
    "calibrate samples": ("samples", lambda s, x: s.calibrate(samples=x)),
    "calibrate seed": ("seed", lambda s, x: s.calibrate(seed=x)),
    "seed": ("seed", lambda s, x: wb.Session((s.model, None), seed=x)),
    "kv_heads": ("kv_heads", lambda s, x: s.head_stats().to_frame(x)),
    "sink_mass": ("first", lambda s, x: sink_mass(*_heads(), Scoring(1.0), first=x)),
    "head_stats": ("recent", lambda s, x: head_stats(*_heads(), torch.arange(4), Scoring(1.0), recent=x)),
    "window": ("window", lambda s, x: sink_mass(*_heads(), Scoring(1.0, x))),
}


def _heads() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 4, 8), torch.ones(1, 4, 8)


def refused(ask: Callable[[], Any], name: str) -> None:
    with pytest.raises(BadParameter) as error:
        ask()
    message = str(error.value)
    assert name in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("which", COUNTS)
def test_what_is_no_whole_number_in_range_is_refused_by_name(which: str, session: wb.Session) -> None:
    name, ask = COUNTS[which]
    for value in NO_COUNT:
        refused(lambda value=value: ask(session, value), name)  # type: ignore[misc]


@pytest.mark.parametrize(
    "ask",
    [
        lambda s, **spans: s.attention(0, 0, **spans),
        lambda s, **spans: s.attention(0, 0, "block-sparse", **spans),
        lambda s, **spans: s.attention(0, 0, "snapkv", budget=0.5, **spans),
        lambda s, **spans: s.operator("slab", 0, **spans),
        lambda s, **spans: pooled_map(torch.ones(TOKENS, 8), torch.ones(TOKENS, 8), Scoring(1.0), **spans),
    ],
    ids=["exact", "implied", "captured", "operator", "pooled_map"],
)
def test_what_is_no_range_of_positions_is_refused_by_name(ask: Callable[..., Any], session: wb.Session) -> None:
    for name in ("rows", "cols"):
        for span in NO_SPAN:
            refused(lambda name=name, span=span: ask(session, **{name: span}), name)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("pooling", lambda s, x: s.attention(0, 0, pooling=x)),
        ("pooling", lambda s, x: s.attention_grid(pooling=x)),
        ("kind", lambda s, x: s.outliers(x)),
        ("each", lambda s, x: s.sensitivity("rtn", each=x)),
        ("format", lambda s, x: s.export("never-written", "rtn", format=x)),
        ("module", lambda s, x: s.spectra(module="" if x is None else x)),
        ("phase", lambda s, x: s.memory.without(x)),
        ("record", lambda s, x: s.read([1], record=5 if x is True else x)),
        ("outputs", lambda s, x: s.census("rtn", outputs=5 if x is True else x)),
        ("", lambda s, x: s.operator([] if isinstance(x, str) else x, 0)),
    ],
)
def test_what_is_no_known_name_is_refused(name: str, ask: Callable[..., Any], session: wb.Session) -> None:
    for value in NO_NAME:
        refused(lambda value=value: ask(session, value), name)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("scale", lambda x: sink_mass(*_heads(), Scoring(x))),
        ("softcap", lambda x: sink_mass(*_heads(), Scoring(1.0, softcap="" if x is None else x))),
        ("sink", lambda x: Thresholds(sink=x)),
        ("ratio", lambda x: massive_activations(torch.ones(2, 2), ratio=x)),
        ("threshold", lambda x: sinks(torch.ones(1, 4), threshold=x)),
    ],
)
def test_what_is_no_finite_number_is_refused_by_name(name: str, ask: Callable[[Any], Any]) -> None:
    for value in NO_NUMBER:
        refused(lambda value=value: ask(value), name)  # type: ignore[misc]


def test_what_is_no_path_is_refused(session: wb.Session) -> None:
    for path in NO_PATH:
        refused(lambda path=path: session.save(path), "path")  # type: ignore[misc]
        refused(lambda path=path: wb.Session.load(path), "path")  # type: ignore[misc]
        refused(lambda path=path: session.export(path, "rtn"), "path")  # type: ignore[misc]
        if path is not None:
            refused(lambda path=path: session.calibrate(path), "source")  # type: ignore[misc]


def test_numpys_numbers_are_numbers(session: wb.Session) -> None:
    shown = session.attention(np.int64(0), np.int32(1), pixels=np.uint8(5), rows=(np.int64(0), np.int16(9)))
    assert shown.values.shape == (5, 5)
    assert len(session.run("full", max_new_tokens=np.int64(2)).tokens) == 2
    assert wb.method("snapkv", window=np.int64(16)) == wb.method("snapkv", window=16)
    assert wb.method("adakv", safeguard=np.float32(0.5), budget=np.float32(0.5)) == wb.method(
        "adakv", safeguard=0.5, budget=0.5
    )
    assert type(wb.method("snapkv", window=np.int64(16)).window) is int  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", registered(), ids=lambda cls: cls.key)
def test_a_methods_parameters_take_their_own_type_only(cls: type[Method]) -> None:
    for parameter in cls.parameters():
        if parameter.kind == "text":
            wrong: list[Any] = [5, 1.5, True, None, [1], {}]
        else:
            flag = 1 if parameter.kind == "bool" else True
            wrong = [flag, "3", "true", math.nan, math.inf, 10**30, -(10**30), None, [1], {}, "9" * 5000]
        for value in wrong:
            with pytest.raises(BadParameter) as error:
                cls(**{parameter.name: value})
            assert "\n" not in str(error.value) and len(str(error.value)) < 400


# --- what is quoted, and budgets


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"x" * 10**6, [1] * 10**6, {i: i for i in range(10**4)}, 10**5000, "a\nb", np.ones((99, 99))],
    ids=range(7),
)
def test_a_message_quotes_the_beginning_only(value: Any) -> None:
    shown = quoted(value)
    assert len(shown) < 160 and "\n" not in shown


@pytest.mark.parametrize(
    "text",
    ["9" * 20_000 + "!", "9" * 10**6, " " * 10**6 + "!", "." * 20_000, "1" + "e" * 10**5, "1 " + "a" * 10**6],
    ids=range(6),
)
def test_a_long_budget_is_refused_by_its_length(text: str) -> None:
    with pytest.raises(BadBudget) as error:
        Budget.parse(text)
    assert len(str(error.value)) < 400 and ("longer than 64" in str(error.value) or text.strip() == "!")


@pytest.mark.parametrize(
    "budget", [5e-324, 1.0, "1e300 tokens", "9007199254740993 tokens", "1e15 B", "1e290 GB", 1e-300]
)
def test_a_budget_of_any_size_survives_writing(budget: Any) -> None:
    read = Budget.parse(budget)
    assert Budget.parse(read.to_json()) == read and len(str(read.to_json())) <= 64 and len(str(read)) <= 64


@pytest.mark.parametrize("amount", [0, -1, 2, math.nan, math.inf, "0.5", None])
def test_a_budget_cannot_be_made_out_of_range(amount: Any) -> None:
    with pytest.raises(BadBudget):
        Budget("share", amount)


@pytest.mark.parametrize("key", ["x" * 10**6, None, 5, ["snapkv"], {}], ids=range(5))
def test_an_unknown_key_of_any_kind_is_refused(key: Any) -> None:
    with pytest.raises(InputError) as error:
        wb.method(key)
    assert quoted(key) in str(error.value)


def test_a_span_says_where_the_prompt_ends() -> None:
    assert arguments.span("rows", [0, np.int64(3)], 3) == (0, 3)
    with pytest.raises(BadParameter, match=r"rows is .0, 4.: positions go from 0 and 3 is where the prompt ends"):
        arguments.span("rows", (0, 4), 3)


def test_a_path_may_be_a_path() -> None:
    assert arguments.path("path", Path("a")) == arguments.path("path", "a") == Path("a")
