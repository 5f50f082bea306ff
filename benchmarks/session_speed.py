"""What a session costs beside plain transformers, and how quickly a plan follows the slider (default model, 2,048
tokens).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

import workbench as wb
from benchmarks.record import environment, median_seconds, write
from workbench.errors import BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench.registry import registered

TOKENS, NEW, REPEATS = 2048, 32, 5
BUDGETS = (0.3, 0.45, 0.6, 0.35, 0.5, 0.25)


def prompt(session: wb.Session) -> torch.Tensor:
    """2,048 ids of plain sentences."""
    text = " ".join(f"On day {day} the keeper counted {day * 7 % 101} birds and wrote it down." for day in range(300))
    assert session.tokenizer is not None
    return torch.tensor(session.tokenizer(text)["input_ids"][:TOKENS])


def interleaved(first: Any, second: Any, repeats: int = REPEATS) -> tuple[float, float, float]:
    """Median seconds of two pieces of work done in turns, so that a busy moment meets both, and of their ratio."""
    first(), second()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        first()
        middle = perf_counter()
        second()
        times.append((middle - began, perf_counter() - middle))
    ones, others = zip(*times, strict=True)
    return statistics.median(ones), statistics.median(others), statistics.median(b / a for a, b in times)


def plan_times(session: wb.Session) -> dict[str, dict[str, float]]:
    """For each KV method that does not read the prompt again: the first plan with its scoring, then the median of plans
    for a changed budget, in ms. Budgets that a method cannot meet are left out.
    """
    found = {}
    for method in registered("kv"):
        if not issubclass(method, KVMethod) or method.key == "full" or method.contributes("read"):
            continue
        began = perf_counter()
        with suppress(BudgetTooSmall):
            session.plan(method.key, budget=0.4)
        first = perf_counter() - began
        times = []
        for budget in BUDGETS:
            began = perf_counter()
            with suppress(BudgetTooSmall):
                session.plan(method.key, budget=budget)
                times.append(perf_counter() - began)
        if not times:
            continue
        found[method.key] = {"first_ms": first * 1e3, "changed_budget_ms": statistics.median(times) * 1e3}
    return found


def import_seconds(command: list[str]) -> float:
    return median_seconds(partial(subprocess.run, command, check=True, capture_output=True), REPEATS)


def main() -> None:
    before = environment()
    began = perf_counter()
    session = wb.Session("smollm2-135m")
    load_s = perf_counter() - began
    model, ids = session.model, prompt(session)
    question = torch.tensor([198, 2000, 314, 260, 1230, 47])
    both = torch.cat([ids, question])[None]

    @torch.inference_mode()
    def forward() -> None:
        model(ids[None], use_cache=True, logits_to_keep=1)

    generated: Any = model.generate

    @torch.inference_mode()
    def generate() -> None:
        generated(
            both,
            attention_mask=torch.ones_like(both),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    def read() -> None:
        session.read(ids)

    def read_and_run() -> None:
        session.read(ids)
        run = session.run("full", question=question, max_new_tokens=NEW)
        if len(run.tokens) != NEW:
            raise SystemExit("the comparison needs the same number of tokens")

    plain_read, our_read, read_ratio = interleaved(forward, read)
    facts = session.facts
    session.readings.facts = replace(facts, eos_ids=())  # both must generate the same number of tokens
    plain_run, our_run, run_ratio = interleaved(generate, read_and_run, 3)
    session.readings.facts = facts
    plans = plan_times(session)
    python = sys.executable
    figures = {
        "load_s": load_s,
        "forward_s": plain_read,
        "read_s": our_read,
        "read_ratio": read_ratio,
        "generate_s": plain_run,
        "read_and_run_s": our_run,
        "run_ratio": run_ratio,
        "import_s": import_seconds([python, "-c", "import workbench"]) - import_seconds([python, "-c", "pass"]),
        "help_s": import_seconds([python, "-m", "workbench", "--help"]),
        "plans": plans,
    }
    slowest = max(plans, key=lambda key: plans[key]["changed_budget_ms"])
    table = [
        ["what", "measured", "limit"],
        ["reading 2,048 tokens over a plain forward", f"{read_ratio:.3f}", "1.15"],
        ["read and run `full` over plain generate, 32 tokens", f"{run_ratio:.3f}", "1.05"],
        *[
            [
                f"plan `{key}` at a changed budget (first time)",
                f"{t['changed_budget_ms']:.1f} ms ({t['first_ms']:.0f} ms)",
                "50 ms",
            ]
            for key, t in plans.items()
        ],
        [f"slowest plan: `{slowest}`", f"{plans[slowest]['changed_budget_ms']:.1f} ms", "50 ms"],
        ["import workbench", f"{figures['import_s']:.3f} s", "0.3 s"],
        ["workbench --help", f"{figures['help_s']:.3f} s", "0.5 s"],
        ["loading the default model", f"{load_s:.1f} s", ""],
    ]
    write("session_speed", figures, table, before)


if __name__ == "__main__":
    main()
