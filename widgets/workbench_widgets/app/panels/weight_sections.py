"""What each section of the Weights tab shows, as a function of a session, a recipe's weight methods and the choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.session import Session
from workbench_widgets import weight_views
from workbench_widgets.app.work.lru_cache import Recent
from workbench_widgets.present import Figure


@dataclass(frozen=True)
class Asked:
    """What is to be looked at. recipe: of weight methods only; None: the model as it is. memory: what is known."""

    session: Session
    recipe: Recipe | None
    memory: Recent
    layer: int
    module: str
    measure: str
    kind: str
    each: str
    dark: bool


class Look(NamedTuple):
    """What a section shows, each part where there is one."""

    numbers: list[Figure] = []  # noqa: RUF012  (nobody adds to it)
    map: dict[str, Any] | None = None
    figures: tuple[Any, ...] = ()
    table: pd.DataFrame | None = None
    said: str = ""


@dataclass(frozen=True)
class Section:
    """One section: which choices it has, whether it needs a recipe, and how it is made."""

    title: str
    make: Callable[[Asked, Progress], Look]
    choices: tuple[str, ...] = ()
    needs_recipe: bool = False
    asks_first: tuple[str, str] = field(default=("", ""))  # the button that starts it, and what it says beside it


def layers(asked: Asked, progress: Progress) -> Look:
    """Errors, bits, ranks and densities over layers and modules."""
    census = census_of(asked, progress)
    measure = asked.measure if asked.measure in weight_views.chosen(census) else weight_views.chosen(census)[0]
    return Look(weight_views.weight_figures(census), weight_views.weight_map(census, measure), table=_rows(census))


def spectra(asked: Asked, progress: Progress) -> Look:
    """The singular values of one weight, before and after."""

    def one(recipe: Recipe | None) -> Any:
        key = ("spectrum", recipe, asked.layer, asked.module)
        found = asked.memory.once(
            key, lambda: asked.session.spectra(recipe, layer=asked.layer, module=asked.module, progress=progress)
        )
        return found[0] if len(found) else None

    before, after = one(None), None if asked.recipe is None else one(asked.recipe)
    if before is None:
        return Look(said="This layer has no module of this name.")
    return Look(weight_views.ranks(before, after), figures=(weight_views.spectrum(before, after, dark=asked.dark),))


def outliers(asked: Asked, progress: Progress) -> Look:
    """Outliers of weights or activations, by layer and by channel, before and after."""

    def one(recipe: Recipe | None) -> pd.DataFrame:
        frame = asked.memory.once(
            ("outliers", asked.kind, recipe),
            lambda: asked.session.outliers(asked.kind, recipe, progress=progress),  # type: ignore[arg-type]
        )
        return frame[frame.module == asked.module] if "module" in frame else frame

    before, after = one(None), None if asked.recipe is None else one(asked.recipe)
    of = f"the weights of {asked.module}" if asked.kind == "weights" else "what enters the layers"
    return Look(
        figures=(
            weight_views.outlier_layers(before, after, of=of, dark=asked.dark),
            weight_views.outlier_channels(before, after, asked.layer, of=of, dark=asked.dark),
        )
    )


def rounding(asked: Asked, progress: Progress) -> Look:
    """How well inputs lend themselves to rounding, before and after."""

    def one(recipe: Recipe | None) -> pd.DataFrame:
        return asked.memory.once(("rounding", recipe), lambda: asked.session.rounding(recipe, progress=progress))

    before, after = one(None), None if asked.recipe is None else one(asked.recipe)
    return Look(
        figures=(
            weight_views.kernel_lines(before, after, asked.module, dark=asked.dark),
            weight_views.space_lines(before, after, asked.module, dark=asked.dark),
        )
    )


def sensitivity(asked: Asked, progress: Progress) -> Look:
    """Which layer hurts."""
    found = asked.memory.once(
        sensitivity_key(asked),
        lambda: asked.session.sensitivity(asked.recipe, each=asked.each, progress=progress),  # type: ignore[arg-type]
    )
    if asked.each == "module":
        inside = found[found.layer.notna()]
        names = list(dict.fromkeys(inside.module))
        grid = inside.pivot_table(index="layer", columns="module", values="kl", dropna=False).reindex(columns=names)
        label = "KL of each module compressed alone, nats a token"
        return Look(map=weight_views.grid_map(grid.to_numpy(float), names, label), table=found)
    return Look(
        figures=(
            weight_views.hurting_layers(found, dark=asked.dark),
            weight_views.hurting_modules(found, dark=asked.dark),
        )
    )


def left_alone(asked: Asked, progress: Progress) -> Look:
    """What keeps its precision, and why."""
    left = weight_views.left_alone(census_of(asked, progress))
    said = "" if len(left) else "Every weight matrix is compressed."
    return Look(table=left if len(left) else None, said=said)


def census_of(asked: Asked, progress: Progress) -> pd.DataFrame:
    recipe = asked.recipe
    assert recipe is not None
    return asked.memory.once(("census", recipe), lambda: asked.session.census(recipe, progress=progress))


def sensitivity_key(asked: Asked) -> Any:
    """Under what the memory knows a sensitivity."""
    return ("sensitivity", asked.recipe, asked.each)


def _rows(census: pd.DataFrame) -> pd.DataFrame:
    shown = census.assign(mib=census.bytes / 2**20, rank=census["rank"].astype(float), chosen=census.chosen.fillna(""))
    kept = ("name", "form", "bits", "rank", "density", "mib", "share", "weight_error", "output_error", "chosen")
    said = [name for name in kept if shown[name].replace("", None).notna().any()]
    return shown[said].assign(name=shown.name.str.removeprefix("model."))


SECTIONS = {
    "layers": Section("Layers", layers, ("measure",), needs_recipe=True),
    "spectra": Section("Singular values", spectra, ("layer", "module")),
    "outliers": Section("Outliers", outliers, ("kind", "layer", "module")),
    "rounding": Section("Rounding", rounding, ("module",)),
    "sensitivity": Section(
        "Which layer hurts",
        sensitivity,
        ("each",),
        needs_recipe=True,
        asks_first=("Measure", "Compresses each part of the model alone and reads a few calibration texts with it."),
    ),
    "left": Section("Left alone", left_alone, needs_recipe=True),
}
