"""Views as one HTML file that needs no kernel, no server and no network; a slider goes through states that were made
beforehand.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench_widgets.colours import DARK, LIGHT
from workbench_widgets.plain_text import in_markup, in_script
from workbench_widgets.views.definition import Definition

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 16px; background: light-dark({light}, {dark}); }}
{style}</style>
{body}
</html>
"""
_REPORT = """main { max-width: 1100px; margin: auto; font: 14px/1.5 system-ui, sans-serif; }
main h1 { font-size: 22px; } main h2 { font-size: 17px; margin: 32px 0 8px; }
main img { max-width: 100%; border-radius: 4px; } main table { border-collapse: collapse; font-size: 13px; }
main td, main th { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; overflow-wrap: anywhere; }
main input[type="range"] { width: 100%; } main section > div { margin: 8px 0; overflow-x: auto; }
"""
# What both hosts give a view, and no more; arrays come compressed, and every browser of today can inflate them.
# Whoever moves a slider sends `state` with a number to the views of its section.
_VIEW = """<div id="view{number}"></div>
<script type="module">
{source}
const plain = {plain};
const packed = {packed};
const states = [];
for (const [at, values] of plain.entries()) {{
  states[at] = {{ ...states[0], ...values }};
  for (const [name, text] of Object.entries(packed[at])) {{
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    states[at][name] = new DataView(await new Response(stream).arrayBuffer());
  }}
}}
let state = {{ ...states[{start}] }};
const handlers = {{}};
const model = {{
  get: (name) => state[name],
  set(name, value) {{
    state[name] = value;
    for (const handler of handlers[`change:${{name}}`] ?? []) handler();
  }},
  save_changes() {{}},
  on: (event, handler) => (handlers[event] ??= []).push(handler),
  off: (event, handler) => (handlers[event] = (handlers[event] ?? []).filter((other) => other !== handler)),
}};
const el = document.getElementById("view{number}");
view.render({{ model, el }});
el.closest("section")?.addEventListener("state", (event) => {{
  const next = states[event.detail];
  const changed = Object.keys(next).filter((name) => next[name] !== state[name]);
  state = {{ ...state, ...next }};
  for (const name of changed) for (const handler of handlers[`change:${{name}}`] ?? []) handler();
}});
</script>
"""
_SLIDER = """<label>{name}: <output></output>
<input type="range" min="0" max="{last}" step="1" value="{start}" aria-label="{name}"></label>
<div class="caption"></div>
<script>
{{
  const section = document.currentScript.closest("section");
  const labels = {labels}, captions = {captions};
  const slider = section.querySelector("input");
  const told = () => {{
    section.querySelector("output").textContent = labels[slider.value];
    section.querySelector(".caption").innerHTML = captions[slider.value];
  }};
  slider.addEventListener("input", () => {{
    told();
    section.dispatchEvent(new CustomEvent("state", {{ detail: Number(slider.value) }}));
  }});
  told();
}}
</script>
"""


@dataclass(frozen=True)
class Live:
    """A view in a page: its definition, and the values of its fields, once for each place of the section's slider."""

    view: Definition
    states: Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading (text), markup below it, and views; with `labels` a slider leads them, each of whose
    places has a label (text) and a caption (markup).
    """

    heading: str
    markup: str = ""
    views: Sequence[Live] = ()
    name: str = ""  # of what the slider changes
    labels: Sequence[str] = ()
    captions: Sequence[str] = ()
    start: int = 0


def standalone(view: Definition, values: Mapping[str, object], title: str) -> str:
    """The page that shows `view` with these field values; others have their defaults."""
    return _page(title or view.name, _shown(Live(view, [values]), 0, 0), view.style)


def report(title: str, sections: Sequence[Section]) -> str:
    """A page of several sections."""
    styles: dict[str, None] = {}  # each once, in order
    parts, number = [f"<h1>{in_markup(title)}</h1>"], 0
    for section in sections:
        parts.append(f"<section>\n<h2>{in_markup(section.heading)}</h2>\n{section.markup}")
        if section.labels:
            parts.append(
                _SLIDER.format(
                    name=in_markup(section.name),
                    last=len(section.labels) - 1,
                    start=section.start,
                    labels=in_script(list(section.labels)),
                    captions=in_script(list(section.captions)),
                )
            )
        for live in section.views:
            number += 1
            styles[live.view.style] = None
            parts.append(_shown(live, number, section.start))
        parts.append("</section>")
    return _page(title, "\n".join(["<main>", *parts, "</main>"]), "".join([*styles, _REPORT]))


def _page(title: str, body: str, style: str) -> str:
    return _PAGE.format(title=in_markup(title), light=LIGHT.surface, dark=DARK.surface, style=style, body=body)


def _shown(live: Live, number: int, start: int) -> str:
    head, export, body = live.view.source.rpartition("export default")
    assert export, f"{live.view.name} exports no view"
    whole = [
        {field.name: values.get(field.name, field.default) for field in live.view.fields.values()}
        for values in live.states
    ]
    # Of the later ones, what differs from the first.
    states = [whole[0], *({n: v for n, v in state.items() if v != whole[0][n]} for state in whole[1:])]
    plain = [{name: value for name, value in state.items() if not isinstance(value, bytes)} for state in states]
    packed = [
        {name: b64encode(zlib.compress(value, 9)).decode() for name, value in state.items() if isinstance(value, bytes)}
        for state in states
    ]
    kept = [{name: text for name, text in state.items() if states[at][name]} for at, state in enumerate(packed)]
    return _VIEW.format(
        number=number,
        source=f"{head}const view ={body}",
        plain=in_script(plain),
        packed=in_script(kept),
        start=start,
    )
