"""What looking at attention costs at length: pooled maps, column sums and head statistics of one layer of the default
model's shape, with random queries and keys, without the matrix ever existing.

    python -m benchmarks.attention_long [--tokens N ...] [--device cuda] [--threads N] [--block-mib N]

Each length runs in a process of its own, so that its peak memory is its own. Results of CPU and CUDA are kept apart:
attention_long and attention_long_cuda.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import psutil
import torch

from benchmarks.record import environment, write
from workbench.core.attention_rows import BLOCK_BYTES
from workbench.measure import column_sums, head_stats, pooled_map, pooled_maps
from workbench_kernels import Scoring

HEADS, KV_HEADS, WIDTH = 9, 3, 64  # one layer of smollm2-135m
VOCABULARY = 49152
MIB = 2**20
LIMIT = 1024  # MiB of resident memory for CPU work
LENGTHS = {"cpu": (4096, 32_768), "cuda": (4096, 32_768, 131_072)}


def works(tokens: int, device: torch.device, block_bytes: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name, on fresh queries and keys."""
    draw = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    queries, keys = (
        (2 * torch.randn(heads, tokens, WIDTH, generator=draw)).to(device, dtype) for heads in (HEADS, KV_HEADS)
    )
    ids = torch.randint(VOCABULARY, (tokens,), generator=draw)
    options: dict[str, Any] = {"scoring": Scoring(WIDTH**-0.5), "block_bytes": block_bytes}
    return {
        "one head's map, 512 pixels": lambda: pooled_map(queries[0], keys[0], **options, pixels=512),
        "one head's map, zoomed to 512 tokens": lambda: pooled_map(
            queries[0], keys[0], **options, rows=(tokens - 512, tokens), cols=(tokens - 512, tokens)
        ),
        "all heads' maps, 32 pixels": lambda: pooled_maps(queries, keys, **options, pixels=32),
        "column sums": lambda: column_sums(queries, keys, **options),
        "head statistics": lambda: head_stats(queries, keys, ids, **options),
    }


def measure(tokens: int, device: torch.device, block_bytes: int) -> dict[str, Any]:
    """Seconds and peak bytes of each piece of work at one length."""
    cuda = device.type == "cuda"
    for work in works(1024, device, block_bytes).values():  # what is loaded and compiled at the first call
        work()
    found: dict[str, Any] = {}
    made = works(tokens, device, block_bytes)
    for name, work in made.items():
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began, busy = perf_counter(), process_time()
        work()
        if cuda:
            torch.cuda.synchronize()
        found[name] = {"seconds": perf_counter() - began, "cpu_seconds": process_time() - busy}
        if cuda:
            found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {"work": found, "resident_peak": _resident_peak()}


def _resident_peak() -> int:
    """The most that this process ever held in memory, of which the libraries are some 300 MB."""
    memory = psutil.Process().memory_info()
    peak: int | None = getattr(memory, "peak_wset", None)  # Windows
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def apart(tokens: int, asked: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.attention_long", "--one", str(tokens)]
    command += ["--device", asked.device, "--threads", str(asked.threads), "--block-mib", str(asked.block_mib)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths (default: 4,096 and 32,768; CUDA also 131,072)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--block-mib", type=int, default=BLOCK_BYTES // MIB, help="most that a block of rows may take")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.one:
        print(json.dumps(measure(asked.one, torch.device(asked.device), asked.block_mib * MIB)))
        return
    before = {**environment(), "threads": asked.threads, "block_mib": asked.block_mib}
    if asked.device == "cpu":
        before["device"] = before["device"] if "CPU" in before["device"] else "CPU"
    else:
        before["command"] += " --device cuda"
    lengths = asked.tokens or LENGTHS[asked.device]
    found = {tokens: apart(tokens, asked) for tokens in lengths}
    table = [[f"one layer: {HEADS} heads on {KV_HEADS} KV heads of {WIDTH}", *[f"{n:,} tokens" for n in lengths], ""]]
    for name in found[lengths[0]]["work"]:
        cells = [found[tokens]["work"][name] for tokens in lengths]
        if asked.device == "cpu":
            table.append(
                [name, *[f"{at['seconds']:.2f} s ({at['cpu_seconds']:.2f})" for at in cells], "wall (CPU time)"]
            )
        else:
            table.append(
                [name, *[f"{at['seconds']:.2f} s, {at['peak_bytes'] / MIB:,.0f} MiB" for at in cells], "on the GPU"]
            )
    if asked.device == "cpu":
        peaks = [found[tokens]["resident_peak"] / MIB for tokens in lengths]
        table.append(["most memory of the whole process", *[f"{peak:,.0f} MiB" for peak in peaks], f"limit {LIMIT:,}"])
    write("attention_long" if asked.device == "cpu" else "attention_long_cuda", {"lengths": found}, table, before)


if __name__ == "__main__":
    main()
