"""The attention of a prompt in a notebook: linked views whose numbers are the session's, and pages of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.errors import BadParameter, NotRead
from workbench_widgets import AttentionView, Heatmap, MapGrid, present
from workbench_widgets.views.wire import unpack

N = 90


@pytest.fixture
def session(tiny_llama: Any) -> wb.Session:
    made = wb.Session((tiny_llama, None))
    made.read(torch.randint(0, 200, (N,), generator=torch.Generator().manual_seed(0)))
    return made


def test_the_map_holds_the_exact_weights_and_nothing_where_none_can_be(session: wb.Session) -> None:
    view = AttentionView(session, layer=1, head=2, heads=False)
    values = unpack(view.map.exact)
    exact = session.attention(1, 2).values.numpy()
    np.testing.assert_array_equal(np.nan_to_num(values), exact)
    assert np.all(np.isnan(values[np.triu_indices(N, 1)]))
    assert view.grid is None
    assert repr(view) == "AttentionView(layer=1, head=2)"


def test_a_dragged_window_is_computed_anew_and_closing_it_brings_the_whole_back(session: wb.Session) -> None:
    view = AttentionView(session, heads=False)
    whole = view.map.exact
    view.map.window = (40, 60, 10, 30)
    assert view.map.extent == (40, 60, 10, 30)
    np.testing.assert_array_equal(
        unpack(view.map.exact), session.attention(0, 0, rows=(40, 60), cols=(10, 30)).values.numpy()
    )
    assert view.map.note == "token by token"
    view.map.window = None
    assert view.map.exact == whole


def test_a_chosen_head_is_shown_everywhere(session: wb.Session) -> None:
    view = AttentionView(session)
    view.grid.selected = (1, 3)
    assert view.selected == (1, 3)
    assert view.map.label == "Attention of layer 1, head 3"
    np.testing.assert_allclose(unpack(view.text.levels), session.received(1, 3).numpy())
    view.selected = (0, 2)
    assert view.grid.selected == (0, 2)
    assert view.map.label == "Attention of layer 0, head 2"


def test_a_difference_of_two_recipes(session: wb.Session) -> None:
    recipe = wb.method("knorm", budget=0.5)
    view = AttentionView(session, 0, 1, recipe, minus="full")
    assert view.map.diverging
    assert view.grid.diverging
    wanted = session.attention(0, 1, recipe).minus(session.attention(0, 1)).values.numpy()
    np.testing.assert_array_equal(unpack(view.map.exact), wanted)
    assert "knorm 0.5 − all keys" in repr(view)


def test_an_operator_and_its_parameters_can_be_chosen_and_say_how_far_off_it_is(session: wb.Session) -> None:
    view = AttentionView(session, 1, 2, heads=False)
    plain = view.map.exact
    assert view.against.layout.display == "none" and view.remark.value == ""
    view.operator.choice.value = "soft"
    view.operator._controls["landmarks"].value = 3
    study = session.operator("soft", 1, 2, landmarks=3)
    np.testing.assert_allclose(np.nan_to_num(unpack(view.map.exact)), study.implied.values, atol=1e-6)
    assert f"{float(study.error[2]):.0%} of its norm" in view.remark.value
    assert view.map.label.endswith("implied by soft landmarks=3")
    view.against.value = True
    wanted = study.implied.minus(study.exact).values
    np.testing.assert_allclose(np.nan_to_num(unpack(view.map.exact)), wanted, atol=1e-6)
    assert view.map.diverging and "implied by soft landmarks=3 − all keys" in repr(view)
    view.selected = (0, 1)
    np.testing.assert_allclose(
        np.nan_to_num(unpack(view.map.exact)),
        (other := session.operator("soft", 0, 1, landmarks=3)).implied.minus(other.exact).values,
        atol=1e-6,
    )
    view.operator.choice.value = ""
    view.selected = (1, 2)
    assert view.map.exact == plain and view.remark.value == ""


def test_an_operator_can_be_given_and_stands_beside_no_recipe(session: wb.Session) -> None:
    operator = wb.method("agent-attention", agents=5)
    view = AttentionView(session, 0, 1, operator=operator, minus="full")
    assert view.operator.method() == operator and view.against.value
    assert view.map.diverging and not view.grid.diverging
    assert repr(view) == "AttentionView(layer=0, head=1, implied by agent-attention agents=5 − all keys)"
    assert AttentionView(session, operator="slab", heads=False).operator.method() == wb.method("slab")
    for given in ({"recipe": "snapkv"}, {"minus": "snapkv"}):
        with pytest.raises(BadParameter, match="no recipe"):
            AttentionView(session, operator="slab", heads=False, **given)
    with pytest.raises(BadParameter, match="snapkv is no attention operator"):
        AttentionView(session, operator="snapkv", heads=False)


def test_colours_and_pooling_can_be_chosen(session: wb.Session) -> None:
    view = AttentionView(session, heads=False)
    log = view.map.knots
    view.scale.value = "percentile"
    assert view.map.knots != log
    assert unpack(view.map.tiles)[0, 0] > 0
    view.pooling.value = "sum"
    assert view.map.label == "Attention of layer 0, head 0"


def test_without_a_prompt_it_says_so(tiny_llama: Any) -> None:
    with pytest.raises(NotRead):
        AttentionView(wb.Session((tiny_llama, None)))


def test_the_grid_names_every_heads_class_and_figures(session: wb.Session) -> None:
    frame = session.heads()
    shuffled = frame.sample(frac=1, random_state=0)
    view = MapGrid.jupyter(**present.map_grid(session.attention_grid(pixels=16), shuffled))
    names = np.array(view.class_names)[unpack(view.classes)]
    assert list(names) == list(frame["class"])
    entropy = unpack(view.measures)[view.measure_names.index("entropy")]
    np.testing.assert_allclose(entropy, frame.entropy, rtol=1e-6)
    assert unpack(view.tiles).shape == (len(frame), 16, 16)


def test_a_map_as_a_page_of_its_own_is_a_few_hundred_kilobytes(session: wb.Session) -> None:
    tokens = [f"[{i}]" for i in range(N)]
    page = present.attention_html(session.attention(0, 0), tokens, layer=0, head=0)
    assert "<title>Attention of layer 0, head 0</title>" in page
    assert len(page.encode()) < 200_000


def test_a_very_large_map_stays_small_on_its_way(session: wb.Session) -> None:
    pooled = session.attention(0, 0, pixels=40)
    sent = Heatmap.data(np.asarray(pooled.values), at=(0, N, 0, N))
    assert len(sent["tiles"]) < 40 * 40 + 32
