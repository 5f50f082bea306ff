"""What a search finds beside the best single method at its best published setting, at the same bytes.

`python -m benchmarks.search [--model workbench-tiny] [--seed 0]`. Every KV method by itself, at its defaults and at
each published setting, gets the same limit and the same cases; one that has more wrong answers than the best so far is
measured no further, for it cannot be the best. Both bests are then measured on other cases.
"""

from __future__ import annotations

import argparse
import time
from tempfile import TemporaryDirectory
from typing import Any

import workbench as wb
from benchmarks.record import environment, write
from workbench.budget import Budget
from workbench.recipe import Recipe
from workbench.registry import find, method
from workbench.results import Results
from workbench.search import Goal, Measured, search
from workbench.search.measuring import Candidate, Measuring, Patience
from workbench.search.ranges import TUNED, settings
from workbench.search.searching import TASKS
from workbench.search.space import WEIGHTS, at_sizes, chosen_methods
from workbench.sweep.bench import Bench
from workbench.tasks import Task
from workbench.weights.base import WeightMethod

CASES = 4
ELSEWHERE = 1000  # the seed of the other cases
LIMITS = {"workbench-tiny": (("256 KiB", "kv"), ("12 MiB", "total")), "smollm2-135m": (("200 MiB", "total"),)}


def cases(seed: int) -> list[tuple[Task, int]]:
    tasks = [wb.task(text.split()[0], length=512, seed=seed) for text in TASKS]
    return [(task, number) for number in range(CASES) for task in tasks]


def singles(goal: Goal) -> list[Recipe]:
    """Every method by itself at every setting, within the limit: KV methods of a cache, weight methods of a total."""
    assert goal.limit is not None
    if goal.memory != "kv":
        kinds = [cls for key in WEIGHTS if issubclass(cls := find(key), WeightMethod)]
        return [Recipe.of([made]) for cls in kinds for made in at_sizes(cls)]
    chosen = chosen_methods(None, host="counts")
    budget = Budget("bytes", float(goal.limit))
    made = [
        Recipe.of(method(key, preset=name))
        for key in (*chosen.store, *chosen.keep)
        for name in settings(find(key))
        if name != TUNED
    ]
    return [Recipe.of(each, budget=budget) if each.takes_budget() else each for each in made]


def best_single(goal: Goal, measuring: Measuring) -> tuple[Candidate, int]:
    best, place = None, (float("inf"),)
    recipes = singles(goal)
    for number, recipe in enumerate(recipes):
        each = Candidate(number, recipe)
        for count in range(1, len(measuring.cases) + 1):
            measuring.extend([each], count)
            now = each.measured(goal)
            wrong = now.judged - now.correct
            if each.failed or goal.excess(now) or (best is not None and wrong > _wrong(best.measured(goal))):
                break
        else:
            if goal.place(each.measured(goal)) < place:
                best, place = each, goal.place(each.measured(goal))  # type: ignore[assignment]
    assert best is not None, "no method by itself is within the limit"
    return best, len(recipes)


def _wrong(measured: Measured) -> int:
    return measured.judged - measured.correct


def compared(model: str, limit: str, memory: str, seed: int, trials: int) -> dict[str, Any]:
    goal = Goal.of(limit, memory, None)
    session = wb.Session(model)
    first: list[float] = []
    began = time.perf_counter()
    found = search(
        session, limit=limit, memory=memory, seed=seed, trials=trials, cases=CASES, minutes=None, patience=30,
        on_front=lambda now: first.append(time.perf_counter() - began) if len(now.front()) and not first else None,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    with TemporaryDirectory() as folder:
        results, bench = Results(folder), Bench(wb.Session(model))

        def on(seed: int) -> Measuring:
            return Measuring(bench, results, cases(seed), 30.0, Patience(wb.Progress(), float("inf")), lambda: None)

        single, tried = best_single(goal, on(0))
        assert single.recipe is not None
        pair = {"searched": found.best(), "single": single.recipe}
        record: dict[str, Any] = {"model": model, "limit": limit, "memory": memory, "seed": seed, "trials": trials}
        record |= {"seconds": round(seconds, 1), "first_front_s": round(first[0], 1), "singles": tried}
        for name, recipe in pair.items():
            for where, number in (("", 0), ("_elsewhere", ELSEWHERE)):
                each = Candidate(0, recipe)
                measuring = on(number)
                measuring.extend([each], len(measuring.cases))
                now = each.measured(goal)
                record[name + where] = {
                    "recipe": recipe.label, "recipe_json": recipe.to_dict(), "bytes": now.memory,
                    "correct": now.correct, "full_correct": now.full_correct, "judged": now.judged, "kl": now.kl,
                    "error": now.error,
                }  # fmt: skip
        record["at_least_as_good"] = goal.place(_again(record["searched"])) <= goal.place(_again(record["single"]))
        return record


def _again(said: dict[str, Any]) -> Measured:
    names = ("correct", "full_correct", "judged", "kl")
    return Measured(said["judged"], memory=said["bytes"], **{name: said[name] for name in names})


def report(records: list[dict[str, Any]], before: dict[str, Any]) -> None:
    head = ["model", "limit", "", "recipe", "MiB", "right", "KL", "right elsewhere", "KL elsewhere"]
    rows = []
    for record in records:
        for name in ("searched", "single"):
            here, there = record[name], record[f"{name}_elsewhere"]
            rows.append([
                record["model"], f"{record['memory']} {record['limit']}",
                f"{record['trials']} trials" if name == "searched" else f"best of {record['singles']} singles",
                here["recipe"], f"{here['bytes'] / 2**20:.3f}", f"{here['correct']} of {here['judged']}",
                f"{here['kl']:.4g}", f"{there['correct']} of {there['judged']}", f"{there['kl']:.4g}",
            ])  # fmt: skip
    write("search", {"records": records}, [head, *rows], before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", choices=list(LIMITS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=80)
    options = parser.parse_args()
    before = environment()
    wanted = [(model, *limit) for model in options.model or ["workbench-tiny"] for limit in LIMITS[model]]
    made: list[dict[str, Any]] = []
    for each in wanted:  # what is done is written before the next begins
        made.append(compared(*each, seed=options.seed, trials=options.trials))
        report(made, before)
