"""The kernel tables that estimates of cost go by, fitted to what kernels/bench measured.

`python -m benchmarks.cost_kernels` writes workbench/cost/data/kernels.toml from kernels/bench/results: a line for each
kernel through its measurements at batch one, without the launch that a CUDA graph saves, and every whole decode step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.cost.hardware import hardware
from workbench.cost.kernels import fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "kernels" / "bench" / "results"
DATA = ROOT / "workbench" / "cost" / "data" / "kernels.toml"
_LINEAR = {  # names in the tables, and ours
    "nn.Linear": "linear",
    **{f"packed {bits} bit, group 64": f"linear packed {bits} bit" for bits in (8, 4, 2)},
    "sparse, half, uneven rows": "linear sparse",
    "low rank, half": "linear low rank",
    "codebook, an eighth": "linear codebook",
    "integers, W8A8": "linear integers",
}
_ATTENTION = {
    "dense": "attention",
    "ragged": "attention ragged",
    **{f"{bits} bit, group 64": f"attention packed {bits} bit" for bits in (8, 4, 2)},
}
_HEADS = [32, 8, 128]
_LEAST = 32768  # tokens in a cache, from which on attention is fitted
_SHAPE = {  # of the model in kernels/bench/end_to_end.py, under config.json's names
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
_KIVI = {"group": 64, "residual": 128}


def table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _device(found: dict[str, Any]) -> str:
    return hardware(found["environment"]["device"]).name


def kernels() -> Iterator[dict[str, Any]]:
    found = table("weights")
    peak = found["ceilings"]["matmul"]
    for what, name in _LINEAR.items():
        ours = [row for row in found["rows"] if row["what"] == what and row["way"] in ("torch", "ours") and "us" in row]
        one, many = ([row for row in ours if row["n"] == count] for count in (1, 512))
        largest = max(row["flops"] for row in many if "flops" in row)
        rates = [row["flops"] / row["us"] * 1e6 for row in many if row["flops"] == largest]
        # Large products of plain matrices reach what the device was seen to reach; 512 rows are too few for them.
        rate = peak if name == "linear" else min(sum(rates) / len(rates), peak)
        yield _kernel(name, found, "weights", one, rate)
    found = table("decode")
    reading = next(
        row for row in table("reading")["rows"] if row["what"] == "attention itself, flash" and row["n"] == 131072
    )
    for what, name in _ATTENTION.items():
        rows = [
            row
            for row in found["rows"]
            if row["what"] == what and "us" in row and row["heads"] == _HEADS and row["n"] >= _LEAST
        ]
        yield _kernel(name, found, "decode", rows, reading["TFLOP/s"] * 1e12)


def _kernel(name: str, found: dict[str, Any], file: str, rows: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    device, launch = hardware(_device(found)), found["ceilings"]["launch_us"]
    line = fit([row["bytes"] for row in rows], [row["us"] - launch for row in rows])
    return {
        "name": name,
        "on": device.name,
        "latency_us": round(line.latency, 2),
        "bandwidth": round(line.rate * 1e6 / device.bandwidth.plain, 3),
        "compute": round(rate / device.peak("bfloat16").plain, 3),
        "rows": len(rows),
        "worst": round(line.worst, 3),
        "source": f"kernels/bench/results/{file}.json, {found['environment']['date']}",
    }


def steps() -> Iterator[dict[str, Any]]:
    for path in sorted(RESULTS.glob("end_to_end*.json")):
        found = table(path.stem)
        for row in found["rows"]:
            if "us" in row:
                yield {
                    "on": _device(found),
                    "what": row["what"],
                    "tokens": row["n"],
                    "us": round(row["us"], 1),
                    "model": _SHAPE,
                    "recipe": _recipe(row["what"]),
                    "source": f"kernels/bench/results/{path.name}, {found['environment']['date']}",
                }


def _recipe(what: str) -> list[dict[str, Any]]:
    methods: list[dict[str, Any]] = []
    for part in what.split(" + "):
        name, _, rest = part.partition(" ")
        if name == "SnapKV":
            methods.append({"method": "snapkv", "budget": float(rest.removesuffix(" %")) / 100})
        elif name == "KIVI":
            methods.append({"method": "kivi", "bits": int(rest.removesuffix(" bit")), **_KIVI})
    return methods or [{"method": "full"}]


def written() -> str:
    """The file's text."""
    lines = [
        "# Written by `python -m benchmarks.cost_kernels` from kernels/bench/results; edit those, or give your own.",
        "# A kernel's time: latency_us + bytes / (bandwidth x peak), or operations / (compute x peak) if longer.",
    ]
    for kind, rows in (("kernel", kernels()), ("step", steps())):
        for row in rows:
            lines += ["", f"[[{kind}]]", *(f"{key} = {_toml(value)}" for key, value in row.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    DATA.write_text(written(), encoding="utf-8")
    print(f"{DATA.relative_to(ROOT)} is written")
