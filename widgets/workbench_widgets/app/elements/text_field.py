"""Fields for text of any length: those of Panel cut what is typed or pasted at 5,000 characters and do not say so."""

from __future__ import annotations

import panel_material_ui as pmu
import param

_UNLIMITED = 2**31 - 1  # the largest length that browsers know


class TextField(pmu.TextInput):
    """A line of text."""

    max_length = param.Integer(default=_UNLIMITED)


class TextArea(pmu.TextAreaInput):
    """Several lines of text."""

    max_length = param.Integer(default=_UNLIMITED)
