"""A view as one HTML file that needs no kernel, no server and no network."""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Mapping

from workbench_widgets.colours import DARK, LIGHT
from workbench_widgets.plain_text import in_markup, in_script
from workbench_widgets.views.definition import Definition

# What both hosts give a view, and no more; arrays come compressed, and every browser of today can inflate them.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 16px; background: light-dark({light}, {dark}); }}
{style}</style>
<div id="view"></div>
<script type="module">
{source}
const state = {state};
const packed = {packed};
for (const [name, text] of Object.entries(packed)) {{
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  state[name] = new DataView(await new Response(stream).arrayBuffer());
}}
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
view.render({{ model, el: document.getElementById("view") }});
</script>
</html>
"""


def standalone(view: Definition, values: Mapping[str, object], title: str) -> str:
    """The page that shows `view` with these field values; others have their defaults."""
    state = {field.name: values.get(field.name, field.default) for field in view.fields.values()}
    arrays = {name: value for name, value in state.items() if isinstance(value, bytes)}
    plain = {name: value for name, value in state.items() if name not in arrays}
    packed = {name: b64encode(zlib.compress(value, 9)).decode() for name, value in arrays.items() if value}
    head, export, body = view.source.rpartition("export default")
    assert export, f"{view.name} exports no view"
    return _PAGE.format(
        title=in_markup(title or view.name),
        light=LIGHT.surface,
        dark=DARK.surface,
        style=view.style,
        source=f"{head}const view ={body}",
        state=in_script(plain),
        packed=in_script(packed),
    )
