"""A page as one HTML file that works offline: its runs, their answers, and what its recipe keeps at any budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench.budget import Budget
from workbench.errors import Cancelled, WorkbenchError
from workbench.formatting import readable_bytes
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench_widgets import present
from workbench_widgets.app.work.records import Record
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views import AnswerDiff, KeptRaster, TokenText
from workbench_widgets.views.standalone import Live, Section
from workbench_widgets.views.standalone import report as page_of

if TYPE_CHECKING:
    from workbench.kv.plan import Plan
    from workbench.session import Session

_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
_CELLS = 8_000_000  # layers x heads x positions of all rasters together


def report(
    session: Session,
    tokens: Sequence[str],
    recipe: Recipe | None,
    records: Sequence[Record],
    model: str,
    progress: Progress,
) -> str:
    """The report's HTML. tokens: of the prompt that was read. recipe: the page's, None where it cannot be had."""
    steps, plans = _plans(session, recipe, progress)
    said = [
        f"{name}: {readable_bytes(plan.nbytes)} of {readable_bytes(plan.full_nbytes)}, "
        f"{float(plan.counts.float().mean()):,.0f} of {plan.trace.tokens:,} positions a head"
        for name, plan in zip(steps, plans, strict=True)
    ]
    about = f"{in_markup(model)}, {len(tokens):,} tokens read. {len(records)} runs. This file holds all that it shows."
    sections = [Section("This page", f"<p>{about}</p>")]
    if plans:
        sections.append(_kept(f"What {_name(recipe)} keeps", tokens, steps, plans, said))
    if records:
        sections.append(Section("Runs", _table(records)))
    sections += [_answers(record) for record in records if record.row["status"] == "done"]
    return page_of("Inference workbench: a report", sections)


def _kept(
    heading: str, tokens: Sequence[str], steps: Sequence[str], plans: Sequence[Plan], said: Sequence[str]
) -> Section:
    """What plans keep, a place of the slider each."""
    texts = [TokenText.field_values((), present.token_text(plan, tokens)) for plan in plans]
    views = [Live(TokenText.definition(), texts)]
    if sum(plan.tiers.numel() for plan in plans) <= _CELLS:
        rasters = [KeptRaster.field_values((), present.kept_raster(plan, tokens)) for plan in plans]
        views.append(Live(KeptRaster.definition(), rasters))
    if len(plans) == 1:
        return Section(heading, f"<p>{in_markup(said[0])}</p>", views)
    start = next((place for place, name in enumerate(steps) if name == "25%"), 0)
    captions = [in_markup(text) for text in said]
    return Section(heading, "", views, name="Budget", labels=steps, captions=captions, start=start)


def _answers(record: Record) -> Section:
    """A run's question, and its answer beside the uncompressed one."""
    left, right = record.answers
    values = AnswerDiff.field_values(
        (list(left), list(right)), {"left_label": present.UNCOMPRESSED, "right_label": str(record.row["recipe"])}
    )
    asked = in_markup(record.row["question"] or "going on from the text")
    note = f"<p>{in_markup(record.row['note'])}</p>" if record.row["note"] else ""
    heading = f"Run {record.number}: {record.label}"
    return Section(heading, f"<p>{asked}</p>{note}", [Live(AnswerDiff.definition(), [values])])


def _plans(session: Session, recipe: Recipe | None, progress: Progress) -> tuple[list[str], list[Plan]]:
    """The recipe's plans at shares of the uncompressed cache that it can be had at; one alone where it takes none."""
    if recipe is None:
        return [], []
    if not recipe.takes_budget():
        return [recipe.label], [session.plan(recipe, progress=progress)]
    steps, plans = [], []
    for done, share in enumerate(_SHARES):
        progress.update("report", done, len(_SHARES))
        try:
            plan = session.plan(Recipe.of(recipe, budget=Budget.parse(share)), progress=progress)
        except Cancelled:
            raise
        except WorkbenchError:  # too small for this recipe
            continue
        steps.append(f"{share:.0%}")
        plans.append(plan)
    return steps, plans


def _name(recipe: Recipe | None) -> str:
    return "" if recipe is None else present.method_names(recipe.label)


def _table(records: Sequence[Record]) -> str:
    heads = ("Run", "Recipe", "Prompt", "Question", "KV cache", "Weights", "Total", "KL", "Top-1", "Right", "Answer")
    verdicts = {True: "right", False: "wrong", None: "–"}
    lines = []
    for record in records:
        row = record.row
        size = [_size(row[name]) for name in ("kv_nbytes", "weight_nbytes", "total_nbytes")]
        kl, top = ("–" if row[n] is None else format(row[n], form) for n, form in (("kl", ".4f"), ("top1", ".0%")))
        cells = [record.number, record.label, row["prompt"], row["question"], *size, kl, top, verdicts[row["correct"]]]
        cells.append(row["error"] or row["text"])
        lines.append("<tr>" + "".join(f"<td>{in_markup('' if c is None else c)}</td>" for c in cells) + "</tr>")
    top_row = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{top_row}</tr>{''.join(lines)}</table>"


def _size(nbytes: int | None) -> str:
    return "–" if nbytes is None else readable_bytes(nbytes)
