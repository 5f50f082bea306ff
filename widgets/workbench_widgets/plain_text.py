"""What comes from outside, shown as the text it is: names, addresses, prompts, tokens, answers, errors.

HTML panes, HTML widgets and Plotly take markup: `in_markup`. Labels, options and descriptions of Material components
take text with icons in it: `in_label`. A page with a script in it takes JSON: `in_script`. Nothing else is needed:
text fields, tables, tooltips and the views of this package put text into a page as text.
"""

from __future__ import annotations

import json
import re
from html import unescape
from types import MappingProxyType

# Plotly knows few names of signs, none of a quote. "$" begins a formula where a notebook has MathJax.
_MARKUP = MappingProxyType(str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "$": "&#36;"}))
_UNSHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # not in HTML, SVG or UTF-8
_ICON = re.compile(r":(?=material/)")
_JOINER = "\u2060"  # takes no room and lets nothing break


def in_markup(text: object) -> str:
    """`text` for a place that reads HTML (an attribute in double quotes too), or the markup, templates and formulas of
    Plotly.
    """
    shown = _UNSHOWN.sub("\ufffd", str(text)).translate(_MARKUP)
    return shown.replace("%{", "&#37;{")


def out_of_markup(markup: str) -> str:
    """The text that `in_markup` was given."""
    return unescape(markup)


def in_label(text: object) -> str:
    """`text` for a label, option or description of a Material component, which draws `:material/home:` as an icon."""
    return _ICON.sub(f":{_JOINER}", str(text))


def in_script(value: object) -> str:
    """`value` as JSON for a script in a page: nothing in it can end the script, or a line of it."""
    return json.dumps(value).replace("<", "\\u003c")
