"""The Cost page: what running a model would take on a device, each figure with its formula, and serving simulated."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.cost import Cost, catalogue, cost, targets
from workbench.cost.serving import Lengths, Modelled, Policy, Simulation, Workload, simulate
from workbench.errors import BadParameter, ModelNotOffered, WorkbenchError
from workbench.formatting import mib
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench_widgets import cost_figures
from workbench_widgets.app.elements.figures_row import figures_row, show
from workbench_widgets.app.elements.method_form import method_title
from workbench_widgets.app.elements.text_field import TextArea, TextField
from workbench_widgets.app.pages.shell import Shell, heading, paper
from workbench_widgets.app.state.recipe_slots import kv_methods, methods_for
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.plain_text import in_markup
from workbench_widgets.present import KeyFigure

_PRE = """
pre { margin: 0; padding: 10px 12px; overflow-x: auto;
  font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
"""
_LLAMA, _NAMED, _NUMBERS = _SOURCES = ("Llama 3.1 8B", "A model by name", "Numbers")
_SHAPE = MappingProxyType(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
)
_PROMISED = (0.02, 0.03, 0.05, 0.1, 0.2)  # seconds between tokens
_VIEWS = ("Memory", "Gantt", "Queue", "KV occupancy", "Cost against latency")


class CostPage:
    """An estimate from a config alone; nothing is loaded or downloaded."""

    def __init__(self, offered: OfferedModels) -> None:
        self._offered = offered
        self._told: Cost | None = None
        self._done: Simulation | None = None
        self.shell = Shell("cost", self._draw)
        options = {"sizing_mode": "stretch_width", "size": "small", "margin": (8, 0)}
        self.source = pmu.Select(label="Its shape is that of", options=list(_SOURCES), value=_LLAMA, **options)
        self.model = TextField(
            label="Name", value=offered.default, visible=False, **options,
            description="A packaged name, a folder or cached hub id with config.json, or a model type such as qwen3",
        )  # fmt: skip
        self.numbers = TextArea(
            label="As config.json names them",
            value=json.dumps(dict(_SHAPE), indent=1),
            rows=8,
            visible=False,
            **options,
        )
        self.source.param.watch(self._ask, "value")
        keep = {"Everything": "", **{method_title(cls): cls.key for cls in kv_methods("kv") if cls.key != "full"}}
        store = {"As it is": "", **{method_title(cls): cls.key for cls in kv_methods("store")}}
        weights = {"As they are": "", **{method_title(cls): cls.key for cls in methods_for("weights")}}
        self.keep = pmu.Select(label="Which tokens stay", options=keep, **options)
        self.store = pmu.Select(label="How the cache is stored", options=store, **options)
        self.weights = pmu.Select(label="Weights", options=weights, **options)
        self.budget = TextField(label="Budget of the cache", value="25%", **options)
        self.hardware = pmu.Select(label="Hardware", options=list(catalogue()["name"]), value="H100", **options)
        self.devices = pmu.IntInput(label="Devices", value=1, start=1, end=64, **options)
        self.context = pmu.IntInput(label="Context, tokens", value=8192, start=1, **options)
        self.batch = pmu.IntInput(label="Batch, sequences", value=1, start=1, **options)
        self.rate = pmu.FloatInput(label="Requests a second", value=2.0, start=0.001, step=0.5, **options)
        self.reply = pmu.IntInput(label="Reply, tokens", value=128, start=1, **options)
        self.start = pmu.Button(label="Estimate", icon="calculate", variant="contained", sizing_mode="stretch_width")
        self.start.on_click(lambda _: self.estimate())
        self.tiles = figures_row("No estimate yet.")
        self.beside = pn.pane.HTML("", sizing_mode="stretch_width", margin=(0, 10))
        self.formulas = pn.pane.HTML("", stylesheets=[_PRE], sizing_mode="stretch_width", margin=0)
        self.which = pmu.RadioButtonGroup(options=list(_VIEWS), value="Memory", size="small", margin=(6, 4))
        self.which.param.watch(lambda _: self._draw(), "value")
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=400, visible=False
        )
        self._against: Any = None
        side = [
            heading("Model"), self.source, self.model, self.numbers,
            heading("Recipe"), self.keep, self.store, self.budget, self.weights,
            heading("Serving"), self.hardware, self.devices, self.context, self.batch, self.rate, self.reply,
            self.start,
        ]  # fmt: skip
        self.view = self.shell.view(
            paper(heading("Estimate: a model, not a measurement"), self.tiles, self.beside),
            paper(heading("Where it goes"), self.which, self.figure),
            paper(heading("Every figure with its formula"), self.formulas),
            side=side,
        )
        self.shell.ready(self.estimate)

    def estimate(self) -> None:
        """Estimate what the form says."""
        try:
            model, recipe = self._model(), self._recipe()
        except WorkbenchError as error:
            self.shell.task.problem = str(error)
            return
        hardware, context, batch = str(self.hardware.value), int(self.context.value or 1), int(self.batch.value or 1)
        devices, rate, reply = int(self.devices.value or 1), float(self.rate.value or 1), int(self.reply.value or 1)

        def work(progress: Progress) -> tuple[Cost, Simulation | WorkbenchError, Any]:
            progress.update("estimating", 0, 3)
            told = cost(model, recipe, hardware, context, batch, devices=devices)
            progress.update("simulating a queue", 1, 3)
            done = _simulated(told, rate, reply)
            progress.update("comparing devices", 2, 3)
            names = list(dict.fromkeys([hardware, "H100", "H200", "A100-80", "L40S"]))
            return told, done, targets(model, names, _PROMISED, recipe, context)

        def finish(outcome: tuple[Cost, Simulation | WorkbenchError, Any]) -> None:
            self._told, done, self._against = outcome
            self._done = done if isinstance(done, Simulation) else None
            self.shell.note.say("" if isinstance(done, Simulation) else f"No queue: {done}")
            self._tell(self._told)
            self._draw()

        self.shell.task.do("Estimating", work, finish)

    def _model(self) -> Any:
        if self.source.value == _LLAMA:
            return dict(_SHAPE)
        if self.source.value == _NUMBERS:
            return _numbers((self.numbers.value or "").strip())
        name = (self.model.value or "").strip()
        try:
            self._offered.check(name)
        except ModelNotOffered:
            from transformers import CONFIG_MAPPING

            if name not in CONFIG_MAPPING:  # a model type looks at nothing of this machine
                raise
        return name

    def _ask(self, *events: Event) -> None:
        """Show the field that the source needs."""
        self.model.visible = self.source.value == _NAMED
        self.numbers.visible = self.source.value == _NUMBERS

    def _recipe(self) -> Recipe:
        keys = [str(field.value) for field in (self.keep, self.store) if field.value]
        methods = list(Recipe.of("+".join(keys) if keys else "full").methods)
        if self.weights.value:
            methods += Recipe.of(str(self.weights.value)).methods
        budgeted = keys and any(type(each).takes_budget() for each in methods if each.family == "kv")
        return Recipe.of(methods, budget=(self.budget.value or "").strip() or None) if budgeted else Recipe.of(methods)

    def _tell(self, told: Cost) -> None:
        memory = told.memory
        show(self.tiles, [
            KeyFigure("Weights", mib(memory.weights), f"of {mib(memory.full_weights)}"),
            KeyFigure("KV cache", mib(memory.kv), f"of {mib(memory.full_kv)}"),
            KeyFigure("Peak", mib(memory.peak), f"of {mib(told.capacity)}: {'fits' if told.fits else 'does not fit'}"),
            KeyFigure("Prefill", f"{told.prefill_s:,.3g} s", f"{told.batch} × {told.context:,} tokens"),
            KeyFigure("Decode step", f"{1e3 * told.decode_s:,.3g} ms", f"{told.tokens_per_s:,.4g} tokens/s"),
            KeyFigure("Concurrency", f"{told.concurrency:,}", "sequences that fit"),
            KeyFigure(
                "Context switch",
                "–" if told.switch_s is None else f"{1e3 * told.switch_s:,.3g} ms",
                "one cache out, one in",
            ),
        ])  # fmt: skip
        measured = told.measured
        beside = (
            "No step of just this model, recipe, device and length has been measured here."
            if measured is None
            else f"Measured {measured.us / 1e3:.3f} ms a step ({measured.source}): estimate {measured.error:+.1%} off"
        )
        self.beside.object = f"<div style='font-size: 13px; opacity: .8'>{in_markup(beside)}</div>"
        self.formulas.object = f"<pre tabindex=0>{in_markup(told.explain())}</pre>"

    def _draw(self) -> None:
        told, done, dark = self._told, self._done, self.shell.task.dark
        if told is None:
            return
        name = str(self.which.value)
        self.figure.visible = done is not None or name in ("Memory", "Cost against latency")
        if name == "Memory":
            self.figure.object = cost_figures.memory(told, dark=dark)
        elif name == "Cost against latency":
            self.figure.object = cost_figures.promises(self._against, dark=dark)
        elif done is not None:
            draw = {"Gantt": cost_figures.gantt, "Queue": cost_figures.queue, "KV occupancy": cost_figures.occupancy}
            self.figure.object = draw[name](done, dark=dark)


def _numbers(written: str) -> dict[str, Any]:
    try:
        numbers = json.loads(written)
    except ValueError as error:
        raise BadParameter(f"the numbers are no JSON: {error}") from None
    if not isinstance(numbers, dict):
        raise BadParameter('the numbers are no object, as {"hidden_size": 4096, …} is')
    return numbers


def _simulated(told: Cost, rate: float, reply: int) -> Simulation | WorkbenchError:
    """Forty requests at this rate; or why they cannot be served."""
    prompt = max(told.context // 2, 1)
    workload = Workload.poisson(rate, 40, Lengths(mean=prompt, spread=0.5), Lengths(mean=reply, spread=0.5), seed=0)
    try:
        return simulate(Modelled(told), workload, Policy())
    except WorkbenchError as error:
        return error
