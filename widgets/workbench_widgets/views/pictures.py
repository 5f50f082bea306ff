"""Views as still pictures, for places where no script runs: GitHub, an export, a notebook that is not trusted yet.

A picture is drawn in the light theme on its own ground, so that it reads on a dark page too, and kept small: 800
pixels wide, in a palette.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import MissingExtra
from workbench_widgets.colours import LIGHT
from workbench_widgets.views.wire import unpack

PNG = "image/png"
_WIDTH, _DPI = 7.6, 100  # inches, dots to the inch: 760 pixels
_COLOURS = 64  # of the palette
_LETTERS, _LINES = 100, 9  # of a text
_ROW = 0.2  # inches a line of text
_SIDES = 640  # cells of a map along each side: more cannot be told apart


@dataclass(frozen=True)
class Drawing:
    """A part of a picture: its height in inches, and what paints it into axes of matplotlib."""

    height: float
    paint: Callable[[Any], None]


def png(drawings: Sequence[Drawing], title: str = "") -> bytes:
    """Drawings below each other as a PNG of at most 800 pixels. Raises MissingExtra where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("still pictures need matplotlib: pip install 'inference-workbench[notebooks]'") from error
    top = 0.3 if title else 0.0
    figure = Figure(figsize=(_WIDTH, sum(part.height for part in drawings) + top), dpi=_DPI, facecolor=LIGHT.surface)
    if title:
        figure.suptitle(
            shortened(drawable(title), 105), x=0.01, ha="left", fontsize=10, color=LIGHT.ink, parse_math=False
        )
    figure.set_layout_engine("constrained")
    rows = figure.subplots(len(drawings), 1, squeeze=False, height_ratios=[part.height for part in drawings])
    for axes, part in zip(rows[:, 0], drawings, strict=True):
        part.paint(axes)
    canvas: Any = FigureCanvasAgg(figure)  # which has no types
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    stored = io.BytesIO()
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
    return stored.getvalue()


def shortened(text: str, letters: int) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def label(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Titles and the look that all pictures share."""
    plain = {"color": LIGHT.ink, "parse_math": False}
    axes.set_facecolor(LIGHT.surface)
    axes.set_title(shortened(drawable(title), 105), loc="left", fontsize=9, **plain)
    axes.set_xlabel(drawable(x), fontsize=8, **plain)
    axes.set_ylabel(drawable(y), fontsize=8, **plain)
    axes.tick_params(labelsize=8, colors=LIGHT.muted)
    for side in axes.spines.values():
        side.set_color(LIGHT.line)


def drawable(text: str) -> str:
    """`text` with a square for every letter that the font of the pictures lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    text = text.expandtabs(2)
    return "".join(letter if font.get_char_index(ord(letter)) else "□" for letter in text)


def kept(fields: Mapping[str, Any]) -> Drawing:
    """Of a KeptRaster: a row for each layer and head, a column for each position."""
    cells = unpack(fields["kept"])
    tiers = cells[0] if cells.ndim == 3 else cells
    share = cells[1] / 255 if cells.ndim == 3 else np.ones(tiers.shape)
    colours = np.array([_rgb(colour) for colour in ("#eef1f4", *LIGHT.categories)])
    paper = colours[0]
    shades = paper + (colours[np.minimum(tiers, len(colours) - 1)] - paper) * share[..., None]

    def paint(axes: Any) -> None:
        rows = max(len(tiers), 1)
        extent = (0, max(int(fields["positions"]), 1), rows, 0)
        axes.imshow(thinned(shades), aspect="auto", interpolation="nearest", extent=extent)
        heads, numbers = max(int(fields["heads"]), 1), fields["numbers"] or range(int(fields["layers"]))
        step = max(1, len(numbers) // 10)
        places = [(place + 0.5) * heads for place in range(0, len(numbers), step)]
        axes.set_yticks(places, [str(numbers[i]) for i in range(0, len(numbers), step)])
        label(axes, fields["label"], "position", "layer")
        names = fields["tiers"][1:]
        for name, colour in zip(names, LIGHT.categories, strict=False):
            axes.plot([], [], "s", color=colour, label=drawable(name))
        if names:
            axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=8, borderpad=0)

    return Drawing(2.6, paint)


def heatmap(fields: Mapping[str, Any]) -> Drawing:
    """Of a Heatmap."""
    tiles = unpack(fields["tiles"])
    knots = unpack(fields["knots"])

    def paint(axes: Any) -> None:
        r0, r1, c0, c1 = fields["window"] or fields["extent"]
        shades = coloured(tiles, diverging=fields["diverging"])
        square = tiles.ndim == 2 and tiles.shape[0] == tiles.shape[1]
        axes.imshow(
            thinned(shades),
            aspect="equal" if square else "auto",
            interpolation="nearest",
            extent=(c0, max(c1, c0 + 1), max(r1, r0 + 1), r0),
        )
        for side, names in (("x", fields["column_labels"]), ("y", fields["row_labels"])):
            if 0 < len(names) <= 40:
                step = max(1, len(names) // 14)
                getattr(axes, f"set_{side}ticks")(
                    [i + 0.5 for i in range(0, len(names), step)], [drawable(n) for n in names[::step]]
                )
        spans = f", {knots[0]:.3g} to {knots[-1]:.3g}{fields['unit']}" if knots.size else ""
        label(axes, f"{fields['label']}{spans}", fields["column_title"], fields["row_title"])

    tall = tiles.ndim == 2 and len(tiles) > 12
    return Drawing(4.2 if tall else 1.8, paint)


def grid(fields: Mapping[str, Any]) -> Drawing:
    """Of a MapGrid: layers are rows, heads are columns."""
    tiles, places = unpack(fields["tiles"]), unpack(fields["places"])
    if tiles.ndim != 3 or not len(tiles):
        return words([fields["label"]])
    layers, heads = (list(dict.fromkeys(places[:, i].tolist())) for i in (0, 1))
    side = tiles.shape[1]
    small = max(1, side // max(4, _SIDES // max(len(heads), len(layers))))
    tiles = tiles[:, : side // small * small, : side // small * small]
    side //= small
    pooled = tiles.reshape(len(tiles), side, small, side, small).max(axis=(2, 4))
    sheet = np.zeros((len(layers) * (side + 1), len(heads) * (side + 1)), np.uint8)
    for tile, (layer, head) in zip(pooled, places.tolist(), strict=True):
        top, left = layers.index(layer) * (side + 1), heads.index(head) * (side + 1)
        sheet[top : top + side, left : left + side] = tile

    def paint(axes: Any) -> None:
        axes.imshow(
            coloured(sheet, diverging=fields["diverging"]), interpolation="nearest",
            extent=(0, len(heads), len(layers), 0), aspect="auto",
        )  # fmt: skip
        rows = range(0, len(layers), max(1, len(layers) // 10))
        axes.set_yticks([row + 0.5 for row in rows], [str(layers[row]) for row in rows])
        axes.set_xticks([head + 0.5 for head in range(len(heads))], [str(head) for head in heads])
        label(axes, fields["label"], "head", "layer")

    return Drawing(min(5.0, 0.8 + 0.45 * len(layers)), paint)


def tokens(fields: Mapping[str, Any]) -> Drawing:
    """Of a TokenText: the tokens, shaded by what they are worth."""
    levels = unpack(fields["levels"])
    texts = fields["tokens"]
    if fields["tiers"] and levels.size:
        shades = ["#ffffff" if tier == 0 else LIGHT.categories[(tier - 1) % 7] + "66" for tier in levels.tolist()]
    elif levels.size:
        knots = unpack(fields["knots"])
        share = np.searchsorted(knots, levels) / max(len(knots), 1) if knots.size else levels
        steps = np.minimum((np.asarray(share) * 3.99).astype(int), 3)  # the lighter ones: the ink stays dark
        shades = [LIGHT.share[step] for step in steps]
    else:
        shades = [LIGHT.surface] * len(texts)
    return spans([(text, shade) for text, shade in zip(texts, shades, strict=True)], fields["label"])


def answers(fields: Mapping[str, Any]) -> list[Drawing]:
    """Of an AnswerDiff: both answers, what differs on a ground."""
    first = fields["first_difference"]

    def side(name: str) -> Drawing:
        texts = fields[name]
        if name == "left" and fields["waiting"]:
            return words([f"{fields['left_label']}: {fields['waiting']}"])
        marked = [(text, LIGHT.surface if first is None or i < first else "#fdc590") for i, text in enumerate(texts)]
        return spans(marked, fields[f"{name}_label"])

    return [side("left"), side("right")]


def words(lines: Sequence[str]) -> Drawing:
    """Lines of text."""
    return spans([(f"{line}\n", LIGHT.surface) for line in lines], lines=len(lines) + 4)


def spans(parts: Sequence[tuple[str, str]], title: str = "", lines: int = _LINES) -> Drawing:
    """Parts of a text, each on a ground of its own, in lines that break where they are full."""
    rows: list[list[tuple[str, str]]] = [[]]
    used = 0
    for text, ground in parts:
        for number, line in enumerate(text.split("\n")):
            if number:
                rows.append([])
                used = 0
            rest = line
            while rest:
                if used == _LETTERS or (used + len(rest) > _LETTERS and used > _LETTERS - 12):
                    rows.append([])
                    used = 0
                piece, rest = rest[: _LETTERS - used], rest[_LETTERS - used :]
                rows[-1].append((piece, ground))
                used += len(piece)
    while rows and not rows[-1]:
        rows.pop()
    cut = len(rows) > lines
    shown = rows[:lines] if cut else rows

    def paint(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        axes.set_xlim(0, _LETTERS)
        axes.set_ylim(max(len(shown), 1), 0)
        label(axes, f"{title}{' (the beginning)' if cut else ''}" if title else "")
        axes.set_axis_off()
        for y, row in enumerate(shown):
            x = 0
            for text, ground in row:
                if ground != LIGHT.surface:
                    axes.add_patch(Rectangle((x, y), len(text), 1, color=ground, linewidth=0))
                axes.text(
                    x, y + 0.5, drawable(text), fontsize=8.6, family="DejaVu Sans Mono", va="center", color=LIGHT.ink,
                    parse_math=False,
                )  # fmt: skip
                x += len(text)

    return Drawing(_ROW * max(len(shown), 1) + (0.25 if title else 0.05), paint)


def coloured(levels: NDArray[Any], *, diverging: bool = False) -> NDArray[Any]:
    """Levels 0..255 as RGB in 0..1; 0 is the ground."""
    ramp = np.array([_rgb(colour) for colour in (LIGHT.diverging if diverging else LIGHT.sequential)])
    at = np.linspace(0, len(ramp) - 1, 255)
    table = np.stack([np.interp(at, np.arange(len(ramp)), ramp[:, channel]) for channel in range(3)], axis=1)
    table = np.vstack([_rgb(LIGHT.surface), np.round(table * 24) / 24])  # few colours: the file stays small
    found: NDArray[Any] = table[levels]
    return found


def thinned(shades: NDArray[Any]) -> NDArray[Any]:
    """At most as many rows and columns as can be told apart."""
    down, across = (max(1, -(-size // _SIDES)) for size in shades.shape[:2])
    if (down, across) == (1, 1):
        return shades
    rows, columns = shades.shape[0] // down * down, shades.shape[1] // across * across
    cut = shades[:rows, :columns].reshape(rows // down, down, columns // across, across, -1)
    means: NDArray[Any] = cut.mean(axis=(1, 3))
    return means


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
