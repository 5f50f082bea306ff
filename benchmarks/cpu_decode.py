"""How fast tokens are decoded on a CPU, beside plain transformers: the packaged models after 512 tokens, in turns."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any

import torch
from transformers import DynamicCache

import workbench as wb
from benchmarks.record import environment, write
from workbench.runtime.decode import Decoder
from workbench.runtime.fused_token import FusedToken

TOKENS, STEPS, TURNS = 512, 8, 6
MODELS = ("smollm2-135m", "workbench-tiny")
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "SnapKV 25 %": ("snapkv", {"budget": 0.25}),
    "KIVI 4 bit": ("kivi", {"bits": 4}),
    "KIVI 2 bit": ("kivi", {"bits": 2}),
}

Step = Callable[[], None]
Clock = Callable[[], float]


def plain(session: wb.Session, ids: torch.Tensor) -> Step:
    """A step of transformers: the model with its own cache and attention."""
    model: Any = session.model
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    token = first.argmax()[None]

    def step() -> None:
        with torch.inference_mode():
            token.copy_(model(token[None], past_key_values=cache, use_cache=True).logits[0, -1].argmax())

    return step


def ours(session: wb.Session, method: str, parameters: dict[str, Any], *, fused: bool) -> Step:
    """A step under a recipe; without `fused` by the model's modules, as any model is decoded."""
    plan = session.plan(method, **parameters)
    decoder = Decoder(session.model, plan.stores(), plan.position, fusing=session.readings.fusing)
    decoder.reserve(STEPS * (TURNS + 1))
    if fused:
        decoder.fuse()
    token = torch.tensor([int(plan.logits.argmax())])

    def step() -> None:
        token.copy_(decoder.feed(token)[-1].argmax())

    return step


def in_turns(steps: dict[str, Step], clock: Clock) -> dict[str, float]:
    """Median seconds of each step, a few of each in turns so that a busy moment meets all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS + 1):
        for name, step in steps.items():
            for _ in range(STEPS):
                began = clock()
                step()
                if turn:  # the first warms up
                    times[name].append(clock() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def measured(name: str, clock: Clock) -> dict[str, Any]:
    session = wb.Session(name)
    ids = torch.randint(100, 1000, (TOKENS,), generator=torch.Generator().manual_seed(0))
    session.read(ids)
    began = perf_counter()
    fused = session.readings.fusing.of(session.model)
    prepared_s = perf_counter() - began
    if not isinstance(fused, FusedToken):
        raise SystemExit(f"{name} is not decoded by fused steps here")
    steps = {"plain transformers": plain(session, ids)}
    for label, (method, parameters) in RECIPES.items():
        steps[label] = ours(session, method, parameters, fused=True)
        steps[f"{label}, by modules"] = ours(session, method, parameters, fused=False)
    seconds = in_turns(steps, clock)
    return {
        "weights_mb": session.facts.weight_bytes / 1e6,
        "copy_mb": fused.nbytes / 1e6,
        "compiled": fused.compiled,
        "prepared_s": prepared_s,
        "tokens_per_s": {label: 1 / each for label, each in seconds.items()},
    }


def main() -> None:
    before = environment()
    threads = torch.get_num_threads()
    busy = os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    if busy:  # others take the processor away: count the time that this thread had it
        torch.set_num_threads(threads := 1)
    clock = thread_time if busy else perf_counter
    figures = {name: measured(name, clock) for name in MODELS}
    table = [["model", "step", "tokens/s", "over plain transformers", "by the model's modules"]]
    for name, found in figures.items():
        speed = found["tokens_per_s"]
        base = speed["plain transformers"]
        table.append([name, "plain transformers", f"{base:.1f}", "1.00", ""])
        for label in RECIPES:
            modules = speed[f"{label}, by modules"]
            table.append([name, label, f"{speed[label]:.1f}", f"{speed[label] / base:.2f}", f"{modules:.1f}"])
    held = [["model", "weights", "the same in fewer bytes", "compiled", "made ready in"]]
    for name, found in figures.items():
        sizes = f"{found['weights_mb']:.0f} MB", f"{found['copy_mb']:.0f} MB"
        held.append([name, *sizes, "yes" if found["compiled"] else "no", f"{found['prepared_s']:.1f} s"])
    how = {"threads": threads, "clock": clock.__name__, "load_after": round(os.getloadavg()[0], 2)}
    write("cpu_decode", {**how, **figures}, table, {**before, **how}, held)


if __name__ == "__main__":
    main()
