"""What every method keeps, holds, says and costs on workbench-tiny: recorded before a change, compared after it.

`python -m benchmarks.same_figures record FILE` takes some minutes, and `... compare A B` lists what differs. ZipLM goes
by times that it measures, and may differ from run to run.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.registry import Method, registered

TEXT = (
    "Ada keeps a red kite in the attic. Ben keeps a blue drum in the shed. Cora hid the green key under the mat. " * 4
)
QUESTION = "Where is the kite?"
BUDGETS = (None, 0.5, 0.3, 1.0)
# Parameters that suit a prompt of some hundred tokens, or make a slow method quick.
SHORT: dict[str, dict[str, Any]] = {
    "epicache": {"segment": 8},
    "evopress-kv": {"window": 8, "generations": 1, "offspring": 2},
    "hack": {"probes": 16},
    "headkv": {"tasks": 2, "task_tokens": 64},
    "headkv-r2": {"tasks": 2, "task_tokens": 64},
    "ilre": {"query": 8, "window": 16, "chunk": 8},
    "infllm": {"sinks": 2, "block": 4},
    "livevlm": {"sinks": 2, "window": 4, "recent": 8, "page": 4},
    "sentencekv": {"fetch": 8, "longest": 8, "window": 8},
    "streammem": {"frame": 8},
    "tailorkv": {"budget": 0.5, "threshold": 0.35, "group": 8, "residual": 16, "fetch": 16},
    "video-xl-2": {"marks": 1, "chunk": 8},
    "xl3m": {"segment": 8, "query": 8},
}


def digest(tensor: Tensor) -> str:
    """A tensor's bytes in 16 hexadecimal digits."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def rounded(value: Any) -> Any:
    """Floats to five digits, in lists and dicts too."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def of_run(session: wb.Session, method: Method) -> dict[str, Any]:
    """The plan as a digest, bytes as planned and alive, tokens, notes and quality of a short run."""
    run = session.run([method], question=QUESTION, max_new_tokens=6)
    run.measure()
    record = run.numbers()
    names = ("tokens", "kv_nbytes", "kv_host_nbytes", "score_share", "decode_score_share", "notes", "quality")
    return {"kept": digest(run.plan.tiers), "live": run.kv_nbytes, **rounded({name: record[name] for name in names})}


def recorded() -> dict[str, Any]:
    """Every method at every budget, every operator, and the tables beside them."""
    torch.set_num_threads(1)
    session = wb.Session("workbench-tiny")
    session.calibrate("workbench", samples=4, tokens=128)
    trace = session.read(TEXT)
    record: dict[str, Any] = {}
    for cls in (cls for cls in registered() if cls.family != "operator"):
        for budget in BUDGETS if cls.takes_budget() else (None,):
            options = SHORT.get(cls.key, {}) | ({} if budget is None else {"budget": budget})
            name = f"{cls.family}/{cls.key}@{budget}"
            print(name, flush=True)
            try:
                record[name] = of_run(session, cls(**options))
            except WorkbenchError as refusal:
                record[name] = {"error": f"{type(refusal).__name__}: {refusal}"}
    layer = trace.layers[1]
    for cls in registered("operator"):
        operator: Any = cls()
        out = operator.apply(layer.queries, layer.keys, layer.values, layer.scale)
        record[f"operator/{cls.key}"] = digest(out.float())
    frames = {"heads": session.heads(), "census": session.census("gptq")}
    frames |= {kind: session.outliers(kind) for kind in ("keys", "values", "activations", "weights")}
    for name, frame in frames.items():
        numbers = frame.select_dtypes("number").fillna(-1).to_numpy(dtype=float)
        record[f"table/{name}"] = digest(torch.tensor(numbers).float())
    return record


def main() -> None:
    """Record into a file, or compare two."""
    what, *files = sys.argv[1:]
    if what == "record":
        Path(files[0]).write_text(json.dumps(recorded(), indent=1) + "\n", encoding="utf-8")
        return
    one, other = (json.loads(Path(file).read_text(encoding="utf-8")) for file in files)
    different = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    for name in different:
        print(name, one.get(name), other.get(name), sep="\n    ")
    print(f"{len({*one, *other})} recorded, {len(different)} differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
