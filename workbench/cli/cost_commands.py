"""The command that estimates what running a model would cost."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from workbench.cli import inputs, terminal
from workbench.cli.options import DEFAULT_MODEL, AsJson, Budget, KVDtype, Methods, Settings


def estimate(
    methods: Methods = ["full"],  # noqa: B006  Typer takes the default from here and copies it
    model: Annotated[
        str, typer.Option("--model", help="packaged name, folder, .gguf, config.json, cached hub id, or model type")
    ] = DEFAULT_MODEL,
    hardware: Annotated[
        str, typer.Option("--hardware", help="a device's name, or a TOML file of yours (mine.toml, mine.toml:name)")
    ] = "H200",
    context: Annotated[int, typer.Option("--context", min=1, help="tokens of each sequence in the cache")] = 32768,
    batch: Annotated[int, typer.Option("--batch", min=1, help="sequences at a time")] = 1,
    budget: Budget = None,
    settings: Settings = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="what it computes in (default: as its config says, else bfloat16)"),
    ] = None,
    kv_dtype: KVDtype = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="that share the model's matrices and heads")] = 1,
    chunk: Annotated[int | None, typer.Option("--chunk", min=1, help="tokens read at once (default: all)")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="every figure with its formula")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate bytes, times and how many sequences fit, from a model's config alone; no weight is loaded."""
    (recipe,) = inputs.recipes(["+".join(methods)], settings or [])
    from workbench.cost import cost

    found = cost(
        model,
        recipe,
        hardware,
        context,
        batch,
        budget=budget,
        dtype=dtype,
        kv_dtype=kv_dtype,
        devices=devices,
        chunk=chunk,
    )
    if as_json:
        terminal.document(found.numbers())
        return
    print(found.explain() if explain else found.summary())


def run_system(
    key: Annotated[str | None, typer.Argument(help="a system's key; without one all are listed")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Run a serving system from the literature as a model, beside its paper's claim, or list those there are."""
    from workbench.cost import system, systems

    if key is None:
        rows = cast("list[dict[str, Any]]", systems().to_dict("records"))
        if as_json:
            terminal.document(rows)
        else:
            terminal.table(rows, {"key": "key", "model": "what is modelled", "claim": "the paper claims"})
        return
    found = system(key, **inputs.values(settings or []))
    if as_json:
        terminal.document(found.numbers())
    else:
        print(found.summary())


def list_hardware(as_json: AsJson = False) -> None:
    """List the devices that estimates know, with their peaks; with --json every figure and its source."""
    from workbench.cost import catalogue
    from workbench.cost.hardware import profiles

    if as_json:
        terminal.document([each.model_dump(mode="json") for each in profiles()])
        return
    columns = {
        "name": "name",
        "kind": "kind",
        "memory_gb": "memory GB",
        "bandwidth_gb_s": "GB/s",
        "tflops_16bit": "16-bit TFLOP/s",
        "tops_int8": "8-bit TOP/s",
    }
    terminal.table(cast("list[dict[str, Any]]", catalogue().to_dict("records")), columns)
