"""Every colour the views use, declared once: Python draws figures with them, the JavaScript modules receive them as
constants.

Sequential ramps rise steadily in lightness and categorical colours follow Okabe and Ito (2008), so both survive the
common kinds of colour blindness and a grey printer. On each theme zero looks like the page and more stands out more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
PAPER = ("#fffbe0", "#d8ecb6", "#9dd3a8", "#57b3ad", "#2f8aab", "#2c5f9c", "#35357f", "#260a45")


@dataclass(frozen=True)
class Theme:
    """The colours of one theme.

    `share` shades a share from 0 to 1 behind text, `sequential` maps a quantity on a canvas, `diverging` a difference
    (blue below zero, orange above: told apart by every common kind of sight), `categories` tell kinds apart (precision
    tiers, memory categories); the rest are surfaces and ink.
    """

    surface: str
    ink: str
    muted: str
    line: str
    accent: str
    mark: str
    share: tuple[str, ...]
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]
    categories: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    ink="#1b1f24",
    muted="#5d6670",
    line="#d5dae0",
    accent="#0062a3",
    mark="#b34700",
    share=("#ffffff", "#d6e8f7", "#9ccaeb", "#549fd4", "#0f6db3", "#06457a"),
    sequential=PAPER,
    diverging=("#053061", "#2166ac", "#4393c3", "#a6cee3", "#ffffff", "#fdc590", "#e5832a", "#b35806", "#7f3b08"),
    categories=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442"),
)
DARK = Theme(
    surface="#121212",
    ink="#e8eaed",
    muted="#a3abb5",
    line="#3a4048",
    accent="#6db9f0",
    mark="#ff9d5c",
    share=("#121212", "#12304a", "#14507f", "#2f80ba", "#73b5e0", "#c9e5f8"),
    sequential=VIRIDIS,
    diverging=("#c6e4ff", "#6db9f0", "#2f80ba", "#17466b", "#121212", "#6b3a10", "#c26a1c", "#ff9d4a", "#ffe0bf"),
    categories=("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#3d7fc4"),
)


def theme(dark: bool = False) -> Theme:
    """The colours of the dark theme, or of the light one."""
    return DARK if dark else LIGHT


def css_variables() -> str:
    """CSS that defines `--wb-ink` and the like for `.wb-view`, and for `.wb-view.wb-dark`."""

    def block(selector: str, colours: Theme) -> str:
        names = ("surface", "ink", "muted", "line", "accent", "mark")
        return f"{selector} {{ {' '.join(f'--wb-{name}: {getattr(colours, name)};' for name in names)} }}"

    return f"{block('.wb-view', LIGHT)}\n{block('.wb-view.wb-dark', DARK)}\n"


def js_constants() -> str:
    """JavaScript that declares `THEMES.light` and `THEMES.dark`, for the head of every module."""
    themes = {"light": vars(LIGHT), "dark": vars(DARK)}
    return f"const THEMES = {json.dumps(themes)};\n"
