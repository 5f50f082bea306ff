"""What the views show of a plan, a run or a session: plain keywords for each view, in notebooks and in the app."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from workbench.attention.operators import Operator, Study
from workbench.errors import NotRead
from workbench.formatting import readable_bytes, readable_share, times_smaller
from workbench.kv.plan import Plan
from workbench.measure.attention import PooledMap
from workbench.measure.grid import GridOfMaps
from workbench.measure.head_classes import HeadClass
from workbench.measure.memory import Timeline
from workbench.published import OURS
from workbench.registry import Method
from workbench.runtime.run import Run
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views.colour_levels import Scale
from workbench_widgets.views.heatmap import Heatmap

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from workbench.prompt import Prompt

CHANGED = ""  # the choice of presets where a method's values are those of none
UNCOMPRESSED = "Uncompressed"  # what the side is called that a run is compared with
HEAD_MEASURES = ("entropy", "sink", "local", "retrieval", "distance")  # columns of Session.heads


class KeyFigure(NamedTuple):
    """One number for people: what it is, the number with its unit, and what it is measured against."""

    name: str
    value: str
    note: str


def preset_choices(cls: type[Method]) -> dict[str, str]:
    """Where a method's parameters can come from: what is shown -> the preset, or CHANGED."""
    return {"the defaults": OURS, **{preset.name: preset.name for preset in cls.presets}, "changed": CHANGED}


def pieces(tokenizer: PreTrainedTokenizerBase | None, ids: Iterable[int] | Tensor) -> list[str]:
    """The text of each token, or its number in brackets where there is no tokenizer."""
    numbers = [int(i) for i in ids]
    if tokenizer is None:
        return [f"[{number}]" for number in numbers]
    return [str(piece) for piece in tokenizer.batch_decode([[number] for number in numbers])]


def prompt_pieces(prompt: Prompt, most: int | None = None) -> list[str]:
    """The text of each token of a prompt (at most the first `most`); of those of images, which it is of which."""
    texts = pieces(prompt.tokenizer, prompt.ids[:most])
    named = {} if prompt.images is None else prompt.images.labels()
    return [named.get(place, text) for place, text in enumerate(texts)]


def tier_names(plan: Plan) -> tuple[str, ...]:
    """The names of a plan's tiers, "dropped" first."""
    return ("dropped", *plan.precisions)


def token_text(plan: Plan, tokens: Sequence[str], selected: tuple[int, int] | None = None) -> dict[str, object]:
    """Keywords for TokenText: the share that survives everywhere, or the tiers of the selected (layer, KV head)."""
    if selected is None:
        groups = len(plan.trace.compressible or plan.trace.layers) * plan.tiers.shape[1]
        label = "Prompt, by the share of layers and heads that keep each token"
        return {"tokens": tokens, "shares": plan.survival().numpy(), "groups": groups, "label": label}
    layer, head = selected
    tier_of = plan.tiers[plan.trace.place(layer), head].cpu().numpy()
    return {
        "tokens": tokens,
        "tier_of": tier_of,
        "tiers": tier_names(plan),
        "label": f"Prompt, as layer {layer}, KV head {head} keeps it",
    }


def nearest(layer: int, numbers: Sequence[int]) -> int:
    """The one of the layers `numbers` that is nearest to a number."""
    return min(numbers, key=lambda number: abs(number - layer))


def kept_raster(plan: Plan, tokens: Sequence[str]) -> dict[str, object]:
    """Keywords for KeptRaster: every layer, KV head and position with its tier."""
    kept, numbers = plan.tiers.cpu().numpy(), plan.trace.numbers
    return {"kept": kept, "tiers": tier_names(plan), "tokens": tokens, "numbers": numbers}


def attention_map(
    pooled: PooledMap,
    tokens: Sequence[str],
    *,
    layer: int,
    head: int,
    scale: Scale = "log",
    of: str = "",
    difference: bool = False,
) -> dict[str, object]:
    """Keywords for Heatmap: the attention of one head, queries down and keys across.

    of: under which recipe, where not everything is kept. difference: `pooled` is one map minus another, `of` says
    which. Weights below zero, which some operators imply, get the colours of a difference.
    """
    edges = (pooled.row_edges, pooled.col_edges)
    rows, columns = ((int(e[0]), int(e[-1])) for e in edges)
    single = all(int(e.diff().max()) == 1 for e in edges)
    cells = "token by token" if single else f"{pooled.pooling} of each cell"
    what = "Difference in attention" if difference else "Attention"
    values = pooled.values.numpy()
    diverging = difference or bool((values < 0).any())
    if not difference:  # zero is where a query cannot look: later tokens, and what was not kept
        values = np.where(values == 0, np.nan, values)
    return {
        "values": values,
        "at": (*rows, *columns),
        "scale": scale,
        "diverging": diverging,
        "tokens": list(tokens),
        "row_title": "query",
        "column_title": "key",
        "label": f"{what} of layer {layer}, head {head}" + (f", {of}" if of else ""),
        "note": cells,
    }


def attention_html(pooled: PooledMap, tokens: Sequence[str], *, layer: int, head: int, scale: Scale = "log") -> str:
    """The map as one HTML file that needs no kernel and no network; zooming shows the cells it has."""
    keywords = attention_map(pooled, tokens, layer=layer, head=head, scale=scale)
    return Heatmap.html(**keywords, title=str(keywords["label"]))


def implied_by(operator: Operator, *, difference: bool = False) -> str:
    """What is said behind the name of a map that an operator implies, or of its difference to the model's."""
    return f"implied by {operator.label()}" + (" − all keys" if difference else "")


def operator_line(study: Study, head: int) -> str:
    """How far an operator's output is from the model's own, of `head` and over all heads of the study."""
    at = study.heads.index(head)
    alone, scaled = float(study.error[at]), float(study.scaled_error[at])
    return (
        f"{study.operator.title}, on what layer {study.layer} recorded: the output of head {head} is off by "
        f"{alone:.0%} of its norm, by {scaled:.0%} after the best factor; on average over the layer's "
        f"{len(study.heads)} heads by {float(study.error.mean()):.0%} and {float(study.scaled_error.mean()):.0%}."
    )


def map_grid(
    grid: GridOfMaps, heads: pd.DataFrame | None = None, *, of: str = "", difference: bool = False
) -> dict[str, object]:
    """Keywords for MapGrid from `Session.attention_grid` and, for classes and measures, `Session.heads`."""
    keywords: dict[str, object] = {
        "maps": grid.values.numpy(),
        "numbers": grid.numbers,
        # In maps so small sinks and the diagonal fill every pooled cell on a log scale; ranks still show the rest.
        "scale": "log" if difference else "percentile",
        "diverging": difference,
        "label": "All layers and heads",
        "note": of,
    }
    if heads is not None:
        frame = heads.sort_values(["layer", "head"])
        keywords |= {
            "classes": [str(name) for name in frame["class"]],
            "class_names": list(get_args(HeadClass)),
            "measures": {name: frame[name].to_numpy() for name in HEAD_MEASURES},
        }
    return keywords


def received_text(
    received: ArrayLike, tokens: Sequence[str], *, layer: int, head: int | None, of: str = "", scale: Scale = "log"
) -> dict[str, object]:
    """Keywords for TokenText from `Session.received`: the prompt coloured by the attention each token gets."""
    return {
        "tokens": tokens,
        "values": np.asarray(received),
        "scale": scale,
        "what": "attention received",
        "label": f"Attention received, {_head(layer, head)}" + (f", {of}" if of else ""),
    }


def _head(layer: int, head: int | None) -> str:
    return f"layer {layer}" + ("" if head is None else f", head {head}")


def answers(run: Run, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, object]:
    """Keywords for AnswerDiff: the uncompressed answer and the run's."""
    return {
        "left": pieces(tokenizer, run.reference_tokens),
        "right": pieces(tokenizer, run.tokens),
        "left_label": UNCOMPRESSED,
        "right_label": run.recipe.label,
    }


def plan_figures(plan: Plan) -> list[KeyFigure]:
    """What a plan saves, in words: bytes, share, positions."""
    kept, tokens = plan.counts.float(), plan.trace.tokens
    low, high = int(kept.min()), int(kept.max())
    spread = "in every head" if low == high else f"a head; from {low:,} to {high:,}"
    tiers = {name: float((plan.tiers == i + 1).float().mean()) for i, name in enumerate(plan.precisions)}
    stored = ", ".join(f"{readable_share(share)} at {name}" for name, share in tiers.items() if share > 0)
    exact = f"; {len(plan.exact)} layers stay exact" if plan.exact else ""
    host = f"; {readable_bytes(plan.host_nbytes)} in host memory" if plan.host_nbytes else ""
    return [
        KeyFigure("KV cache", readable_bytes(plan.nbytes), f"of {readable_bytes(plan.full_nbytes)} uncompressed{host}"),
        KeyFigure("Share of bytes", f"{plan.share:.1%}", f"{times_smaller(plan.full_nbytes, plan.nbytes)}{exact}"),
        KeyFigure("Positions kept", f"{kept.mean():,.0f} of {tokens:,}", spread),
        KeyFigure("Stored as", " + ".join(name for name, share in tiers.items() if share > 0) or "nothing", stored),
    ]


def weights_figure(methods: Sequence[Method], nbytes: int, deployed: int, full: int, full_deployed: int) -> KeyFigure:
    """What the model's weights take under these methods: as they lie in memory first, then at 16 bits.

    nbytes, full: live bytes with the methods and without; deployed, full_deployed: the same with what is not
    compressed at 16 bits.
    """
    if not methods:
        return KeyFigure("Model weights", readable_bytes(nbytes), f"in memory; {readable_bytes(deployed)} at 16 bits")
    rest = f"{readable_bytes(deployed)} with the rest at 16 bits, {deployed / full_deployed:.1%}"
    return KeyFigure("Model weights", readable_bytes(nbytes), f"of {readable_bytes(full)} in memory; {rest}")


def verdict_figure(correct: bool | None, full_correct: bool | None, expected: str) -> KeyFigure | None:
    """Whether an answer is right, beside the uncompressed model's; None where no answer is expected."""
    if correct is None:
        return None
    said = {True: "right", False: "wrong", None: "not judged"}
    note = f"expected: {expected}; the uncompressed answer is {said[full_correct]}"
    return KeyFigure("Answer", said[correct].capitalize(), note)


def row_figures(row: Mapping[str, Any]) -> list[KeyFigure]:
    """The figures of a run that was kept as a row of results."""
    verdict = verdict_figure(row["correct"], row["full_correct"], row["expected"])
    first = row["first_divergence"]
    same = "the answers agree" if first is None else f"the answers differ from token {first + 1} on"
    of_16 = readable_bytes(row["weight_deployed_nbytes"])
    return [
        *([] if verdict is None else [verdict]),
        KeyFigure("KL divergence", f"{row['kl']:.4f}", "nats a token"),
        KeyFigure("Top-1 agreement", f"{row['top1']:.0%}", same),
        KeyFigure("NLL difference", f"{row['nll_difference']:+.4f}", "nats a token"),
        KeyFigure("Perplexity", f"{row['perplexity']:.3f}", "of the uncompressed answer"),
        KeyFigure("KV cache", readable_bytes(row["kv_nbytes"]), f"of {readable_bytes(row['kv_full_nbytes'])}"),
        KeyFigure("Weights", readable_bytes(row["weight_nbytes"]), f"in memory; {of_16} at 16 bits"),
        KeyFigure(
            "Total", readable_bytes(row["total_nbytes"]), f"at most {readable_bytes(row['peak_nbytes'])} at once"
        ),
        KeyFigure("Speed", f"{row['tokens_per_s']:.1f}", "tokens a second"),
    ]


def run_figures(run: Run) -> list[KeyFigure]:
    """What a run cost the answer, and how fast it was; measures its quality if nobody has yet."""
    quality, timing = run.quality, run.timing
    first = quality.first_divergence
    same = "the answers agree" if first is None else f"the answers differ from token {first + 1} on"
    return [
        KeyFigure("KL divergence", f"{quality.kl:.4f}", f"nats a token; worst {quality.kl_max:.3g}"),
        KeyFigure("Top-1 agreement", f"{quality.top1_agreement:.0%}", f"of {quality.tokens} tokens; {same}"),
        KeyFigure("NLL difference", f"{quality.nll_difference:+.4f}", "nats a token"),
        KeyFigure("Perplexity", f"{quality.perplexity:.3f}", f"uncompressed {quality.perplexity_reference:.3f}"),
        KeyFigure("First token", f"{timing.first_token_s:.2f} s", f"then {timing.tokens_per_s:.1f} tokens a second"),
        KeyFigure("Cache at the end", readable_bytes(run.kv_nbytes), f"{len(run.tokens)} tokens generated"),
    ]


def head_error(errors: Tensor, *, of: str, numbers: Sequence[int] = ()) -> dict[str, object]:
    """Keywords for Heatmap from a plan's `error` or a run's `verdict.output_error` [layers, heads]; numbers: what the
    layers are called (default: from 0 on).
    """
    keywords = Heatmap.grid(errors.numpy(), what=f"Relative error of each head's output, {of}")
    return keywords | ({"row_labels": [str(number) for number in numbers]} if numbers else {})


def outlier_map(frame: pd.DataFrame, *, kind: str) -> dict[str, object] | None:
    """Keywords for Heatmap from `Session.outliers`: the largest magnitude of each layer and channel.

    KV heads stand side by side. None for weights, whose modules have different widths.
    """
    if "module" in frame:
        return None
    values = np.stack([part.absmax.to_numpy() for _, part in frame.groupby("layer", observed=True)])
    title = "KV head and channel" if "head" in frame else "channel"
    return {
        "values": values,
        "scale": "percentile",
        "row_title": "layer",
        "column_title": title,
        "label": f"Largest magnitude of the {kind}",
    }


def method_names(label: str) -> str:
    """The methods of a recipe's label, without their budgets."""
    return " + ".join(part.split(" ")[0] for part in label.split(" (", maxsplit=1)[0].split(" + "))


def pareto(rows: pd.DataFrame) -> pd.DataFrame:
    """The frame for `figures.pareto` from rows as `Session.compare` gives them: methods named without their budgets."""
    return rows.assign(method=[method_names(str(name)) for name in rows.recipe], nbytes=rows.kv_mib * 2**20)


def memory(timeline: Timeline, *, trace: bool = False, weights: bool = True) -> pd.DataFrame:
    """The frame for `figures.memory_timeline`.

    trace: with the recording, which no deployment would hold. Without the weights the cache is seen at its own scale.
    """
    frame = timeline.to_frame()
    frame["event"] = [
        f"{run} {phase} {step}".strip() for run, phase, step in zip(frame.run, frame.phase, frame.step, strict=True)
    ]
    dropped = ["run", "phase"] + ([] if trace else ["trace"]) + ([] if weights else ["weights"])
    frame = frame.drop(columns=[name for name in dropped if name in frame])
    return frame.assign(step=np.arange(len(frame)))


def memory_by_layer(timeline: Timeline) -> pd.DataFrame:
    """The frame for `figures.memory_timeline` of the KV cache alone, layer by layer."""
    rows = timeline.by_layer()
    table = rows.pivot_table(index="time", columns="layer", values="bytes", aggfunc="last", dropna=False).fillna(0)
    table.columns = [f"layer {layer}" for layer in table.columns]
    return table.reset_index().assign(step=np.arange(len(table)))


def run_marks(timeline: Timeline) -> dict[str, float]:
    """When each run of a timeline begins to be planned: its label -> seconds."""
    marks: dict[str, float] = {}
    for sample in timeline.samples:
        if sample.phase == "plan":
            name = sample.run if sample.run not in marks else f"{sample.run} ({len(marks) + 1})"
            marks[name] = sample.time
    return marks


def outliers(frame: pd.DataFrame, *, top: int = 4) -> pd.DataFrame:
    """The frame for `figures.outlier_profile` from `Session.outliers`: one row a layer."""
    rows = []
    for layer, part in frame.groupby("layer", observed=True):
        rows.append(
            {
                "layer": layer,
                "absmax": part.absmax.max(),
                "median": part.absmax.median(),
                "kurtosis": part["kurtosis"].max(),
                "top_share": float(part.energy.nlargest(top).sum() / max(part.energy.sum(), 1e-30)),
            }
        )
    return pd.DataFrame(rows)


def question_line(run: Run) -> str:
    """What was asked and what stayed exact, as one line of HTML."""
    asked = f"Asked: {in_markup(run.question)}" if run.question else "Going on from the text"
    return "<div>" + "; ".join([asked, *map(in_markup, run.notes)]) + "</div>"


def run_answers(run: Run) -> dict[str, object]:
    """Keywords for AnswerDiff; a run loaded from disk that was never measured shows its own answer only."""
    tokenizer = None
    with suppress(NotRead):  # a loaded run whose own reading was not saved
        tokenizer = run.plan.trace.prompt.tokenizer
    try:
        return answers(run, tokenizer)
    except NotRead:
        answer = pieces(tokenizer, run.tokens)
        return {"left": answer, "right": answer, "left_label": "As recorded", "right_label": run.recipe.label}


def plan_tokens(plan: Plan) -> list[str]:
    """The prompt's tokens as text, decoded once."""
    trace = plan.trace
    return trace.once(("pieces",), lambda: prompt_pieces(trace.prompt))
