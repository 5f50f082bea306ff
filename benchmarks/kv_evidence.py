"""From measured rows to the report: tables, the directions that papers lead us to expect, and each method's claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.claims import Claim, claims
from benchmarks.kv_cases import ASKED_FIRST, ASKED_LATER, HELD, TASKS
from benchmarks.kv_recipes import NOTES, OWN
from benchmarks.parts import Row
from benchmarks.record import markdown
from workbench.registry import registered

NEAR = 0.1  # nats a token: what "near lossless" may cost
SMALL = 0.3  # budgets below this one are small

_HEAD = f"""# kv_quality

What each KV method costs the answer at equal bytes. Every figure is a mean over cases, ± its standard error.

- **bytes**: what the plan holds on the device, as a share of the uncompressed cache, scales, indices and all;
  **host**: what it holds in host memory besides. Budgets count the device. "own" is a method's size without a budget.
- **right**: how often the greedy answer is the right one, when the reply's beginning ("The secret number of the archive
  is") is given. In {", ".join(ASKED_LATER)} the question comes after compression; in "{ASKED_FIRST}", a needle too, it
  ends the text that is compressed.
- **nats lost**: by how much the right answer's tokens became less likely than with the full cache, nats a token. For
  the full cache: their negative log-likelihood itself.
- **text, nats lost**: the same for the next 63 tokens of a held text; e to its power is the factor by which perplexity
  grows.
- **KL, top-1**: over all tokens of the right reply but the first, against the full cache.
"""

_CLAIMS = """
## Claims

Each paper's claim, how true the entry is to its paper, and the measurement on {model} that comes closest to the claim.
Where it fails, the reason is one that rows of this benchmark show: each ablation named beside it loses less by more
than the standard error of the difference; otherwise it says that it is not known. Claims about what these texts cannot
tell (images, millions of tokens, throughput) are not judged by them.
"""

_DIRECTIONS = """
## Directions

Differences are paired over the cases that both have; a difference within its standard error is undecided. Tasks are
those whose question comes after compression unless others are named.
"""


@dataclass(frozen=True)
class Mean:
    """A mean over n cases and its standard error (not a number for one case)."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean | None:
        """None where there are no values."""
        found = list(values)
        if not found:
            return None
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        return cls(statistics.fmean(found), error, len(found))

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.3f}"
        return f"{self.value:+.3f}{error}"


class Rows:
    """Measured rows by recipe, budget and case; gaps and failures apart."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.found: dict[tuple[str, str], dict[str, Row]] = {}
        self.gaps: dict[tuple[str, str], list[Row]] = {}
        self.errors: list[Row] = []
        for row in rows:
            at = row["recipe"], row["budget"]
            if "error" in row:
                self.errors.append(row)
            elif "gap" in row:
                self.gaps.setdefault(at, []).append(row)
            else:
                self.found.setdefault(at, {})[row["case"]] = row

    def of(self, recipe: str, budget: str, tasks: Sequence[str] = TASKS) -> list[Row]:
        """The rows of a recipe at a budget."""
        return [row for row in self.found.get((recipe, budget), {}).values() if row["task"] in tasks]

    def mean(self, recipe: str, budget: str, tasks: Sequence[str], figure: str = "nll") -> Mean | None:
        return Mean.of(row[figure] for row in self.of(recipe, budget, tasks) if figure in row)

    def advantage(
        self, recipe: str, other: str, budget: str, tasks: Sequence[str] = ASKED_LATER, at: str | None = None
    ) -> Mean | None:
        """By how many nats a token `recipe` loses less than `other`, paired over the cases that both have.

        at: the other's budget, if it is not the same.
        """
        others = {row["case"]: row["nll"] for row in self.of(other, at or budget, tasks)}
        rows = self.of(recipe, budget, tasks)
        return Mean.of(others[row["case"]] - row["nll"] for row in rows if row["case"] in others)

    def budgets(self, *recipes: str) -> list[str]:
        """Those at which all these recipes were tried, large to small."""
        tried = [{budget for name, budget in (*self.found, *self.gaps) if name == recipe} for recipe in recipes]
        return sorted(set.intersection(*tried) - {OWN}, key=float, reverse=True)


@dataclass(frozen=True)
class Check:
    """A direction that was expected, the numbers, and what they say of it."""

    expected: str
    numbers: str
    verdict: str

    @classmethod
    def better(cls, rows: Rows, recipe: str, other: str, budget: str, tasks: Sequence[str] = ASKED_LATER) -> Check:
        """Whether `recipe` loses less than `other`; within one standard error it is undecided."""
        expected = f"{recipe} loses less than {other}{_at(budget)}{_on(tasks)}"
        gained = rows.advantage(recipe, other, budget, tasks)
        if gained is None:
            return cls(expected, "", "not measured")
        own, others = rows.mean(recipe, budget, tasks), rows.mean(other, budget, tasks)
        assert own is not None
        assert others is not None
        numbers = f"{own.value:+.3f} against {others.value:+.3f}: {gained} nats a token better (n = {gained.n})"
        return cls(expected, numbers, _verdict(gained.value, gained.error))

    @classmethod
    def near(
        cls, rows: Rows, recipe: str, budget: str, tasks: Sequence[str] = ASKED_LATER, limit: float = NEAR
    ) -> Check:
        """Whether `recipe` loses less than `limit` nats a token; within one standard error it is undecided."""
        expected = f"{recipe} loses less than {limit:g} nats a token{_at(budget)}{_on(tasks)}"
        lost = rows.mean(recipe, budget, tasks)
        if lost is None:
            gap = rows.gaps.get((recipe, budget))
            return cls(expected, gap[0]["gap"] if gap else "", "not possible" if gap else "not measured")
        return cls(expected, f"{lost} (n = {lost.n})", _verdict(limit - lost.value, lost.error))

    def turned(self, expected: str) -> Check:
        """The check of the opposite."""
        verdicts = {"holds": "does not hold", "does not hold": "holds"}
        return Check(expected, self.numbers, verdicts.get(self.verdict, self.verdict))


def _at(budget: str) -> str:
    return "" if budget == OWN else f" at {float(budget):.0%}"


def _on(tasks: Sequence[str]) -> str:
    return "" if tuple(tasks) == ASKED_LATER else f" ({', '.join(tasks)})"


def _verdict(margin: float, error: float) -> str:
    if not math.isnan(error) and abs(margin) <= error:
        return "undecided"
    return "holds" if margin > 0 else "does not hold"


def direction_checks(rows: Rows) -> list[Check]:
    """What the papers together lead us to expect, each on its own at every budget where it says something."""
    uneven = ("adakv", "pyramidkv", "headkv", "headkv-r2")
    return [
        *_better(rows, "kvzip", "snapkv"),
        *(check for method in uneven for check in _better(rows, method, "snapkv")[-1:]),
        *_better(rows, "kvzip", "kvzip, equal heads")[-1:],
        *(check for method in uneven for check in _better(rows, method, "snapkv", (ASKED_FIRST,))[-1:]),
        *(check for other in ("h2o", "snapkv") for check in _better(rows, "mikv", other, below=SMALL)),
        Check.near(rows, "kivi 4-bit", OWN),
        Check.near(rows, "kivi 4-bit", OWN, (HELD,)),
        Check.near(rows, "per-token 2-bit", OWN).turned(f"per-token 2-bit loses more than {NEAR:g} nats a token"),
        Check.better(rows, "kivi 2-bit, no residual", "per-token 2-bit", OWN),
        Check.better(rows, "kivi 2-bit, no residual", "per-token 2-bit", OWN, (HELD,)),
    ]


def _better(
    rows: Rows, recipe: str, other: str, tasks: Sequence[str] = ASKED_LATER, below: float = math.inf
) -> list[Check]:
    """Whether a recipe loses less than another at each budget under `below` at which both were tried."""
    return [
        Check.better(rows, recipe, other, budget, tasks)
        for budget in rows.budgets(recipe, other)
        if float(budget) < below
    ]


def claim_check(rows: Rows, claim: Claim) -> Check:
    """The measurement that comes closest to what a method's paper claims."""
    tasks = claim.tasks or ASKED_LATER
    if claim.near is not None:
        return Check.near(rows, claim.judged, claim.at, tasks, claim.near)
    if not claim.against:
        return Check("", "", "not judged")
    return Check.better(rows, claim.judged, claim.against, claim.at, tasks)


def reason(rows: Rows, claim: Claim) -> str:
    """Why a claim fails, with the ablations that show it; "not known" where none of those tried does.

    An ablation shows it if it loses less than what is judged, by more than the standard error of the difference.
    """
    tasks = claim.tasks or ASKED_LATER
    told, shown = {}, set()
    for name in claim.ablations:
        budget = claim.budget(name)
        lost = rows.mean(claim.row(name), budget, tasks)
        gained = rows.advantage(claim.row(name), claim.judged, budget, tasks, claim.at)
        if lost is None or gained is None:
            continue
        told[name] = f"{lost.value:+.3f}"
        if _verdict(gained.value, gained.error) == "holds":
            shown.add(name)
    return claim.reason(told, shown)


def report(measured: Iterable[Row], notes: Mapping[str, Claim] | None = None) -> str:
    """The whole report as Markdown, model by model; claims are judged on the first. notes: unless given, those of
    NOTES.
    """
    by_model: dict[str, list[Row]] = {}
    for row in measured:
        by_model.setdefault(row["model"], []).append(row)
    notes = claims(NOTES) if notes is None else notes
    ablations = {claim.row(name) for claim in notes.values() for name in claim.ablations}
    sections = [_HEAD]
    for model, found in by_model.items():
        rows = Rows(found)
        if len(sections) == 1:
            sections += [_CLAIMS.format(model=model), markdown(_claims(rows, notes))]
            sections += [_DIRECTIONS, markdown(_checks(direction_checks(rows)))]
        plain = Rows(row for row in found if row["recipe"] not in ablations)
        sections += [f"\n## {model}, at equal bytes\n", markdown(_figures(plain))]
        sections += [f"\n## {model}, needles by length and depth, nats lost\n", markdown(_needles(plain))]
        sections += _gaps(rows, model)
    return "\n".join(sections) + "\n"


def _figures(rows: Rows) -> list[list[str]]:
    asked = [task for task in TASKS if task != HELD]
    table = [
        [
            "recipe",
            "budget",
            "bytes",
            "host",
            *asked,
            "nats lost",
            f"nats lost, {ASKED_FIRST}",
            "text, nats lost",
            "KL",
            "top-1",
        ]
    ]
    for (recipe, budget), found in rows.found.items():
        share, host = (Mean.of(row.get(name, 0.0) for row in found.values()) for name in ("share", "host"))
        kl, top1 = (rows.mean(recipe, budget, ASKED_LATER, figure) for figure in ("kl", "top1"))
        table.append(
            [
                recipe,
                budget,
                f"{share.value:.1%}" if share else "",
                f"{host.value:.1%}" if host and host.value else "",
                *(_right(rows.of(recipe, budget, [task])) for task in asked),
                *(str(rows.mean(recipe, budget, tasks) or "") for tasks in (ASKED_LATER, [ASKED_FIRST], [HELD])),
                f"{kl.value:.3f}" if kl else "",
                f"{top1.value:.0%}" if top1 else "",
            ]
        )
    order = {recipe: place for place, recipe in enumerate(dict.fromkeys(recipe for recipe, _ in rows.found))}
    return [table[0], *sorted(table[1:], key=lambda row: (row[0] != "full", order[row[0]], -_amount(row[1])))]


def _amount(budget: str) -> float:
    return 2.0 if budget == OWN else float(budget)


def _right(rows: list[Row]) -> str:
    return f"{sum(row['right'] for row in rows):.0f}/{len(rows)}" if rows else ""


def _needles(rows: Rows) -> list[list[str]]:
    needles = {at: [row for row in found.values() if row["task"] == "needle"] for at, found in rows.found.items()}
    every = [row for found in needles.values() for row in found]
    lengths, depths = sorted({row["length"] for row in every}), sorted({row["depth"] for row in every})
    table = [["recipe", "budget", *(f"{length:,}" for length in lengths), *(f"depth {depth:g}" for depth in depths)]]
    for (recipe, budget), found in needles.items():
        means = [
            *(Mean.of(row["nll"] for row in found if row["length"] == length) for length in lengths),
            *(Mean.of(row["nll"] for row in found if row["depth"] == depth) for depth in depths),
        ]
        table.append([recipe, budget, *(f"{mean.value:+.2f}" if mean else "" for mean in means)])
    return table


def _checks(checks: Iterable[Check]) -> list[list[str]]:
    return [["expected", "measured", "verdict"], *([c.expected, c.numbers, c.verdict] for c in checks)]


def _claims(rows: Rows, notes: Mapping[str, Claim]) -> list[list[str]]:
    table = [["method", "the paper claims", "here it is", "tested here", "measured", "verdict", "why"]]
    for cls in registered("kv"):
        if cls.key == "full":
            continue
        claim = notes.get(cls.key)
        check = Check("", "", "not measured") if claim is None else claim_check(rows, claim)
        verdict, why = check.verdict, ""
        if claim is not None and claim.elsewhere:
            verdict, why = "not judged", claim.elsewhere
        elif claim is not None and verdict in ("undecided", "does not hold", "not possible"):
            why = reason(rows, claim)
        name = f"{cls.title} (`{cls.key}`)"
        table.append([name, cls.claim, str(cls.fidelity or ""), check.expected, check.numbers, verdict, why])
    return table


def _gaps(rows: Rows, model: str) -> list[str]:
    found = []
    if rows.gaps:
        lines = [f"- {recipe} at {budget}: {gaps[0]['gap']}" for (recipe, budget), gaps in rows.gaps.items()]
        found += [f"\n## {model}, gaps\n", *lines]
    if rows.errors:
        lines = [f"- {row['recipe']} at {row['budget']}, {row['case']}: {row['error']}" for row in rows.errors]
        found += [f"\n## {model}, failures\n", *lines]
    return found
