"""What comes from outside is shown as text: planted markup makes no element and runs no script anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import ipywidgets
import numpy as np
import pandas as pd
import plotly
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import workbench as wb
from tests.waiting import until
from tests.widgets.browser import Watched, watched_page
from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod
from workbench.models import tiny
from workbench.registry import _METHODS, Fidelity, Method, Paper, Preset, param, registered
from workbench_widgets import AnswerDiff, Heatmap, KeptRaster, MapGrid, TokenText, figures
from workbench_widgets.control_panel import Controls
from workbench_widgets.notebook import PlanView, RunView, memory_figure, session_html
from workbench_widgets.notebook.attention_view import AttentionView
from workbench_widgets.notebook.method_controls import MethodControls
from workbench_widgets.plain_text import in_label, in_markup, in_script, out_of_markup

# Without blanks, so that each can be a token, a word of an answer or a folder's name.
PLANTED = (
    "<img/src=x/onerror=planted()>",
    "<svg/onload=planted()>",
    "<b/class=planted>bold</b>",
    '<a/href="javascript:planted()">link</a>',
    "<script>planted()</script>",
    "</script><script>planted()</script>",
    "</textarea></title></style><i/class=planted>",
    "![planted](x)",
    "[link](javascript:planted())",
    "**`planted`**",
    '"onmouseover="planted()"class="planted',
    "&lt;u/class=planted&gt;",
    "%{meta[0]}$x^2$:material/home:",
)
EVERY = " ".join(PLANTED)

WATCH = "window.ran = []; window.planted = () => window.ran.push(1); window.alert = window.planted; 0;"

# Every element of the page, those in shadow roots too, that only planted markup can have made.
FOUND = """() => {
  const found = [];
  const walk = (root) => {
    for (const element of root.querySelectorAll("*")) {
      if (element.shadowRoot) walk(element.shadowRoot);
      const link = element.getAttribute("href") ?? element.getAttribute("xlink:href") ?? "";
      const handlers = element.getAttributeNames().filter((name) => name.startsWith("on"));
      const planted = element.classList.contains("planted") || handlers.length || /^\\s*javascript:/i.test(link)
        || (element.localName === "img" && ["x", "x/onerror=planted()"].includes(element.getAttribute("src")))
        || (element.localName === "script" && /^planted\\(\\)/.test(element.textContent))
        || (["strong", "code", "em"].includes(element.localName) && /planted/.test(element.textContent));
      if (planted) found.push(element.outerHTML.slice(0, 200));
    }
  };
  walk(document);
  return [...found, ...window.ran.map(() => "a script ran")];
}"""


class _Text(HTMLParser):
    """What a reader of HTML sees: text only, or the names of elements too."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", []
        self.feed(page)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", data))

    handle_decl = unknown_decl = handle_pi = handle_comment


# -- the function


@given(st.text() | st.lists(st.sampled_from(PLANTED)).map("".join))
def test_text_in_markup_is_that_text_and_no_element(text: str) -> None:
    shown = in_markup(text)
    read = _Text(f'<p title="{shown}">{shown}</p>')
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    assert read.text == clean == out_of_markup(shown)
    assert read.tags == [("p", {"title": clean})]
    assert "$" not in shown and "%{" not in shown  # formulas, and Plotly's templates
    shown.encode()


@given(st.recursive(st.text() | st.integers() | st.none(), st.lists) | st.lists(st.sampled_from(PLANTED)))
def test_a_value_in_a_script_is_that_value_and_ends_nothing(value: Any) -> None:
    written = in_script(value)
    assert json.loads(written) == value
    assert written.isascii() and "<" not in written and "\n" not in written


def test_a_label_shows_the_name_of_an_icon_as_text() -> None:
    assert re.search(r":material/(\w+)", in_label("a :material/home: b")) is None
    assert in_label("a :material/home: b").replace("\u2060", "") == "a :material/home: b"
    assert in_label(EVERY.replace(":material", "")) == EVERY.replace(":material", "")


# -- figures and notebooks


def _frames() -> dict[str, Callable[[], Any]]:
    names = list(PLANTED)
    numbers = np.arange(1.0, len(names) + 1)
    steps = pd.DataFrame({"step": [0, 1], **{name: [1, 2] for name in names}, "event": [EVERY, EVERY]})
    runs = pd.DataFrame({"method": names, "nbytes": numbers * 2**20, "kl": numbers, "budget": names})
    return {
        "memory": lambda: figures.memory_timeline(steps, title=EVERY),
        "profile": lambda: figures.outlier_profile(pd.DataFrame({"layer": [0], "absmax": [1.0]}), title=EVERY),
        "lines": lambda: figures.lines(
            [0, 1], {name: [1, 2] for name in names}, title=EVERY, x_title=EVERY, y_title=EVERY
        ),
        "bars": lambda: figures.bars(names, numbers, title=EVERY, x_title=EVERY, y_title=EVERY),
        "received": lambda: figures.received_line(numbers, names, title=EVERY),
        "pareto": lambda: figures.pareto(runs, title=EVERY),
    }


@pytest.fixture
def watched(chromium: Any) -> Iterator[Watched]:
    made = watched_page(chromium)
    made.page.add_init_script(WATCH)
    made.page.on("dialog", lambda dialog: (made.errors.append("a dialog"), dialog.dismiss()))
    yield made
    made.page.close()
    assert made.errors == []
    assert made.outside == []


@pytest.mark.browser
def test_plotly_shows_names_titles_ticks_and_hover_texts_as_they_are(watched: Watched) -> None:
    page = watched.page
    page.goto("about:blank")
    page.evaluate(WATCH)
    page.add_script_tag(path=Path(plotly.__file__).parent / "package_data" / "plotly.min.js")
    for kind, draw in _frames().items():
        page.set_content("<div id=figure style='width:1200px'></div>")
        page.evaluate("figure => Plotly.newPlot('figure', figure)", json.loads(draw().to_json()))
        points = page.evaluate("document.getElementById('figure').data.length")
        for curve in range(points):
            page.evaluate(
                "curve => Plotly.Fx.hover('figure', [{curveNumber: curve, pointNumber: 0}])", min(curve, points - 1)
            )
            assert page.evaluate(FOUND) == [], kind
            assert page.locator("#figure svg a, #figure svg [style*='bold']").count() == 0, kind
        texts = page.evaluate("[...document.querySelectorAll('#figure svg text')].map((text) => text.textContent)")
        told = " ".join(" ".join(texts).split())
        assert EVERY in told, kind
        if kind == "memory":  # so many names have no room in a legend: they are told where one points
            assert [name for name in PLANTED if " ".join(name.split()) not in told] == []
        if kind in ("lines", "bars", "pareto"):
            assert [name for name in PLANTED if texts.count(name) == 0] == [], kind


def _widgets(root: Any) -> Iterator[Any]:
    yield root
    for child in getattr(root, "children", ()):
        yield from _widgets(child)


@pytest.fixture(scope="module")
def planted_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is markup."""
    names = [PLANTED[i] if i < len(PLANTED) else f"<b/class=planted>{i}</b>" for i in range(256)]
    tokenizer = Tokenizer(models.WordLevel(vocab={name: i for i, name in enumerate(names)}, unk_token=names[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


class Planted(KVMethod):
    __doc__ = f"Keep {EVERY}."
    key, title, claim = PLANTED[2], EVERY, "none"
    paper = Paper(EVERY, EVERY, '"onmouseover="planted()"><b class=planted>')
    fidelity = Fidelity("deviates", EVERY)
    presets = (Preset(EVERY, EVERY, word=EVERY),)
    word: str = param(EVERY, help=EVERY, unit=EVERY, own=EVERY)

    def score(self, layer: Any) -> Any:
        if self.word == "fail":
            raise NotApplicable(EVERY)
        return layer.keys.norm(dim=-1)


@pytest.fixture
def planted_method(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    monkeypatch.setitem(_METHODS, Planted.key, Planted)
    return Planted


@pytest.mark.browser
def test_notebooks_show_models_prompts_tokens_answers_methods_and_errors_as_text(
    watched: Watched, planted_tokenizer: Any, planted_method: Any, tmp_path: Path
) -> None:
    folder = tmp_path / EVERY.replace("/", "\u2215")[:200]
    model = tiny()
    model.save_pretrained(folder)
    planted_tokenizer.save_pretrained(folder)
    session = wb.Session(folder)
    session.read(EVERY)
    run = session.run(planted_method(budget=0.5), question=EVERY, max_new_tokens=4)
    controls = Controls(session, method=planted_method.key, max_new_tokens=2)
    made = [RunView(run), PlanView(run.plan), controls, AttentionView(session, heads=False)]
    made.append(MethodControls(EVERY, registered("kv"), planted_method.key, lambda: None, optional=True))
    controls.run()
    until(lambda: not controls.run_button.disabled)
    controls.first._controls["word"].value = "fail"
    assert controls._planner is not None and controls._planner.wait()
    shown = [*made, ipywidgets.HTML(session_html(session))]
    pages = [widget.value for root in shown for widget in _widgets(root) if isinstance(widget, ipywidgets.HTML)]
    controls.close()
    assert not any(getattr(widget, "description_allow_html", False) for root in shown for widget in _widgets(root))
    watched.page.goto("about:blank")
    watched.page.evaluate(WATCH)
    watched.page.set_content("\n".join(pages))
    watched.page.wait_for_timeout(200)
    assert watched.page.evaluate(FOUND) == []
    text = watched.page.locator("body").text_content()
    assert text.count(PLANTED[0]) > 5 and text.count(PLANTED[3]) > 5
    title = memory_figure(run.memory, EVERY).layout.title.text
    assert unescape(title).startswith(EVERY)


@pytest.mark.browser
@pytest.mark.parametrize("view", ["heatmap", "tokens", "raster", "grid", "answers"])
def test_a_saved_page_shows_tokens_labels_and_its_title_as_text(watched: Watched, tmp_path: Path, view: str) -> None:
    tokens = [*PLANTED, "\u2028", "\ud800", "\x00"]
    n, named = len(tokens), {"label": EVERY, "title": EVERY}
    pages: dict[str, Callable[[], str]] = {
        "heatmap": lambda: Heatmap.html(
            np.ones((n, n)), tokens=tokens, note=EVERY, unit=EVERY, row_title=EVERY, **named
        ),
        "tokens": lambda: TokenText.html(tokens, values=np.arange(n), what=EVERY, **named),
        "raster": lambda: KeptRaster.html(np.ones((1, 1, n), bool), tiers=["dropped", EVERY], tokens=tokens, **named),
        "grid": lambda: MapGrid.html(np.ones((1, 1, 4, 4)), classes=[EVERY], measures={EVERY: [1.0]}, **named),
        "answers": lambda: AnswerDiff.html(tokens, tokens[1:], left_label=EVERY, right_label=EVERY, title=EVERY),
    }
    path = tmp_path / "page.html"
    path.write_text(pages[view](), encoding="utf-8")
    page = watched.page
    page.goto(path.as_uri())
    page.wait_for_selector(".wb-view[data-paint-ms]")
    for target in page.locator("canvas, [data-i]").all()[:3]:
        box = target.bounding_box()
        if box and box["width"] > 4 and box["height"] > 4:
            target.hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
    assert page.evaluate(FOUND) == []
    assert page.title() == " ".join(EVERY.split())
    assert EVERY in page.locator("body").inner_text() or view == "answers"


# -- the app


@pytest.mark.browser
def test_the_app_shows_everything_from_outside_as_text(
    watched: Watched, served_app: Callable[[], str], planted_tokenizer: Any, planted_method: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "<img src=x onerror=planted()><b class=planted>"
    tiny().save_pretrained(folder)
    planted_tokenizer.save_pretrained(folder)
    page = watched.page
    page.set_default_timeout(60_000)
    state = {
        "model": str(folder),
        "example": "",
        "text": f"{EVERY} " * 3,
        "question": EVERY,
        "kv": planted_method.key,
        "budget": "60%",
        "tokens": "4",
        "weights": EVERY,
        "store": PLANTED[2],
        "values": json.dumps({"snapkv": {EVERY: EVERY}, EVERY: {}}),
    }
    page.goto(f"{served_app()}?{urlencode(state)}")
    alerts = page.get_by_role("alert")
    alerts.filter(has_text="Parts of this link").wait_for()
    assert PLANTED[2] in alerts.first.text_content()
    page.get_by_role("button", name=re.compile("^Read")).first.click()
    page.locator("text=tokens read").filter(has_text="<img src=x").wait_for()
    page.locator(".row > div:has(.name:text-is('KV cache')) .value").wait_for()
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator(".row > div:has(.name:text-is('KL divergence')) .value").wait_for()
    assert page.evaluate(FOUND) == []
    for tab, shows in {
        "Attention": ".js-plotly-plot",
        "Head error": "text=Relative error of each head",
        "Outliers": ".js-plotly-plot",
        "Memory": ".js-plotly-plot",
        "Runs": ".tabulator-row",
        "Weights": "text=Choose a weight method",
        "Tokens": "text=Kept positions",
    }.items():
        page.get_by_role("tab", name=tab).click()
        page.wait_for_selector(shows)
        page.mouse.move(800, 600)
        page.mouse.move(700, 700)
        page.wait_for_timeout(200)
        assert page.evaluate(FOUND) == [], tab
        if tab == "Runs":
            assert any(name in page.locator(".tabulator-row").first.text_content() for name in PLANTED)
    for icon in page.locator("[data-testid=InfoOutlinedIcon]").all():
        icon.hover()
        page.wait_for_timeout(50)
        assert page.evaluate(FOUND) == []
    page.get_by_label("KV cache: which tokens stay").first.click()  # its menu
    page.get_by_role("option").first.wait_for()
    assert page.evaluate(FOUND) == []
    page.keyboard.press("Escape")
    page.get_by_label("Word").first.fill("fail")
    page.get_by_label("Word").first.press("Enter")
    alerts.filter(has_text=PLANTED[3]).wait_for()
    assert PLANTED[9] in alerts.filter(has_text=PLANTED[3]).text_content()
    page.get_by_label("Exactly").fill(PLANTED[0])  # a budget is short: longer ones are not read at all
    page.get_by_label("Exactly").press("Enter")
    alerts.filter(has_text="cannot be read").wait_for()
    page.get_by_label("Model", exact=False).first.fill(f"none {EVERY}")
    page.get_by_role("button", name=re.compile("^Read")).first.click()
    alerts.filter(has_text="no model").wait_for()
    page.get_by_role("button", name="Python").click()
    page.locator("pre").filter(has_text="#").wait_for()
    assert page.evaluate(FOUND) == []
