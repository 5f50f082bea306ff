"""The views in Python: wire format, pooling, one declaration for two hosts, and messages that help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench.errors import BadParameter
from workbench_widgets import AnswerDiff, Heatmap, KeptRaster, MapGrid, TokenText, View, figures
from workbench_widgets.views.colour_levels import quantise, scale_differences, scale_values
from workbench_widgets.views.pooling import edges, pool_map, pool_tiers
from workbench_widgets.views.view import compact
from workbench_widgets.views.wire import pack, unpack

SCRIPTS = sorted((Path(__file__).parents[2] / "widgets" / "js").glob("*.js"))
VIEWS = [AnswerDiff, Heatmap, KeptRaster, MapGrid, TokenText]


def built(view: type[View], host: str):
    """Each view with a little data, in a host."""
    make = getattr(view, host)
    if view is AnswerDiff:
        return make(["a", " b"], ["a", " c"])
    if view is Heatmap:
        return make(np.eye(4))
    if view is KeptRaster:
        return make(np.ones((2, 3, 5), bool))
    if view is MapGrid:
        return make(np.ones((2, 3, 4, 4)), classes=["sink", "local"] * 3, measures={"entropy": np.arange(6.0)})
    return make(["a", "b"], shares=[0.5, 1])


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (np.arange(6, dtype=np.uint8).reshape(2, 3), np.uint8),
        (np.array([True, False]), np.uint8),
        (np.arange(-4, 4, dtype=np.int64).reshape(2, 2, 2), np.int32),
        (np.linspace(-1, 1, 7), np.float32),
        (np.zeros((0, 5), np.float32), np.float32),
        (np.arange(12, dtype=np.float32).reshape(3, 4).T, np.float32),  # not contiguous
    ],
)
def test_arrays_come_back_from_the_wire_as_they_were(given, sent):
    back = unpack(pack(given))
    assert back.dtype == sent
    assert back.shape == given.shape
    np.testing.assert_allclose(back, given, rtol=1e-6)


@pytest.mark.parametrize("given", [np.zeros((1, 1, 1, 1)), np.array(3.0), np.array(["a"]), np.array([2**40])])
def test_what_javascript_cannot_hold_is_refused(given):
    with pytest.raises(BadParameter):
        pack(given)


def test_every_column_falls_in_exactly_one_bin():
    for size, pixels in [(10, 3), (7, 7), (5, 9), (8192, 1000)]:
        cuts = edges(size, pixels)
        assert cuts[0] == 0
        assert len(cuts) == min(size, pixels)
        assert np.all(np.diff(np.append(cuts, size)) >= 1)


@pytest.mark.parametrize("how", ["max", "mean"])
def test_pooling_a_map_agrees_with_the_plain_loop_and_leaves_nan_out(how):
    values = np.random.default_rng(0).random((13, 29)).astype(np.float32)
    values[values > 0.8] = np.nan
    values[:2, :3] = np.nan
    pooled = pool_map(values, 10, how)
    rows, columns = np.append(edges(13, 10), 13), np.append(edges(29, 10), 29)
    assert pooled.shape == (10, 10)
    for r in range(10):
        for c in range(10):
            block = values[rows[r] : rows[r + 1], columns[c] : columns[c + 1]]
            block = block[np.isfinite(block)]
            expected = getattr(block, how)() if block.size else np.nan
            np.testing.assert_allclose(pooled[r, c], expected, rtol=1e-6)


def test_a_single_kept_position_stays_visible_when_positions_are_pooled():
    tiers = np.zeros((2, 32768), np.uint8)
    tiers[1, 20000] = 2
    main, share = pool_tiers(tiers, 100)
    assert main.shape == (2, 100)
    assert main[0].max() == 0
    assert share[0].max() == 0
    (pixel,) = np.flatnonzero(main[1])
    assert main[1, pixel] == 2
    assert share[1, pixel] == 1


@pytest.mark.parametrize("scale", ["linear", "log", "percentile"])
def test_quantised_values_read_back_close_to_the_truth(scale):
    values = np.exp(np.random.default_rng(1).normal(size=(40, 50))).astype(np.float32)
    knots = scale_values(values, scale)
    levels = quantise(values, knots)
    assert np.all(np.diff(knots) >= 0)
    assert levels.min() >= 1
    back = knots[levels.astype(int) - 1]
    if scale == "log":
        assert np.max(np.abs(back / values - 1)) < 0.03
    elif scale == "linear":
        assert np.max(np.abs(back - values)) <= (values.max() - values.min()) / 254
    else:  # close in rank
        ranks = np.searchsorted(np.sort(values.ravel()), np.stack([back, values])) / values.size
        assert np.max(np.abs(ranks[0] - ranks[1])) < 0.01


@pytest.mark.parametrize("scale", ["linear", "log", "percentile"])
def test_a_difference_shows_its_sign_and_no_difference_is_the_middle(scale):
    values = np.random.default_rng(2).normal(size=(30, 30)).astype(np.float32) ** 5
    values[0, :2] = 0, np.nan
    sent = Heatmap.data(values, scale=scale, diverging=True)
    levels, knots = unpack(sent["tiles"]).astype(int), unpack(sent["knots"])
    np.testing.assert_allclose(knots, -knots[::-1])
    assert np.all(np.diff(knots) >= 0)
    assert list(levels[0, :2]) == [128, 0]
    assert np.all((levels - 128) * np.nan_to_num(values) >= 0)
    mirrored = unpack(Heatmap.data(-values, scale=scale, diverging=True)["tiles"]).astype(int)
    np.testing.assert_array_equal(np.where(levels, 256 - levels, 0), mirrored)


def test_a_difference_pooled_keeps_what_is_farthest_from_zero():
    values = np.zeros((8, 8), np.float32)
    values[0, 0], values[1, 1], values[7, 7] = 0.5, -2, 1
    pooled = unpack(Heatmap.data(values, pixels=2, diverging=True)["exact"])
    np.testing.assert_array_equal(pooled, [[-2, 0], [0, 1]])


def test_no_difference_at_all_has_a_scale_too():
    assert np.all(np.isfinite(scale_differences(np.zeros((3, 3)))))
    assert set(unpack(Heatmap.data(np.zeros((3, 3)), diverging=True)["tiles"]).ravel()) == {128}


def test_a_map_brings_its_values_unless_it_is_very_large():
    values = np.random.default_rng(3).random((512, 512)).astype(np.float32)
    np.testing.assert_array_equal(unpack(Heatmap.data(values, scale="log")["exact"]), values)
    assert Heatmap.data(np.ones((513, 512)))["exact"] == b""


def test_the_grid_keeps_layers_heads_and_classes_together():
    maps = np.zeros((2, 3, 4, 4))
    maps[1, 2] = 1
    names = ["sink", "local", "sink", "local", "sink", "retrieval"]
    sent = MapGrid.data(
        maps, classes=names, class_names=["retrieval", "sink", "local"], measures={"entropy": np.arange(6)}
    )
    tiles, places = unpack(sent["tiles"]), unpack(sent["places"])
    assert tiles.shape == (6, 4, 4)
    assert tiles[:5].max() == 0
    assert list(places[5]) == [1, 2]
    assert unpack(sent["classes"])[5] == 0
    assert unpack(sent["measures"])[0, 5] == 5


def test_a_view_is_one_html_file_without_a_network():
    tokens = ["</script><b>", 'a"b'] * 32
    page = Heatmap.html(np.tril(np.random.default_rng(0).random((64, 64))), tokens=tokens, title="Map <1>")
    assert page.count("</script>") == 1
    assert "<title>Map &lt;1&gt;</title>" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert len(page) < 100_000


def test_nothing_there_is_level_zero():
    assert quantise([np.nan, 1.0], scale_values([0, 1]))[0] == 0
    tiles = unpack(Heatmap.data([[0, 1e-3], [-1, 1]], scale="log")["tiles"])
    assert tiles[0, 0] == 0
    assert tiles[1, 0] == 0
    assert tiles[1, 1] == 255


@pytest.mark.parametrize("view", VIEWS)
def test_both_hosts_hold_the_same_fields_and_values(view):
    jupyter, panel = built(view, "jupyter"), built(view, "panel")
    for name in view.fields():
        if name != "dark":  # a Panel page has a theme of its own
            assert getattr(jupyter, name) == getattr(panel, name), name
    assert set(view.fields()) <= set(jupyter.traits(sync=True))
    assert set(view.fields()) <= set(panel.param)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("host", ["jupyter", "panel"])
def test_reprs_are_stable_and_short(view, host):
    one, other = built(view, host), built(view, host)
    assert repr(one) == repr(other)
    assert repr(one).startswith(f"{view.__name__}(")
    assert " at 0x" not in repr(one)
    assert len(repr(one)) < 300


def test_a_notebook_gets_a_mime_bundle():
    data = built(Heatmap, "jupyter")._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith("Heatmap(") and data["image/png"]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("host", ["jupyter", "panel"])
def test_an_unknown_keyword_is_named_with_the_fields_there_are(view, host):
    with pytest.raises(
        BadParameter, match=f"{view.__name__} has no field 'selectd'. Did you mean 'selected'"
    ) as refused:
        getattr(view, host)(selectd=1)
    for name in view.fields():
        assert name in str(refused.value)


def test_missing_data_is_said_with_the_signature():
    with pytest.raises(BadParameter, match=r"AnswerDiff.*right"):
        AnswerDiff.jupyter(["a"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TokenText.data(["a"], shares=[0.1, 0.2]),
        lambda: TokenText.data(["a"], shares=[1.5]),
        lambda: TokenText.data(["a"], shares=[float("nan")]),
        lambda: TokenText.data(["a"], shares=[1], tier_of=[1]),
        lambda: TokenText.data(["a"], tier_of=[2]),
        lambda: KeptRaster.data(np.zeros((2, 3), bool)),
        lambda: KeptRaster.data(np.full((1, 1, 2), 3)),
        lambda: KeptRaster.data(np.zeros((1, 1, 2), float)),
        lambda: Heatmap.data(np.zeros(3)),
        lambda: Heatmap.data(np.eye(3), scale="loud"),
        lambda: Heatmap.data(np.eye(3), at=(0, 0, 0, 3)),
        lambda: AnswerDiff.data(["a"], ["a"], left_odds=[0.1, 0.2]),
        lambda: TokenText.data(["a"], values=[-1]),
        lambda: TokenText.data(["a"], values=[1], shares=[1]),
        lambda: TokenText.data(["a"], values=[1, 2]),
        lambda: scale_differences([1], "loud"),
        lambda: MapGrid.data(np.zeros((2, 3, 4))),
        lambda: MapGrid.data(np.zeros((2, 3, 4, 5))),
        lambda: MapGrid.data(np.zeros((1, 2, 4, 4)), classes=["sink"]),
        lambda: MapGrid.data(np.zeros((1, 1, 4, 4)), classes=["sink"], class_names=["local"]),
        lambda: MapGrid.data(np.zeros((1, 1, 4, 4)), measures={"entropy": [1, 2]}),
    ],
)
def test_data_that_does_not_fit_is_refused(wrong):
    with pytest.raises(BadParameter):
        wrong()


@pytest.mark.parametrize(
    ("left", "right", "first"),
    [("ab", "ab", None), ("ab", "ac", 1), ("ab", "abc", 2), ("abc", "", 0), ("", "", None)],
)
def test_the_first_difference_is_found_also_where_an_answer_ends(left, right, first):
    assert AnswerDiff.data(list(left), list(right))["first_difference"] == first


@pytest.mark.parametrize("host", ["jupyter", "panel"])
def test_python_sees_what_changes_and_can_stop_watching(host):
    widget = built(Heatmap, host)
    seen: list[object] = []
    stop = Heatmap.watch(widget, "selected", seen.append)
    widget.selected = (1, 2)
    stop()
    widget.selected = (0, 0)
    assert seen == [(1, 2)]


@pytest.mark.parametrize("host", ["jupyter", "panel"])
def test_a_list_from_the_browser_becomes_a_tuple(host):
    widget = built(Heatmap, host)
    widget.selected = [3, 1]
    assert widget.selected == (3, 1)
    widget.selected = None
    assert widget.selected is None


@pytest.mark.parametrize("host", ["jupyter", "panel"])
def test_update_changes_the_data_and_keeps_the_selection(host):
    widget = built(KeptRaster, host)
    widget.selected = (1, 2)
    kept = np.zeros((2, 3, 5), bool)
    KeptRaster.update(widget, kept, label="less")
    assert unpack(widget.kept).sum() == 0
    assert widget.label == "less"
    assert widget.selected == (1, 2)


def test_widgets_do_not_share_what_can_change():
    one, other = TokenText.jupyter(), TokenText.jupyter()
    one.tokens = ["a"]
    assert other.tokens == []
    assert TokenText.jupyter().tokens == []


def test_views_import_without_panel_or_torch():
    code = (
        "import sys; sys.modules['panel'] = None\n"
        "import workbench_widgets as w; from workbench.errors import MissingExtra\n"
        "w.TokenText.jupyter(['a'], shares=[1])\n"
        "assert 'torch' not in sys.modules\n"
        "try: w.TokenText.panel(['a'])\n"
        "except MissingExtra as error: assert 'inference-workbench[app]' in str(error)\n"
        "else: raise SystemExit('panel was not missed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_timeline_stacks_to_the_total():
    mib = 1024**2
    frame = pd.DataFrame({"step": [0, 1], "weights": [mib, mib], "kv": [0, 3 * mib], "event": ["load", "read"]})
    figure = figures.memory_timeline(frame)
    assert [trace.name for trace in figure.data] == ["weights", "kv", "total"]
    assert list(figure.data[-1].y) == [1, 4]


def test_the_line_of_a_long_prompt_keeps_its_peaks():
    received = np.full(10_000, 0.1)
    received[[0, 7321]] = 100, 50
    received[100:200] = 0
    tokens = [f"t{i}" for i in range(10_000)]
    (line,) = figures.received_line(received, tokens, points=500).data
    assert len(line.x) == 500
    assert line.y[list(line.x).index(7321)] == 50
    assert line.text[list(line.x).index(7321)] == "'t7321'"
    assert np.isnan(line.y[6])  # received nothing


def test_the_front_holds_the_runs_that_none_beats():
    assert figures.front([1, 2, 3, 4], [0.9, 0.5, 0.6, 0.1]) == [0, 1, 3]
    assert figures.front([1, 2, 3], [0.1, 0.5, 0.4], lower_is_better=False) == [0, 1]


@pytest.mark.parametrize("draw", [figures.memory_timeline, figures.outlier_profile, figures.pareto])
def test_a_frame_without_the_needed_column_is_refused_by_name(draw):
    with pytest.raises(BadParameter, match="no column"):
        draw(pd.DataFrame({"x": [1]}))


@pytest.mark.parametrize("decades", [1, 2, 4, 8])
def test_a_log_axis_has_a_few_round_numbers_and_a_narrow_one_plotlys_own(decades: int) -> None:
    wide = figures.lines([0, 1], {"x": [0.7, 0.7 * 10**decades]}, title="", x_title="", y_title="", log=True)
    marks = [tick for tick in wide.layout.yaxis.tickvals if 0.7 <= tick <= 0.7 * 10**decades]
    assert 2 <= len(marks) <= 10 and min(np.diff(np.log10(marks))) > 0.29
    narrow = figures.lines([0, 1], {"x": [1.2, 1.9]}, title="", x_title="", y_title="", log=True)
    assert narrow.layout.yaxis.type == "log" and narrow.layout.yaxis.tickvals is None


def test_a_script_loses_indents_and_lines_of_comments_and_nothing_else() -> None:
    script = """\
    /** What it does.
     * @param {string} a b
     */
    export const f = (x) => {
      // so
      const a = /** @type {any} */ (x); // kept: it shares a line

      return `${x} tokens${x ? `, ${a} kept` : ""}, a  b`;
    };
    /* one line */
    """
    assert compact(script) == (
        "export const f = (x) => {\n"
        "const a = /** @type {any} */ (x); // kept: it shares a line\n"
        'return `${x} tokens${x ? `, ${a} kept` : ""}, a  b`;\n'
        "};\n"
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_line_of_a_script_is_changed_within(path: Path) -> None:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if line.count("`") % 2]  # a template of several lines would lose its indents
    code, inside = [], False
    for line in lines:
        inside = inside or (line.startswith("/*") and not re.search(r"\*/.", line))
        if line and not inside and not line.startswith("//"):
            code.append(line)
        inside = inside and not line.endswith("*/")
    assert compact(path.read_text(encoding="utf-8")).splitlines() == code
