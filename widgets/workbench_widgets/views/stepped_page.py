"""Several views on one HTML file, with a slider that shows other data in all of them; no kernel, server or network."""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from workbench_widgets.colours import DARK, LIGHT
from workbench_widgets.plain_text import in_markup, in_script
from workbench_widgets.views.definition import Definition


class SteppedView(NamedTuple):
    """A view and its field values, for each step of the slider or once for all."""

    view: Definition
    steps: Sequence[Mapping[str, object]]


# Each module has names of its own; what a page's slider needs of a view stands in `shows`.
_MODULE = """
<div id="{name}"></div>
<script type="module">
{source}
const unpacked = async (text) => {{
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new DataView(await new Response(stream).arrayBuffer());
}};
const steps = {steps};
const arrays = {arrays};
const at = async (step) => {{
  const state = {{ ...steps[step] }};
  for (const [name, text] of Object.entries(arrays[step])) state[name] = await unpacked(text);
  return state;
}};
let state = await at(Math.min({start}, steps.length - 1));
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
view.render({{ model, el: document.getElementById("{name}") }});
if (steps.length > 1)
  shows.push(async (step) => {{
    const before = state;
    state = await at(step);
    for (const name of Object.keys(state))
      if (before[name] !== state[name]) for (const handler of handlers[`change:${{name}}`] ?? []) handler();
  }});
</script>
"""
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 24px auto; max-width: 1160px; padding: 0 16px; font: 14px/1.5 system-ui, sans-serif;
  background: light-dark({light}, {dark}); color: light-dark({ink}, {dark_ink}); }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
td, th {{ padding: 4px 12px 4px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); }}
input[type=range] {{ width: min(420px, 60%); vertical-align: middle; }}
{style}</style>
<script>window.shows = [];</script>
<h1>{title}</h1>
{body}
</html>
"""
_SLIDER = """
<p><label for="step">{label}</label>
<input id="step" type="range" min="0" max="{last}" value="{start}">
<output for="step" id="said">{said}</output></p>
<script>
{{
  const said = {steps};
  document.getElementById("step").addEventListener("input", (event) => {{
    document.getElementById("said").textContent = said[event.target.value];
    for (const show of shows) show(Number(event.target.value));
  }});
}}
</script>
"""


def stepped_page(
    title: str, parts: Sequence[str | SteppedView], steps: Sequence[str] = (), *, label: str = "", start: int = 0
) -> str:
    """A page of markup and views. steps: what the slider says at each of its places; with fewer than two there is none.

    The slider stands before the first view that has several steps. start: where it begins.
    """
    style = next((part.view.style for part in parts if isinstance(part, SteppedView)), "")
    body, slid = [], len(steps) < 2
    for number, part in enumerate(parts):
        if isinstance(part, str):
            body.append(part)
            continue
        if not slid and len(part.steps) > 1:
            slid = True
            body.append(
                _SLIDER.format(
                    label=in_markup(label),
                    last=len(steps) - 1,
                    start=start,
                    said=in_markup(steps[start]),
                    steps=in_script(list(steps)),
                )
            )
        body.append(_module(f"view{number}", part, start))
    return _PAGE.format(
        title=in_markup(title),
        light=LIGHT.surface,
        dark=DARK.surface,
        ink=LIGHT.ink,
        dark_ink=DARK.ink,
        style=style,
        body="\n".join(body),
    )


def _module(name: str, part: SteppedView, start: int) -> str:
    view = part.view
    states = [{f.name: values.get(f.name, f.default) for f in view.fields.values()} for values in part.steps]
    arrays = [
        {n: b64encode(zlib.compress(v, 9)).decode() for n, v in state.items() if isinstance(v, bytes) and v}
        for state in states
    ]
    plain = [{n: v for n, v in state.items() if not isinstance(v, bytes)} for state in states]
    head, export, body = view.source.rpartition("export default")
    assert export, f"{view.name} exports no view"
    return _MODULE.format(
        name=name,
        source=f"{head}const view ={body}",
        steps=in_script(plain),
        arrays=in_script(arrays),
        start=start,
    )
