"""What the views show of a model's weights under a recipe, from the tables that a session gives.

Each function takes frames and returns keywords for a view, a Plotly figure, or a frame for a table: the same in a
notebook and in the app.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from workbench.formatting import readable_bytes
from workbench.weights.reports.spectra import Spectrum
from workbench_widgets import figures
from workbench_widgets.present import KeyFigure

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURES: Mapping[str, str] = MappingProxyType(
    {  # columns of Session.census -> what they are called
        "output_error": "Relative error of the outputs",
        "weight_error": "Relative error of the weights",
        "bits": "Bits a weight, all counted",
        "share": "Share of the 16-bit bytes",
        "rank": "Rank",
        "density": "Density",
    }
)


def modules(census: pd.DataFrame) -> list[str]:
    """The modules inside the decoder's layers, in order."""
    return list(dict.fromkeys(census[census.layer.notna()].module))


def weight_map(census: pd.DataFrame, measure: str = "output_error") -> dict[str, object]:
    """Keywords for Heatmap from `Session.census`: one of MEASURES for each layer and module.

    A module in which several matrices stand shows their mean; where a method chose no such thing there is nothing.
    """
    inside = census[census.layer.notna()]
    names = modules(census)
    layers = range(int(inside.layer.max()) + 1)
    values = pd.to_numeric(inside[measure], errors="coerce")
    grid = inside.assign(value=values).pivot_table(index="layer", columns="module", values="value", dropna=False)
    return grid_map(
        grid.reindex(index=layers, columns=names).to_numpy(float, na_value=np.nan), names, MEASURES[measure]
    )


def grid_map(values: ArrayLike, names: Sequence[str], label: str) -> dict[str, object]:
    """Keywords for Heatmap of one number for each layer and module."""
    return {
        "values": values,
        "brush": False,
        "row_title": "layer",
        "column_title": "module",
        "column_labels": short(names),
        "label": label,
        "scale": "linear",
    }


def short(names: Sequence[str]) -> list[str]:
    """Names without what stands before the last dot, where that leaves them different."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def chosen(census: pd.DataFrame) -> list[str]:
    """The measures that say something: those that are there, and not the same for every weight that was compressed."""
    small = census[~census.form.isin(["plain", "gone"])]
    return [name for name in MEASURES if small[name].notna().any()] or ["share"]


def weight_figures(census: pd.DataFrame) -> list[KeyFigure]:
    """What a recipe made of the weights, in a few numbers."""
    small = census[census.form != "plain"]
    full = float((small.bytes / small.share.where(small.share > 0)).sum())
    errors = small.output_error.astype(float).dropna()
    key_figures = [
        KeyFigure("Matrices compressed", f"{len(small)} of {len(census)}", "the others stay as they are"),
        KeyFigure(
            "Their bytes",
            readable_bytes(float(small.bytes.sum())),
            f"of {readable_bytes(full)} at 16 bits" if full else "",
        ),
    ]
    if len(errors):
        worst = str(small.name[small.output_error.astype(float) == errors.max()].iloc[0])
        key_figures += [
            KeyFigure("Output error", f"{errors.median():.1%}", "median, relative to the outputs"),
            KeyFigure("Worst", f"{errors.max():.1%}", worst.removeprefix("model.")),
        ]
    return key_figures


def not_compared(census: pd.DataFrame) -> str:
    """Of how many layers there are no errors, and why; empty where all have them."""
    reasons = census.reason[census.form != "plain"]
    reasons = reasons[reasons.str.startswith("not compared: ")].str.removeprefix("not compared: ")
    if not len(reasons):
        return ""
    return (
        f"Not compared: {len(reasons)} layers, whose numbers stand for something else ({'; '.join(reasons.unique())})."
    )


def left_alone(census: pd.DataFrame) -> pd.DataFrame:
    """What keeps its precision: name, MiB at 16 bits, and why."""
    plain = census[census.form == "plain"]
    rows = {
        "name": plain.name,
        "mib": plain.bytes / 2**20,
        "reason": plain.reason.replace("", "not in this method's reach"),
    }
    return pd.DataFrame(rows).sort_values("mib", ascending=False, kind="stable").reset_index(drop=True)


def spectrum(before: Spectrum, after: Spectrum | None = None, *, dark: bool = False) -> go.Figure:
    """The singular values of one weight, and of what a recipe made of it."""
    spectra = {"the model's": before} if after is None else {"before": before, "after": after}
    count = max(entry.values.numel() for entry in spectra.values())
    ys = {}
    for name, entry in spectra.items():
        values = (entry.values.double() * entry.largest).numpy()
        values[values <= entry.largest * count * np.finfo(np.float32).eps] = np.nan  # zero, but for rounding
        ys[name] = np.pad(values, (0, count - len(values)), constant_values=np.nan)
    return figures.lines(
        list(range(1, count + 1)),
        ys,
        title=f"Singular values of layer {before.layer}, {before.module}",
        x_title="singular value",
        y_title="size",
        log=True,
        dark=dark,
    )


def ranks(before: Spectrum, after: Spectrum | None = None) -> list[KeyFigure]:
    """How many directions a weight uses, and what a recipe left of them."""
    shown = before if after is None else after

    def figure(name: str, measure: Callable[[Spectrum], float], form: str) -> KeyFigure:
        return KeyFigure(name, f"{measure(shown):{form}}", "" if after is None else f"before {measure(before):{form}}")

    return [
        figure("Effective rank", lambda entry: entry.effective_rank, ".1f"),
        figure("Stable rank", lambda entry: entry.stable_rank, ".1f"),
        figure("For 90 % of the energy", lambda entry: entry.rank_for(0.9), ",d"),
        figure("For 99 % of the energy", lambda entry: entry.rank_for(0.99), ",d"),
        figure("Largest", lambda entry: entry.largest, ".3g"),
    ]


def outlier_layers(before: pd.DataFrame, after: pd.DataFrame | None, *, of: str, dark: bool = False) -> go.Figure:
    """The largest and the median channel of each layer, from `Session.outliers` of one kind and module."""
    ys: dict[str, ArrayLike] = {}
    layers = sorted(before.layer.unique())
    for suffix, frame in _before_after(before, after):
        grouped = frame.groupby("layer", observed=True).absmax
        ys[f"largest channel{suffix}"] = grouped.max().reindex(layers).to_numpy()
        ys[f"median channel{suffix}"] = grouped.median().reindex(layers).to_numpy()
    return figures.lines(
        layers, ys, title=f"Outliers of {of} by layer", x_title="layer", y_title="absolute value", log=True, dark=dark
    )


def outlier_channels(
    before: pd.DataFrame, after: pd.DataFrame | None, layer: int, *, of: str, dark: bool = False
) -> go.Figure:
    """The largest absolute value of every channel of one layer, before and after."""
    ys: dict[str, ArrayLike] = {}
    channels: list[int] = []
    for suffix, frame in _before_after(before, after):
        of_layer = frame[frame.layer == layer].sort_values("channel")
        channels = max(channels, of_layer.channel.tolist(), key=len)
        ys[f"channel{suffix}"] = of_layer.absmax.to_numpy()
    return figures.lines(
        channels,
        ys,
        title=f"Channels of {of}, layer {layer}",
        x_title="input channel",
        y_title="absolute value",
        dark=dark,
    )


def kernel_lines(before: pd.DataFrame, after: pd.DataFrame | None, module: str, *, dark: bool = False) -> go.Figure:
    """Which share of a module's inputs rounding to 8 bits loses to zero, layer by layer, from `Session.rounding`."""
    ys: dict[str, ArrayLike] = {}
    for suffix, frame in _before_after(before, after):
        of_module = frame[frame.module == module]
        ys[f"steps by token{suffix}"] = of_module.kernel.to_numpy()
        ys[f"by CrossQuant{suffix}"] = of_module.kernel_cross.to_numpy()
    return figures.lines(
        _layers(before, module),
        ys,
        title=f"Quantisation kernel of 8 bits: inputs of {module} that become zero",
        x_title="layer",
        y_title="share of the inputs",
        percent=True,
        dark=dark,
    )


def space_lines(before: pd.DataFrame, after: pd.DataFrame | None, module: str, *, dark: bool = False) -> go.Figure:
    """How much of the space of levels a module's inputs fill (QSUR, per dimension), layer by layer."""
    ys = {
        f"space{suffix}": frame[frame.module == module].space.to_numpy()
        for suffix, frame in _before_after(before, after)
    }
    return figures.lines(
        _layers(before, module),
        ys,
        title=f"Space of levels that the inputs of {module} fill (QSUR, per dimension)",
        x_title="layer",
        y_title="rate, at most 0.5",
        dark=dark,
    )


def hurting_layers(sensitivity: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """What compressing each layer alone does to the predictions, from `Session.sensitivity`."""
    rows = sensitivity[sensitivity.layer.notna() & (sensitivity.module == "all")]
    return figures.bars(
        [str(layer) for layer in rows.layer],
        rows.kl,
        title="Which layer hurts: each compressed alone",
        x_title="layer",
        y_title="KL, nats a token",
        dark=dark,
    )


def hurting_modules(sensitivity: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """The same for each kind of module, in all layers at once, and for what lies outside the layers."""
    rows = sensitivity[sensitivity.layer.isna()]
    return figures.bars(
        short(list(rows.module)),
        rows.kl,
        title="Which module hurts: each kind compressed alone, in all layers",
        x_title="module",
        y_title="KL, nats a token",
        dark=dark,
    )


def _before_after(before: pd.DataFrame, after: pd.DataFrame | None) -> list[tuple[str, pd.DataFrame]]:
    return [("", before)] if after is None else [(", before", before), (", after", after)]


def _layers(frame: pd.DataFrame, module: str) -> list[int]:
    return frame[frame.module == module].layer.tolist()
