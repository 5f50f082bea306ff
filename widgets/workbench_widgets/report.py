"""What a plan, a run or a session has to show as one HTML file: offline, with live views, and sliders over budgets.

`workbench.display` finds `page` through an entry point.
"""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from typing import TYPE_CHECKING

from workbench.display import Shown
from workbench.errors import BudgetTooSmall, NotRead
from workbench.kv.plan import Plan
from workbench.recipe import Recipe
from workbench.runtime.run import Run
from workbench.session import Session
from workbench_widgets import figures, present
from workbench_widgets.html_summaries import plan_html, run_html, runs_html, session_html
from workbench_widgets.plain_text import in_markup
from workbench_widgets.plotly_pictures import figure_png
from workbench_widgets.views.answer_diff import AnswerDiff
from workbench_widgets.views.kept_raster import KeptRaster
from workbench_widgets.views.standalone import Live, Section, report
from workbench_widgets.views.token_text import TokenText

if TYPE_CHECKING:
    from workbench.measure.memory import Timeline

_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


def page(thing: Shown) -> str:
    """The page of a plan, a run or a session; of anything else, its summary."""
    if isinstance(thing, Plan):
        return report(f"Plan of {thing.label}", [_plan_section([thing], "What is kept")])
    if isinstance(thing, Run):
        return report(f"Run of {thing.recipe.label}", [*_run_sections(thing), _memory(thing.memory)])
    if isinstance(thing, Session):
        sections = [Section("The session", session_html(thing, runs=False)), *_plans(thing)]
        if thing.runs:
            each = [part for run in thing.runs for part in _run_sections(run)]  # measures what was not
            sections += [Section("Runs", runs_html(thing.runs)), *each]
            sections.append(_memory(thing.memory))
        return report(f"Session with {thing.source}", sections)
    return report(type(thing).__name__, [Section("Summary", f"<pre>{in_markup(thing.summary())}</pre>")])


def _plans(session: Session) -> list[Section]:
    """What each recipe that was run keeps, at any budget that it can be planned for."""
    sections, trace = [], session.trace
    if trace is None:
        return []
    recipes = {
        Recipe.of(run.recipe, budget=0.5) if run.recipe.takes_budget() else run.recipe: run for run in session.runs
    }
    for recipe, run in recipes.items():
        if run.plan.chunked or not recipe.takes_budget():
            continue
        plans = _at_budgets(session, recipe)
        if plans:
            sections.append(_plan_section(plans, f"What {' + '.join(m.key for m in recipe.methods)} keeps"))
    return sections


def _at_budgets(session: Session, recipe: Recipe) -> list[Plan]:
    plans = []
    for budget in _BUDGETS:
        with suppress(BudgetTooSmall, NotRead):
            plans.append(session.plan(recipe, budget=budget))
    return plans


def _plan_section(plans: list[Plan], heading: str) -> Section:
    tokens = present.plan_tokens(plans[0])
    several = len(plans) > 1
    return Section(
        heading,
        "" if several else plan_html(plans[0]),
        [
            Live(
                TokenText.definition(),
                [TokenText.field_values((), {**present.token_text(p, tokens), "rows": 8}) for p in plans],
            ),
            Live(KeptRaster.definition(), [KeptRaster.field_values((), present.kept_raster(p, tokens)) for p in plans]),
        ],
        name="Budget",
        labels=[plan.label for plan in plans] if several else (),
        captions=[plan_html(plan) for plan in plans] if several else (),
        start=len(plans) // 2 if several else 0,
    )


def _run_sections(run: Run) -> list[Section]:
    asked = f"<p>{in_markup(run.question)}</p>" if run.question else ""
    answers = AnswerDiff.field_values((), present.run_answers(run))
    return [Section(run.recipe.label, asked + run_html(run), [Live(AnswerDiff.definition(), [answers])])]


def _memory(timeline: Timeline) -> Section:
    frame = present.memory(timeline, weights=False).drop(columns="time")
    picture = b64encode(figure_png(figures.memory_timeline(frame))).decode()
    return Section("Memory", f'<img alt="Live memory, step by step" src="data:image/png;base64,{picture}">')
