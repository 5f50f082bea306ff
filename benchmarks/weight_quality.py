"""What each weight method costs at which size: perplexity and divergence on held-out text, errors of layers and blocks.

Methods look at the text that ships with the project; what is measured is read from the running Python's documentation
of its topics, which they have not seen. A model that was trained on that documentation has the two texts exchanged.
Rows are saved as they are measured: `--resume` goes on with what is there, `--table` makes the results of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

import workbench as wb
from benchmarks.claims import Claim, claims
from benchmarks.parts import Part, Row, identity, read_parts, settled
from benchmarks.record import RESULTS, environment, markdown, where
from workbench.engine.attention_hook import device_of, exclusive
from workbench.errors import BudgetTooSmall, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.models.decoder import decoder_layers
from workbench.recipe import Recipe
from workbench.registry import find
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.block_runner import BlockRunner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import PYTHON, SHIPPED, Calibration
from workbench.weights.compress import compressed, weight_methods
from workbench.weights.layers import CompactLinear

JSON = RESULTS / "weight_quality.json"
TURNED = ("ostquant",)  # beside those that transform weights: hidden states are in another basis, so that single layers
# and blocks cannot be compared
PRUNED = {50: 0.5625, 30: 0.7625, 20: 0.8625}  # share of zeros in percent -> of the bytes, with one bit a weight more
OWN = "own"
TAUGHT = ("workbench-tiny",)  # trained on Python's documentation: it knows that text, and not the project's
CLAIMS = Path(__file__).with_name("weight_quality_notes.toml")

Settings = Mapping[str, Any]
Entry = tuple[tuple[str, Settings], ...]  # of a recipe's methods: key and what the table sets


def one(key: str, **settings: Any) -> Entry:
    """A recipe of one method."""
    return ((key, settings),)


# What is measured, the most telling first; the ablations of the claims come after these.
ENTRIES: tuple[Entry, ...] = (
    *(one(key, bits=bits) for bits in (4, 3, 2) for key in ("rtn", "gptq", "awq")),
    one("absmax", bits=8),
    one("rtn", bits=8),
    one("crossquant"),
    *(((key, {"bits": 8}), ("activations", {})) for key in ("absmax", "rtn")),
    *(one("hqq", bits=bits) for bits in (8, 4, 3, 2)),
    *(one(key, budget=PRUNED[50]) for key in ("magnitude", "wanda", "sparsegpt")),
    *(one(key, pattern="2:4", budget=PRUNED[50]) for key in ("magnitude", "wanda", "sparsegpt")),
    *(one(key, budget=0.8) for key in ("svd", "svd-llm", "fwsvd", "modegpt", "cospadi", "greenformers", "flashsvd")),
    *(one("slim-llm", bits=bits) for bits in (3, 2)),
    *(one("owq", bits=bits) for bits in (3, 2)),
    *(one("bitstack", budget=budget) for budget in (0.4, 0.3, 0.2, 0.15)),
    one("ostquant", bits=4),
    *((("quarot", {}), (key, {"bits": 4})) for key in ("rtn", "gptq")),
    one("vptq"),
    one("pb-llm"),
    one("easyquant", bits=4),
    *(one("denseshift", bits=bits) for bits in (4, 3)),
    one("double-rounding", bits=4),
    one("odyssey"),
    one("evopress"),
    *(one(key, budget=PRUNED[zeros]) for zeros in (30, 20) for key in ("magnitude", "wanda", "sparsegpt")),
    *(one(key, budget=0.9) for key in ("cfsp", "ziplm", "comp", "foldgpt", "evopress-depth", "transact")),
    one("udfc"),
    one("coreinfer"),
    one("vq-logits"),
    *((("wanda", {"budget": PRUNED[50]}), (key, {"bits": 4})) for key in ("rtn", "gptq")),
    (("sparsegpt", {"pattern": "2:4", "budget": PRUNED[50]}), ("rtn", {"bits": 4})),
)

NOTES = """\
Methods looked at the text that ships with the project (32 x 512 tokens); perplexity, divergence (KL, nats a token) and
agreement are on the running Python's documentation of its topics. *Output* is the mean over layers of
tr(Δ M Δᵀ) / tr(W M Wᵀ), the share of a layer's output that is changed, with the moments M of its inputs over the
calibration text; *Fisher* the same with each row of Δ and W weighted by its Fisher information instead of M; *block*
what is changed of what a block adds to the hidden states, given what entered it in the uncompressed model. Bytes are
those held for the weights that the recipe takes. Seconds are for compressing alone, calibration being kept.

Claims are judged by the divergence. Where one fails, the reason is one that rows of this benchmark show: each ablation
named beside it diverges less; otherwise it says that it is not known.
"""
EXCHANGED = """\
This model was trained on Python's documentation: here methods looked at that, and figures are on the project's text.
"""
QUANTISED = """\
This model's weights come from a file of 4 bits (at most 16 values in each group of 32): what keeps 4 bits or more has
an easier task than with weights that never were rounded, and a method whose levels happen to be the file's loses
nothing. Compare its rows at 4 bits and more with those of a model that never was quantised.
"""


def name_of(entry: Entry) -> str:
    """How an entry is called: its keys and everything that the table sets."""
    return " + ".join(" ".join([key, *(f"{name}={value}" for name, value in sets.items())]) for key, sets in entry)


def recipes() -> dict[str, Recipe]:
    """All that is measured by name, ablations of claims too."""
    found = {name_of(entry): Recipe.of([wb.method(key, **sets) for key, sets in entry]) for entry in ENTRIES}
    for claim in claims(CLAIMS).values():
        found |= {claim.row(name): ablation.recipe for name, ablation in claim.ablations.items()}
    return found


class Bench:
    """A model, its calibration, and what it makes of the held-out text."""

    def __init__(self, name: str, session: wb.Session, ids: Tensor) -> None:
        """ids: the held-out text [t, n]."""
        self.name = name
        self.model: PreTrainedModel = session.model
        self.tokenizer = session.tokenizer
        self.study: WeightStudy = session.calibrate()
        self.ids = ids.to(device_of(self.model))
        self.device = str(self.ids.device)
        self._full = [self._logits(self.model, ids).half() for ids in self.ids]  # [n - 1, v]

    def row(self, name: str, recipe: Recipe) -> Row:
        """One measurement; see NOTES for what its figures mean."""
        about = {"case": self.name, "recipe": name, "budget": OWN, "device": self.device}
        methods = weight_methods(recipe.methods)
        try:
            for _ in (
                self.study.inputs(hessians=True) if any(m.needs_inputs or m.needs_hessian for m in methods) else ()
            ):
                break  # gathered before the clock starts
            began = time.perf_counter()
            twin = compressed(self.model, methods, study=self._study)
            seconds = time.perf_counter() - began
            linears = {name: linear for m in methods for name, linear in m.survey(self.model).linears.items()}
            full = sum(2 * linear.weight.numel() for linear in linears.values())
            figures = {"held": held(linears, self.model, twin), "full": full, "seconds": round(seconds, 1)}
            return {**about, **figures, **self.text(twin), **self.errors(methods, linears, twin)}
        except (BudgetTooSmall, NotApplicable) as problem:
            return {**about, "gap": str(problem)}
        except Exception as problem:  # noqa: BLE001  one method's defect must not take the others with it
            return {**about, "error": f"{type(problem).__name__}: {problem}"}

    def _study(self, model: PreTrainedModel, number: int) -> WeightStudy:
        """Calibration before the method of that number: of the plain model once for all entries."""
        return WeightStudy(model, self.tokenizer, self.study.calibration) if number else self.study

    def plain(self) -> Row:
        """The uncompressed model's own row."""
        about = {"case": self.name, "recipe": "full", "budget": OWN, "device": self.device}
        return {**about, **self.text(self.model)}

    def text(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexity on the held-out text, and how far the next tokens' chances are from the full model's."""
        nll = kl = same = 0.0
        for ids, full in zip(self.ids, self._full, strict=True):
            logits, want = self._logits(model, ids), full.float()
            nll += float(cross_entropy(logits, ids[1:], reduction="sum"))
            kl += float(kl_div(log_softmax(logits, -1), log_softmax(want, -1), reduction="sum", log_target=True))
            same += float((logits.argmax(-1) == want.argmax(-1)).sum())
        count = self.ids.shape[0] * (self.ids.shape[1] - 1)
        return {"ppl": math.exp(nll / count), "kl": kl / count, "top1": same / count}

    def errors(
        self, methods: Sequence[WeightMethod], linears: Mapping[str, nn.Linear], twin: PreTrainedModel
    ) -> dict[str, float]:
        """The errors of layers and blocks, those of them that can be told."""
        if any(method.stage == "transform" or method.key in TURNED for method in methods):
            return {}
        # Of a model that lost blocks, the others have other names.
        found = (
            {"block": self._blocks(twin)} if decoder_layers(twin).keys() == decoder_layers(self.model).keys() else {}
        )
        if any(method.recast(self.model) for method in methods):  # scales are folded: layers stand for other numbers
            return found
        new = dict(twin.named_modules())
        if any(not same_shape(new.get(name), linear.weight) for name, linear in linears.items()):
            return found
        outputs, fisher = [], []
        gradients = self.study.gradients() if any("svd" in method.key for method in methods) else {}
        for _, inputs in self.study.inputs(hessians=True):
            for name in (name for name in linears if name in inputs):
                weight = linears[name].weight.detach().float()
                made = new[name]
                change = made.dequantised() - weight if isinstance(made, CompactLinear) else torch.zeros_like(weight)
                outputs.append(share(inputs[name].output_error, change, weight))
                if name in gradients:
                    fisher.append(share(partial(_fisher_error, gradients[name].rows[:, None]), change, weight))
        means = {"output": outputs, "fisher": fisher}  # nothing was gathered of what stands outside the blocks
        return found | {name: mean(values) for name, values in means.items() if values}

    def _blocks(self, twin: PreTrainedModel) -> float:
        ids = self.ids[:2]
        with exclusive(self.model):
            runner, own, found = BlockRunner(self.model, ids), decoder_layers(twin), []
            for name, _ in runner:
                changed = added = 0.0
                for entered, left in runner.run(name):
                    changed += float((runner.forward(name, entered, own[name]) - left).square().sum())
                    added += float((left - entered).square().sum())
                found.append(changed / added)
        return mean(found)

    def _logits(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        with exclusive(model), torch.no_grad():
            logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return logits


def same_shape(made: Any, weight: Tensor) -> bool:
    """Whether what stands for a layer still maps the same inputs to the same outputs."""
    return made is not None and (getattr(made, "out_features", 0), getattr(made, "in_features", 0)) == weight.shape


def share(measure: Callable[[Tensor], Tensor], change: Tensor, weight: Tensor) -> float:
    return float(measure(change).sum() / measure(weight).sum().clamp_min(1e-30))


def _fisher_error(rows: Tensor, part: Tensor) -> Tensor:
    return rows * part.square()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def held(linears: Mapping[str, nn.Linear], model: PreTrainedModel, twin: PreTrainedModel) -> int:
    """Live bytes of what stands in the twin for these weights of the model; whole weights at two bytes a number, for
    which they count in the uncompressed model too, whatever precision the benchmark computes in.
    """
    theirs = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    tensors = [*twin.parameters(), *twin.buffers()]
    whole = {id(module.weight) for module in twin.modules() if type(module) is nn.Linear}
    whole |= {id(linear.weight) for linear in linears.values()}
    present = {id(tensor) for tensor in tensors}
    left = [linear.weight for linear in linears.values() if id(linear.weight) in present]
    new = [tensor for tensor in tensors if id(tensor) not in theirs]
    numbers = sum(tensor.numel() for tensor in (*left, *(tensor for tensor in new if id(tensor) in whole)))
    return 2 * numbers + tensor_bytes(tensor for tensor in new if id(tensor) not in whole)


def measure(options: argparse.Namespace) -> None:
    """Measure what is missing, one entry after another, until all are there or the time is up."""
    ends = time.time() + (options.limit_s or math.inf)
    options.parts.mkdir(parents=True, exist_ok=True)
    before = environment() | {"command": " ".join(["python -m benchmarks.weight_quality", *sys.argv[1:]])}
    before |= {"held_out": f"{options.texts} x {options.tokens} tokens"}
    (options.parts / "environment.json").write_text(json.dumps(before))
    done = settled(read_parts(options.parts)) if options.resume else set()
    part = Part(options.parts)
    for model in options.models:
        todo = {name: recipe for name, recipe in wanted(options.methods).items() if (model, name, OWN) not in done}
        full = (model, "full", OWN) not in done
        if not todo and not full:
            continue
        session = wb.Session(model, device=options.device, dtype="float32")
        session.calibrate(PYTHON if model in TAUGHT else SHIPPED)
        text = Calibration(SHIPPED if model in TAUGHT else PYTHON, options.texts, options.tokens)
        bench = Bench(model, session, text.ids(session.model, session.tokenizer))
        if full:
            part.add(bench.plain())
        for number, (name, recipe) in enumerate(todo.items()):
            if time.time() > ends:
                print(f"{model}: {len(todo) - number} entries left when the time was up", file=sys.stderr)
                return
            row = bench.row(name, recipe)
            part.add(row)
            print(json.dumps(row), file=sys.stderr)


def wanted(names: Sequence[str]) -> dict[str, Recipe]:
    """The entries that these methods have part in, or of these names, or all."""
    known = recipes()
    keys = {name: {method.key for method in recipe.methods} for name, recipe in known.items()}
    unknown = [name for name in names if name not in known and not any(name in own for own in keys.values())]
    if unknown:
        raise SystemExit(f"no entry {', '.join(unknown)}: there are {', '.join(known)}")
    return {name: recipe for name, recipe in known.items() if not names or {name, *keys[name]} & set(names)}


def judged(claim: Claim, rows: Mapping[str, Row]) -> list[str]:
    """What was tested of a claim, the figures, the verdict, and the reason where it fails."""
    row = rows.get(claim.judged, {})
    own, gap = row.get("kl"), row.get("gap", "")
    if claim.elsewhere or (claim.near is None and not claim.against):
        return ["", "" if own is None else f"{own:.4g}", "not judged", claim.elsewhere]
    limit = claim.near if claim.near is not None else rows.get(claim.against, {}).get("kl")
    tested = f"{claim.judged} ≤ {claim.against or f'{claim.near:g}'}"
    if own is None or limit is None:
        return [tested, gap, "not possible" if gap else "not measured", ""]
    figures = f"{own:.4g}" if claim.near is not None else f"{own:.4g} and {limit:.4g}"
    if own <= limit:
        return [tested, figures, "holds", ""]
    tried = {name: rows[claim.row(name)]["kl"] for name in claim.ablations if "kl" in rows.get(claim.row(name), {})}
    told = {name: f"{value:.4g}" for name, value in tried.items()}
    return [tested, figures, "does not hold", claim.reason(told, {name for name in tried if tried[name] < own})]


def report(rows: Sequence[Row], notes: Mapping[str, Claim] | None = None) -> str:
    """The page: for each model its claims, a table, and what could not be measured. notes: unless given, CLAIMS."""
    notes = claims(CLAIMS) if notes is None else notes
    lines = ["# Weights: what each method costs at which size", "", NOTES]
    for model in dict.fromkeys(row["case"] for row in rows):
        own = {row["recipe"]: row for row in rows if row["case"] == model}
        lines += [f"## {model}", "", *([QUANTISED] if model == wb.models.catalogue()[0].name else [])]
        lines += [EXCHANGED] if model in TAUGHT else []
        head = ["method", "the paper claims", "here it is", "tested here", "measured", "verdict", "why"]
        lines += [markdown([head, *([*_claimed(key), *judged(claim, own)] for key, claim in notes.items())]), ""]
        head = [
            "recipe",
            "bytes",
            "bits",
            "perplexity",
            "divergence",
            "same top",
            "output",
            "Fisher",
            "block",
            "seconds",
        ]
        names = ["full", *map(name_of, ENTRIES)]
        measured = [own[name] for name in names if "ppl" in own.get(name, {})]
        lines += [markdown([head, *map(_cells, measured)]), ""]
        lines += [f"- {name}: {row.get('gap') or row['error']}" for name, row in own.items() if "ppl" not in row]
        lines += [""] if any("ppl" not in row for row in own.values()) else []
    return "\n".join(lines)


def _claimed(key: str) -> list[str]:
    """The method of a claim, what its paper claims, and how true the entry is to that."""
    cls = find(key.split(maxsplit=1)[0])
    return [f"{cls.title} (`{key}`)", cls.claim, str(cls.fidelity or "")]


def _cells(row: Row) -> list[str]:
    share = f"{row['held'] / row['full']:.1%}" if "held" in row else ""
    bits = f"{16 * row['held'] / row['full']:.2f}" if "held" in row else ""
    text = [f"{row['ppl']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"]
    errors = [f"{row[name]:.5f}" if name in row else "" for name in ("output", "fisher", "block")]
    return [row["recipe"], share, bits, *text, *errors, f"{row['seconds']:.0f}" if "seconds" in row else ""]


def tabulate(parts: Path) -> None:
    """Make the results of the rows in `parts`, or again of those in the results themselves where there are none."""
    rows = read_parts(parts) if parts.is_dir() else []
    if rows:
        before = json.loads((parts / "environment.json").read_text())
        lines = ",\n".join(json.dumps({k: _short(v) for k, v in row.items()}) for row in sorted(rows, key=identity))
        JSON.write_text(json.dumps({"environment": before}, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    if not JSON.exists():
        raise SystemExit(f"nothing has been measured: no rows in {parts}, and no {JSON}")
    saved = json.loads(JSON.read_text())
    text = report(saved["rows"]) + f"\n{where(saved['environment'])}\n"
    JSON.with_suffix(".md").write_text(text)
    print(text)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help='methods ("gptq") or entries ("gptq bits=4"); all')
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "workbench-tiny"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=8, help="stretches of held-out text")
    parser.add_argument("--tokens", type=int, default=256, help="length of each")
    parser.add_argument("--limit-s", type=float, help="seconds after which no other entry is begun")
    parser.add_argument("--parts", type=Path, default=Path("build/weight_quality"), help="where rows are saved")
    parser.add_argument("--resume", action="store_true", help="leave out what is in the parts already")
    parser.add_argument("--table", action="store_true", help="only make results/weight_quality.* of the parts")
    options = parser.parse_args()
    if options.table:
        tabulate(options.parts)
        return
    if not options.resume and options.parts.is_dir() and any(options.parts.glob("*.jsonl")):
        parser.error(f"{options.parts} has rows already: --resume, or give other --parts")
    measure(options)


if __name__ == "__main__":
    main()
