"""Which recipes nothing beats: a table with one row a recipe, and its Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import BadParameter
from workbench.formatting import quoted
from workbench.results.schema import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

HIGHER_IS_BETTER = frozenset({"correct", "full_correct", "score", "full_score", "top1", "tokens_per_s"})
"""Figures of which more is better; of all others less is."""

SHOWN = ("deployed_nbytes", "kv_nbytes", "correct", "full_correct", "score", "kl", "top1", "tokens_per_s")


def check_figure(name: str) -> str:
    """The name of a column that holds figures. Raises BadParameter."""
    kinds = ("BIGINT", "DOUBLE", "BOOLEAN")
    known = [each for each, column in COLUMNS.items() if column.kind in kinds]
    if name not in known:
        raise BadParameter(f"{quoted(name)} is no figure of a row: there are {', '.join(known)}")
    return name


def grouped(figures: tuple[str, ...], source: str) -> str:
    """A query with one row a model, recipe and settings: the means of figures over the cases that were measured.

    cases: how many there are. all_cases: how many of the same model were measured under any recipe. failed: rows that
    have no figures.
    """
    means = ", ".join(f"avg(CAST({name} AS DOUBLE)) FILTER (status = 'done') AS {name}" for name in figures)
    cases = "count(DISTINCT hash(task_json, case_number, prompt_hash)) FILTER (status = 'done')"
    return f"""
        WITH chosen AS (SELECT *, coalesce(model_fingerprint, model, '') AS fingerprint FROM ({source})),
        each AS (
            SELECT model, fingerprint, settings, device, recipe, recipe_json, budget,
                {cases} AS cases, count(*) FILTER (status = 'failed') AS failed, {means}
            FROM chosen GROUP BY ALL
        ),
        every AS (SELECT fingerprint, {cases} AS all_cases FROM chosen GROUP BY ALL)
        SELECT model, recipe, budget, cases, all_cases, failed, {", ".join(figures)}, recipe_json
        FROM each JOIN every USING (fingerprint) ORDER BY model, recipe
    """  # noqa: S608  names of ours, and the user's own condition


def front_of(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The rows that no other row beats: better in one figure and no worse in the other. By x, the best first."""
    ranked = table.dropna(subset=[x, y])
    costs = [(-1.0 if name in HIGHER_IS_BETTER else 1.0) * ranked[name].astype(float) for name in (x, y)]
    order = sorted(range(len(ranked)), key=lambda row: (costs[0].iloc[row], costs[1].iloc[row]))
    chosen: list[int] = []
    for row in order:
        here = tuple(cost.iloc[row] for cost in costs)
        last = tuple(cost.iloc[chosen[-1]] for cost in costs) if chosen else None
        if last is None or here[1] < last[1] or here == last:
            chosen.append(row)
    return ranked.iloc[chosen].reset_index(drop=True)
