"""What compressing a model's weights takes: seconds and memory, calibration included, with nothing kept from before.

Each method runs in a process of its own: load the model, read the calibration texts, compress. Memory is the most that
the process ever held, the model and Python themselves included; on a GPU the most that its allocator handed out.
`--model llama-3.1-8b` is that model's shape with random weights and random texts, made on the device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import workbench as wb
from benchmarks.record import environment, write
from benchmarks.weight_quality import name_of, one
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import Calibration
from workbench.weights.compress import compressed

METHODS = (("gptq", {"bits": 4}), ("awq", {"bits": 4}), ("hqq", {"bits": 4}), ("sparsegpt", {"budget": 0.5625}))
SHAPE = "llama-3.1-8b"


def shaped(device: str) -> PreTrainedModel:
    """The shapes of Llama 3.1 8B, random weights, bfloat16."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
            model.eval()
            return model
        finally:
            torch.set_default_dtype(default)


def measure(key: str, settings: dict[str, Any], name: str, device: str, calibration: Calibration) -> dict[str, Any]:
    """One row; in a process of its own."""
    method = wb.method(key, **settings)
    assert isinstance(method, WeightMethod)
    began = perf_counter()
    if name == SHAPE:
        model = shaped(device)
        study = WeightStudy(model, calibration=calibration)
        drawn = torch.Generator().manual_seed(0)
        study.ids = torch.randint(0, 128256, (calibration.samples, calibration.tokens), generator=drawn)
    else:
        session = wb.Session(name, device=device)
        model, study = session.model, WeightStudy(session.model, session.tokenizer, calibration)
    loaded = perf_counter()
    # The statistics of the large shape are not kept: there each layer is compressed as soon as it has been studied.
    first = name != SHAPE and (method.needs_inputs or method.needs_hessian)
    for _ in study.inputs(hessians=True) if first else ():
        pass
    calibrated = perf_counter()
    twin = compressed(model, [method], study=lambda *_: study)
    if device != "cpu":
        torch.cuda.synchronize()
    done = perf_counter()
    assert twin is not model
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device == "cpu"
        else torch.cuda.max_memory_allocated()
    )
    return {
        "method": name_of(one(key, **settings)),
        "load_s": round(loaded - began, 1),
        "calibrate_s": round(calibrated - loaded, 1),
        "compress_s": round(done - calibrated, 1),
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help='of those measured by default ("gptq"); all')
    parser.add_argument("--model", default="smollm2-135m", help=f"a model's name, or {SHAPE}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    before = environment()
    before["command"] += "".join(f" {method}" for method in options.methods)
    before["command"] += f" --model {options.model} --device {options.device}"
    wanted = [entry for entry in METHODS if not options.methods or entry[0] in options.methods]
    calibration = Calibration(samples=options.texts, tokens=options.tokens)
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for key, settings in wanted:
            row = pool.submit(measure, key, settings, options.model, options.device, calibration).result()
            print(row, flush=True)
            rows.append(row)
    head = ["method", "load s", "calibrate s", "compress s", "all but loading s", "most memory MiB"]
    table = [head]
    for row in rows:
        seconds = [row["load_s"], row["calibrate_s"], row["compress_s"], row["calibrate_s"] + row["compress_s"]]
        table.append([row["method"], *(f"{s:.0f}" for s in seconds), f"{row['peak_bytes'] / 2**20:,.0f}"])
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    calibrated = {"model": options.model, "texts": options.texts, "tokens": options.tokens}
    write(f"weight_cost{suffix}", {**calibrated, "rows": rows}, table, before | calibrated)


if __name__ == "__main__":
    main()
