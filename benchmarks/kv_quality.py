"""What each KV method costs the answer at equal bytes: needles, one of many keys, a chain of variables, held texts.

The question comes after compression, so no method knows it (except in the task "asked first"). Every method runs at
the same shares of the uncompressed bytes; a budget that it cannot meet leaves a gap. Rows are saved as they are
measured: `--resume` goes on with what is there, `--table` makes the results of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import workbench as wb
from benchmarks.kv_cases import HELD, HELD_TOKENS, TASKS, Spec, build, specs
from benchmarks.kv_evidence import report
from benchmarks.kv_recipes import OWN, Entry, entries, fixed
from benchmarks.parts import Part, Row, identity, read_parts, settled
from benchmarks.record import RESULTS, environment, where
from workbench.errors import BudgetTooSmall, Cancelled, NotApplicable
from workbench.measure.quality import compare_logits
from workbench.progress import Progress
from workbench.prompt import text_ids
from workbench.runtime.run import Run

BUDGETS = (0.5, 0.25, 0.1)
LENGTHS = (512, 1024)
MODELS = ("smollm2-135m", "workbench-tiny")
JSON = RESULTS / "kv_quality.json"
COLUMNS = (  # of the rows in the results
    *(
        "model",
        "case",
        "task",
        "length",
        "depth",
        "recipe",
        "budget",
        "share",
        "host",
        "right",
        "nll",
        "kl",
        "top1",
        "tokens",
        "seconds",
    ),
    *("device", "gap", "error"),
)


@dataclass(frozen=True)
class Item:
    """What a worker takes at once: a case for a model, and some of the recipes on its reading."""

    model: str
    spec: Spec
    recipes: tuple[str, ...]
    budgets: tuple[float, ...]


def items(
    models: Sequence[str], cases: Sequence[Spec], known: Mapping[str, Entry], budgets: Sequence[float], chunk: int
) -> list[Item]:
    """All work, model by model and case after case; recipes that are neighbours, and cost alike, go to different
    items.
    """
    found = []
    for model in models:
        for spec in cases:
            names = [name for name, entry in known.items() if spec.task in entry.tasks]
            parts = -(-len(names) // chunk)
            found += [Item(model, spec, tuple(names[part::parts]), tuple(budgets)) for part in range(parts)]
    return found


def missing(item: Item, known: dict[str, Entry], done: set[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """The (recipe, budget) of an item that have not been measured yet."""
    wanted = [(name, budget) for name in item.recipes for budget in known[name].budgets(item.budgets)]
    case = case_of(item.model, item.spec)
    return [(name, budget) for name, budget in wanted if (case, name, budget) not in done]


def case_of(model: str, spec: Spec) -> str:
    """The name of a case that a model reads."""
    return f"{model}/{spec.key}"


class Bench:
    """A session that has read one case at a time, and what the uncompressed cache makes of that case."""

    def __init__(self, model: str, device: str, progress: Progress) -> None:
        # float32 everywhere, so that rows of different devices can stand in one table.
        self.session = wb.Session(model, device=device, dtype="float32")
        assert self.session.tokenizer is not None
        self.tokenizer: Any = self.session.tokenizer
        self.model, self.progress, self.device = model, progress, device
        self.spec: Spec | None = None

    def read(self, spec: Spec) -> None:
        """Read the text of a case, and what the right reply costs the full cache; nothing if it was read last."""
        if spec == self.spec:
            return
        self.spec = None
        case = build(spec, lambda text: self.tokenizer(text)["input_ids"])
        self.question = case.question
        if spec.task == HELD:
            self.targets, self.counted = torch.tensor(case.continuation), HELD_TOKENS - 1
        else:
            (answer,) = case.answers
            self.targets = text_ids(f"{case.lead} {answer}", self.session.tokenizer)
            self.counted = len(self.targets) - len(text_ids(case.lead, self.session.tokenizer))
        self.session.read(case.text, progress=self.progress)
        self.full, _ = self._reply(fixed(wb.Recipe.of("full")), OWN)
        self.spec = spec

    def row(self, name: str, entry: Entry, budget: str) -> Row:
        """One measurement; see the notes of the report for what its figures mean."""
        assert self.spec is not None
        assert self.session.trace is not None
        spec, began = self.spec, time.perf_counter()
        about = {"model": self.model, "case": case_of(self.model, spec), "task": spec.task, "length": spec.length}
        about |= {
            "depth": spec.depth,
            "recipe": name,
            "budget": budget,
            "device": self.device,
            "tokens": self.session.trace.tokens,
        }
        try:
            logits, run = self._reply(entry, budget)
        except (BudgetTooSmall, NotApplicable) as problem:
            return {**about, "gap": str(problem)}
        except Cancelled:
            raise
        except Exception as problem:  # noqa: BLE001  one method's defect must not take the others with it
            return {**about, "error": f"{type(problem).__name__}: {problem}"}
        whole = compare_logits(self.full, logits, self.targets[1:])
        last = slice(-self.counted, None)
        answer = compare_logits(self.full[last], logits[last], self.targets[last])
        nll = answer.nll if name == "full" else answer.nll_difference
        host = run.plan.host_nbytes / run.plan.full_nbytes
        figures = {"share": run.plan.share, "host": host, "nll": nll, "kl": whole.kl, "top1": whole.top1_agreement}
        if spec.task != HELD:
            figures["right"] = float((logits[last].argmax(-1) == self.targets[last]).all())
        return {**about, **figures, "seconds": round(time.perf_counter() - began, 3)}

    def _reply(self, entry: Entry, budget: str) -> tuple[Tensor, Run]:
        """Logits [t - 1, v] for the reply's tokens after the first; the answer is read token by token, as in decoding.

        What comes before the answer is read at once: it is given, as the question is, and costs one pass.
        """
        run = self.session.run(entry.under(budget), question=self.question, max_new_tokens=1, progress=self.progress)
        self.session.runs.clear()  # nothing more is asked of it
        decoder, given = run.decoder, len(self.targets) - self.counted
        assert decoder is not None
        rows = [decoder.feed(self.targets[:given], logits=given).cpu()]
        rows.extend(decoder.feed(token[None]).cpu() for token in self.targets[given:-1])
        return torch.cat(rows), run


def work(options: argparse.Namespace, device: str, taken: Synchronized[int], ends: float) -> None:
    """One process: take the next item until none is left or the time is up."""
    torch.set_num_threads(1)
    progress = Progress()
    alarm = threading.Timer(max(ends - time.time(), 0), progress.cancel)
    alarm.daemon = True
    alarm.start()
    known = entries(options.methods)
    done = settled(read_parts(options.parts)) if options.resume else set()
    todo = _items(options, known)
    bench: Bench | None = None
    part = Part(options.parts)
    try:
        while time.time() < ends:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(todo):
                return
            item = todo[number]
            rest = missing(item, known, done)
            if not rest:
                continue
            if bench is None or bench.model != item.model:
                bench = Bench(item.model, device, progress)
            bench.read(item.spec)
            for name, budget in rest:
                progress.check()
                part.add(bench.row(name, known[name], budget))
    except Cancelled:
        return


def _items(options: argparse.Namespace, known: dict[str, Entry]) -> list[Item]:
    cases = specs(options.tasks, options.lengths, options.draws)
    return items(options.models, cases, known, options.budgets, options.chunk)


def measure(options: argparse.Namespace) -> None:
    """Let the workers measure what is missing, and say how far they came."""
    ends = time.time() + (options.limit_s or 1e9)
    options.parts.mkdir(parents=True, exist_ok=True)
    before = environment() | {"command": " ".join(["python -m benchmarks.kv_quality", *sys.argv[1:]])}
    (options.parts / "environment.json").write_text(json.dumps(before))
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    context = multiprocessing.get_context("spawn")
    taken: Synchronized[int] = context.Value("l", 0)
    devices = [options.devices[index % len(options.devices)] for index in range(options.workers)]
    workers = [context.Process(target=work, args=(options, device, taken, ends), daemon=True) for device in devices]
    for worker in workers:
        worker.start()
    for worker in workers:
        # A worker that does not stop when asked has saved what it measured; it ends with this process.
        worker.join(max(ends + 15 - time.time(), 0) if options.limit_s else None)
    done, known = settled(read_parts(options.parts)), entries(options.methods)
    left = sum(len(missing(item, known, done)) for item in _items(options, known))
    print(f"{len(done)} rows in {options.parts}, {left} left to measure; --table makes the results", file=sys.stderr)


def tabulate(parts: Path) -> None:
    """Make the results of the rows in `parts`, or again of those in the results themselves where there are none."""
    rows = read_parts(parts) if parts.is_dir() else []
    if rows:
        before = json.loads((parts / "environment.json").read_text())
        devices = sorted({str(row["device"]).partition(":")[0] for row in rows})
        before["device"] = f"{before['device']} ({', '.join(devices)})"
        lines = [json.dumps([_short(row.get(column)) for column in COLUMNS]) for row in sorted(rows, key=identity)]
        head = json.dumps({"environment": before, "columns": COLUMNS}, indent=1)[:-2]
        JSON.write_text(head + ',\n "rows": [\n' + ",\n".join(lines) + "\n]}\n")
    if not JSON.exists():
        raise SystemExit(f"nothing has been measured: no rows in {parts}, and no {JSON}")
    saved = json.loads(JSON.read_text())
    rows = [
        {name: value for name, value in zip(saved["columns"], row, strict=True) if value is not None}
        for row in saved["rows"]
    ]
    text = report(rows) + f"\n{where(saved['environment'])}\n"
    JSON.with_suffix(".md").write_text(text)
    print(text)


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="recipes (all); the full cache is always measured")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, metavar="SHARE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--draws", type=int, default=1, help="how many of each kind of case")
    parser.add_argument("--chunk", type=int, default=12, help="recipes that a worker takes at once")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument(
        "--devices", type=lambda text: text.split(","), default=["cpu"], help="for the workers in turns: cuda:0,cpu"
    )
    parser.add_argument("--limit-s", type=float, help="seconds after which no worker goes on")
    parser.add_argument("--parts", type=Path, default=Path("build/kv_quality"), help="where rows are saved")
    parser.add_argument("--resume", action="store_true", help="leave out what is in the parts already")
    parser.add_argument("--table", action="store_true", help="only make results/kv_quality.* of the parts")
    options = parser.parse_args()
    if options.table:
        tabulate(options.parts)
        return
    if not options.resume and options.parts.is_dir() and any(options.parts.glob("*.jsonl")):
        parser.error(f"{options.parts} has rows already: --resume, or give other --parts")
    measure(options)


if __name__ == "__main__":
    main()
