"""What each section of the Weights tab shows, as a function of a session, a recipe's weight methods and the choices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd

from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.session import Session
from workbench.weights.calibration.texts import Calibration
from workbench_widgets import weight_views
from workbench_widgets.app.work.lru_cache import LRUCache
from workbench_widgets.present import KeyFigure

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.inspection.channels import Kind
    from workbench.weights.reports.spectra import Spectrum


_FLOPS = 8e10  # a second, in single precision on two cores


@dataclass(frozen=True)
class WeightQuery:
    """What is to be looked at.

    recipe: of weight methods only; None: the model as it is. cache: what was computed before. outputs: whether errors
    of outputs over the calibration texts are wanted, where they were not computed before.
    """

    session: Session
    recipe: Recipe | None
    cache: LRUCache
    layer: int
    module: str
    measure: str
    kind: Kind
    each: Literal["layer", "module"]
    dark: bool
    outputs: bool = True


class SectionContent(NamedTuple):
    """What a section shows, each part where there is one."""

    numbers: Sequence[KeyFigure] = ()
    map: dict[str, object] | None = None
    figures: tuple[go.Figure, ...] = ()
    table: pd.DataFrame | None = None
    remark: str = ""


@dataclass(frozen=True)
class Section:
    """One section: which choices it has, whether it needs a recipe, and how it is made."""

    title: str
    make: Callable[[WeightQuery, Progress], SectionContent]
    choices: tuple[str, ...] = ()
    needs_recipe: bool = False
    asks_first: tuple[str, str] = ("", "")  # the button that starts it, and what it says beside it


def layers(query: WeightQuery, progress: Progress) -> SectionContent:
    """Errors, bits, ranks and densities over layers and modules."""
    census = census_of(query, progress)
    measure = query.measure if query.measure in weight_views.chosen(census) else weight_views.chosen(census)[0]
    return SectionContent(
        weight_views.weight_figures(census), weight_views.weight_map(census, measure), table=_rows(census),
        remark=weight_views.not_compared(census),
    )  # fmt: skip


def spectra(query: WeightQuery, progress: Progress) -> SectionContent:
    """The singular values of one weight, before and after."""

    def spectrum(recipe: Recipe | None) -> Spectrum | None:
        spectra = query.cache.once(
            ("spectrum", recipe, query.layer, query.module),
            lambda: query.session.spectra(recipe, layer=query.layer, module=query.module, progress=progress),
        )
        return spectra[0] if len(spectra) else None

    before, after = spectrum(None), None if query.recipe is None else spectrum(query.recipe)
    if before is None:
        return SectionContent(remark="This layer has no module of this name.")
    return SectionContent(
        weight_views.ranks(before, after), figures=(weight_views.spectrum(before, after, dark=query.dark),)
    )


def outliers(query: WeightQuery, progress: Progress) -> SectionContent:
    """Outliers of weights or activations, by layer and by channel, before and after."""

    def channels(recipe: Recipe | None) -> pd.DataFrame:
        frame = query.cache.once(
            ("outliers", query.kind, recipe),
            lambda: query.session.outliers(query.kind, recipe, progress=progress),
        )
        return frame[frame.module == query.module] if "module" in frame else frame

    before, after = channels(None), None if query.recipe is None else channels(query.recipe)
    of = f"the weights of {query.module}" if query.kind == "weights" else "what enters the layers"
    return SectionContent(
        figures=(
            weight_views.outlier_layers(before, after, of=of, dark=query.dark),
            weight_views.outlier_channels(before, after, query.layer, of=of, dark=query.dark),
        )
    )


def rounding(query: WeightQuery, progress: Progress) -> SectionContent:
    """How well inputs lend themselves to rounding, before and after."""

    def figures_of_rounding(recipe: Recipe | None) -> pd.DataFrame:
        return query.cache.once(("rounding", recipe), lambda: query.session.rounding(recipe, progress=progress))

    before, after = figures_of_rounding(None), None if query.recipe is None else figures_of_rounding(query.recipe)
    return SectionContent(
        figures=(
            weight_views.kernel_lines(before, after, query.module, dark=query.dark),
            weight_views.space_lines(before, after, query.module, dark=query.dark),
        )
    )


def sensitivity(query: WeightQuery, progress: Progress) -> SectionContent:
    """Which layer hurts."""
    recipe = query.recipe
    assert recipe is not None
    frame = query.cache.once(
        sensitivity_key(query),
        lambda: query.session.sensitivity(recipe, each=query.each, progress=progress),
    )
    if query.each == "module":
        inside = frame[frame.layer.notna()]
        names = list(dict.fromkeys(inside.module))
        grid = inside.pivot_table(index="layer", columns="module", values="kl", dropna=False).reindex(columns=names)
        label = "KL of each module compressed alone, nats a token"
        return SectionContent(map=weight_views.grid_map(grid.to_numpy(float), names, label), table=frame)
    return SectionContent(
        figures=(
            weight_views.hurting_layers(frame, dark=query.dark),
            weight_views.hurting_modules(frame, dark=query.dark),
        )
    )


def left_alone(query: WeightQuery, progress: Progress) -> SectionContent:
    """What keeps its precision, and why."""
    left = weight_views.left_alone(census_of(query, progress))
    if not len(left):
        return SectionContent(remark="Every weight matrix is compressed.")
    return SectionContent(table=left)


def census_of(query: WeightQuery, progress: Progress) -> pd.DataFrame:
    """What became of every weight; needs a recipe."""
    recipe = query.recipe
    assert recipe is not None
    outputs = query.outputs or census_key(query) in query.cache
    return query.cache.once(
        ("census", recipe, outputs), lambda: query.session.census(recipe, outputs=outputs, progress=progress)
    )


def census_key(query: WeightQuery) -> Hashable:
    """The key of a census with errors of outputs in the cache."""
    return ("census", query.recipe, True)


def output_error_seconds(session: Session) -> float:
    """About how long errors of outputs take to measure: every calibration text is read, with products of its inputs."""
    calibration = session.calibration or Calibration()
    tokens = calibration.samples * min(calibration.tokens, session.facts.max_positions)
    return tokens * session.facts.parameters * 6 / _FLOPS


def sensitivity_key(query: WeightQuery) -> Hashable:
    """The key of a sensitivity in the cache."""
    return ("sensitivity", query.recipe, query.each)


def _rows(census: pd.DataFrame) -> pd.DataFrame:
    shown = census.assign(mib=census.bytes / 2**20, rank=census["rank"].astype(float), chosen=census.chosen.fillna(""))
    shown["reason"] = shown.reason.where(shown.form != "plain", "")  # of those left alone another section tells
    columns = (
        "name",
        "form",
        "bits",
        "rank",
        "density",
        "mib",
        "share",
        "weight_error",
        "output_error",
        "chosen",
        "reason",
    )
    filled = [name for name in columns if shown[name].replace("", None).notna().any()]
    return shown[filled].assign(name=shown.name.str.removeprefix("model."))


SECTIONS: Mapping[str, Section] = MappingProxyType(
    {
        "layers": Section("Layers", layers, ("measure",), needs_recipe=True),
        "spectra": Section("Singular values", spectra, ("layer", "module")),
        "outliers": Section("Outliers", outliers, ("kind", "layer", "module")),
        "rounding": Section("Rounding", rounding, ("module",)),
        "sensitivity": Section(
            "Which layer hurts",
            sensitivity,
            ("each",),
            needs_recipe=True,
            asks_first=(
                "Measure",
                "Compresses each part of the model alone and reads a few calibration texts with it.",
            ),
        ),
        "left": Section("Left alone", left_alone, needs_recipe=True),
    }
)
