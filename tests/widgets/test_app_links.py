"""A page's state from its address: what does not fit is left at its default and said; and how long a text may be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from tests.waiting import until
from tests.widgets.browser import watched_page
from workbench.examples import examples
from workbench.registry import registered

pytest.importorskip("panel_material_ui")

from workbench_widgets.app.elements.text_field import TextArea, TextField
from workbench_widgets.app.page import Page
from workbench_widgets.app.state.page_state import TABS, TEXT_LIMIT, PageState
from workbench_widgets.app.state.recipe_slots import RECIPE_SLOTS, methods_for
from workbench_widgets.app.state.text_length import TextLength, about_tokens
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.control_panel import Controls

PARTS = [name for name in PageState.__dataclass_fields__ if name != "unread"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
KEYS = st.sampled_from([cls.key for cls in registered()]) | st.text()
VALUES = st.dictionaries(KEYS, st.dictionaries(st.sampled_from(["window", "bits", "of", "budget"]) | st.text(), JSON))
RAW = st.text() | st.integers().map(str) | st.floats().map(str) | JSON.map(json.dumps) | VALUES.map(json.dumps)


def read_back(state: PageState) -> PageState:
    return PageState.read(dict(parse_qsl(state.query().removeprefix("?"), keep_blank_values=True)))


def fits(state: PageState) -> bool:
    """Whether everything in a state can be shown."""
    keys = {slot: {cls.key for cls in methods_for(slot)} | {""} for slot in RECIPE_SLOTS}
    classes = {cls.key: cls for cls in registered()}
    for key, values in state.values.items():
        kinds = {entry.name: entry for entry in classes[key].parameters()}
        for name, value in values.items():
            wanted = {"int": int, "float": (int, float), "bool": bool, "text": (str, type(None))}.get(kinds[name].kind)
            assert value in (kinds[name].choices or ()) if wanted is None else isinstance(value, wanted)
    assert all(getattr(state, slot) in keys[slot] for slot in RECIPE_SLOTS)
    assert state.tokens >= 1 and state.layer >= 0 and state.head >= 0 and 0 <= state.tab < TABS
    return state.example in {"", *(one.key for one in examples())}


@given(st.dictionaries(st.sampled_from(PARTS), RAW | st.lists(st.binary(), max_size=3)))
@settings(max_examples=300)
def test_whatever_an_address_says_the_state_fits_and_the_rest_is_said_in_one_line(query: dict[str, Any]) -> None:
    state = PageState.read(query)
    assert fits(state)
    assert len(state.complaint) < 2000 and state.complaint.isprintable()


NINES = "9" * 90_000


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"values": "[" * 90_000}, "values="),
        ({"values": '{"a":' * 18_000}, "values="),
        ({"values": "{not json"}, "values="),
        ({"values": '["list"]'}, "values="),
        ({"values": '{"snapkv": {"window": NaN}}'}, "values="),
        ({"values": '{"snapkv": {"window": Infinity}}'}, "values="),
        ({"values": '{"snapkv": {"window": 1e999}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": "8"}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": true}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": null}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": 8.5}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": -8}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": [[8]]}}'}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": ' + "9" * 400 + "}}"}, "'window' of snapkv"),
        ({"values": '{"snapkv": {"window": ' + NINES + "}}"}, "values="),
        ({"values": '{"snapkv": {"pooling": "most"}}'}, "'pooling' of snapkv"),
        ({"values": '{"snapkv": {"none": 1}}'}, "'none' of snapkv"),
        ({"values": '{"snapkv": 3}'}, "values of snapkv"),
        ({"values": '{"none": {}}'}, "values of 'none'"),
        ({"values": " " * 200_000}, "values="),
        ({"tokens": "many"}, "tokens="),
        ({"tokens": "0"}, "tokens="),
        ({"tokens": "-4"}, "tokens="),
        ({"tokens": "nan"}, "tokens="),
        ({"tokens": NINES}, "tokens="),
        ({"tokens": [b"4", b"8"]}, "tokens="),
        ({"layer": "²"}, "layer="),
        ({"head": ""}, "head="),
        ({"tab": str(TABS)}, "tab="),
        ({"kv": "none"}, "kv="),
        ({"kv": ""}, "kv="),
        ({"store": "snapkv"}, "store="),
        ({"weights": "kivi"}, "weights="),
        ({"example": "none"}, "example="),
        ({"budget": "5 parsecs"}, "budget="),
        ({"budget": NINES + "!"}, "budget="),
        ({"weights_budget": "200%"}, "weights_budget="),
        ({"model": "a\x00b"}, "model="),
        ({"model": "a" * 5000}, "model="),
        ({"model": [b"\xff"]}, "model="),
        ({"text": "a" * 200_000}, "text="),
        ({"question": "\ud800"}, "question="),
    ],
)
def test_a_part_that_does_not_fit_is_at_its_default_and_named(query: dict[str, Any], named: str) -> None:
    state = PageState.read({**query, "other": "x"})
    assert state == PageState()
    assert f": {named}" in state.complaint and len(state.complaint) < 400
    assert state.complaint.count("\n") == 0


def test_the_parts_that_fit_are_taken_beside_those_that_do_not() -> None:
    state = PageState.read({"kv": "h2o", "tokens": "x", "values": '{"snapkv": {"window": 9, "kernel": "x"}, "no": {}}'})
    assert (state.kv, state.tokens, state.values) == ("h2o", 32, {"snapkv": {"window": 9}})
    assert [told.split("=")[0] for told in state.unread] == [
        "'kernel' of snapkv",
        "values of 'no' (there is no such method)",
        "tokens",
    ]
    many = PageState.read({"values": json.dumps({f"none{i}": {} for i in range(3000)})})
    assert "2996 more" in many.complaint and len(many.complaint) < 400


def test_every_value_of_every_method_comes_back_from_a_link() -> None:
    for cls in registered():
        values = {entry.name: entry.default for entry in cls.parameters() if entry.default is not None}
        state = PageState(values={cls.key: values} if values else {})
        query = f"values={json.dumps(state.values)}"
        assert PageState.read({"values": query.removeprefix("values=")}) == state


@given(st.text(max_size=TEXT_LIMIT), st.text(max_size=50), st.integers(1, 999_999), st.integers(0, 9999))
def test_what_a_page_says_in_its_link_it_reads_back(text: str, question: str, tokens: int, layer: int) -> None:
    state = PageState(example="", text=text, question=question, tokens=tokens, layer=layer)
    assert read_back(state) == state and not read_back(state).unread


def test_parts_too_long_for_a_link_are_left_out_of_it_and_named() -> None:
    long = PageState(question="x" * (TEXT_LIMIT + 1), text="y" * TEXT_LIMIT, tokens=7)
    assert long.left_out == ("question",)
    assert set(parse_qs(long.query()[1:])) == {"text", "tokens"}
    assert PageState(text="broken \ud800").query() == "?text=broken+%3F"


def test_the_page_has_as_many_tabs_as_a_link_can_name() -> None:
    assert len(Page(OfferedModels("none-yet"), LoadedModels()).panels) == TABS


def test_a_head_that_the_model_has_not_is_said_and_the_nearest_shown() -> None:
    page = Page(OfferedModels("workbench-tiny"), LoadedModels())
    page._linked_head = (99, 2)  # as a link says it
    page.workspace.read("workbench-tiny", "the needle lies under the stone")
    until(lambda: page.link.visible)
    assert page.workspace.selected == (7, 2)
    assert "has no layer 99, head 2: layer 7, head 2 is shown" in page.link.object
    page.workspace.close()


# -- fields for text


def test_no_field_for_text_has_a_limit_that_nobody_chose() -> None:
    page = Page(OfferedModels("none-yet"), LoadedModels())
    page.recipe.slots["weights"].select.value = "evopress"  # has parameters that are text
    roots = [*page.view.main, *page.view.sidebar, *page.view.header]
    found = [widget for root in roots for widget in root.select(lambda one: hasattr(one, "max_length"))]
    assert len(found) >= 8
    assert {type(widget) for widget in found} == {TextField, TextArea}
    assert all(widget.max_length == 2**31 - 1 for widget in found)  # the most that browsers know


def test_a_short_text_is_counted_and_a_long_one_estimated(tiny_session: wb.Session) -> None:
    story = " ".join(one.text for one in examples())
    assert about_tokens(story, tiny_session.tokenizer) == len(tiny_session.tokenizer(story)["input_ids"])
    long = story * 20
    exact = len(tiny_session.tokenizer(long)["input_ids"])
    assert about_tokens(long, tiny_session.tokenizer) == pytest.approx(exact, rel=0.1)


def test_what_is_said_of_a_text_that_fits_and_of_one_that_does_not() -> None:
    assert TextLength(0).line(in_link=True) == ""
    assert TextLength(1200).line(in_link=True) == "1,200 characters"
    assert TextLength(1200, 300, 8192).line(in_link=True) == "1,200 characters, about 300 tokens of 8,192"
    long = TextLength(70_000, 24_000, 2048)
    assert not long.fits
    assert "too long, the model has 2,048 positions. About the first 5,900 characters fit" in long.line(in_link=True)
    assert f"link to this page, which holds {TEXT_LIMIT:,} characters" in TextLength(TEXT_LIMIT + 1).line(in_link=True)
    assert "link" not in TextLength(TEXT_LIMIT + 1).line(in_link=False)  # an example has a name


def test_a_control_panel_generates_as_many_tokens_as_the_model_has_positions(
    tiny_llama: Any, byte_tokenizer: Any
) -> None:
    session = wb.Session((tiny_llama, byte_tokenizer))
    session.read("the needle lies under the stone")
    panel = Controls(session, max_new_tokens=2000)
    assert panel.length.value == 2000
    panel.close()


@pytest.mark.browser
def test_a_pasted_text_of_any_length_is_whole_counted_and_said_to_be_too_long(
    chromium: Any, served_app: Callable[..., str]
) -> None:
    page = watched_page(chromium).page
    page.set_default_timeout(60_000)
    page.goto(served_app())
    page.get_by_role("button", name=re.compile("^Read")).first.click()
    page.wait_for_selector("text=tokens read")
    page.locator("p").filter(has_text="about 487 tokens of 2,048").wait_for()
    field = page.locator("textarea:not([aria-hidden])").first
    field.fill("")
    page.keyboard.insert_text("Ada keeps a red kite. " * 1000)  # as a paste does, within the field's limit
    page.locator("p").filter(has_text="22,000 characters").filter(has_text="too long").wait_for()
    assert len(field.input_value()) == 22_000
    page.get_by_role("button", name=re.compile("^Read")).first.click()
    page.get_by_role("alert").filter(has_text="positions").wait_for()
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("?example=&text=why%3F%20²", ""),  # Panel's own reading of an address fails on these
        ("?example=&text=why?so?", ""),
        ("?theme=%ff&text=" + "%5B" * 9000, ""),
        ("?tokens=" + "9" * 5000 + "&layer=²", "tokens="),
        ("?values=" + "%7B%22a%22%3A" * 3000, "values="),
        ("?model=" + "".join(chr(97 + i * i * i % 7919 % 26) for i in range(90_000)), "model="),
    ],
)
def test_an_address_that_nobody_expects_opens_a_page(
    chromium: Any, served_app: Callable[..., str], address: str, said: str
) -> None:
    watched = watched_page(chromium)
    assert watched.page.goto(served_app() + address).status == 200
    watched.page.get_by_role("button", name="Read", exact=True).wait_for()
    if said:
        watched.page.get_by_role("alert").filter(has_text=said).wait_for()
    assert watched.errors == []
    watched.page.close()
