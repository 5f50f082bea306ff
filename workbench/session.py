"""The session: one model, one prompt, and everything recorded about them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from workbench import arguments
from workbench.attention.base import AttentionMethod
from workbench.budget import Budget
from workbench.display import Shown, controls
from workbench.errors import (
    BadBudget,
    BadParameter,
    BadRecipe,
    Cancelled,
    ModelNotFound,
    NotApplicable,
    NotRead,
    WorkbenchError,
)
from workbench.formatting import mib, quoted
from workbench.inspection.captured import Captured, as_read, capture, changes_reading
from workbench.inspection.implied import Implied
from workbench.kv.base import KVMethod
from workbench.kv.methods.full import Full
from workbench.kv.plan import Plan, StreamedPlan, make_plan, uncompressed_nbytes
from workbench.measure.attention import PooledMap, Pooling, Span, check_pooling
from workbench.measure.grid import GridOfMaps
from workbench.measure.heads import HeadStats
from workbench.measure.memory import Timeline
from workbench.models import UNLIMITED, Facts, LoadedModel, facts, load
from workbench.progress import Progress
from workbench.prompt import Prompt, Text
from workbench.recipe import Recipe
from workbench.registry import Method, find
from workbench.runtime.conversation import Conversation, Question
from workbench.runtime.exactness import verify
from workbench.runtime.prefill import read, seen, take_in
from workbench.runtime.run import Run, Stream
from workbench.trace import Trace
from workbench.weights.base import WeightMethod
from workbench.weights.variants import Variants

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.attention.operators import Operator
    from workbench.attention.operators import Study as OperatorStudy
    from workbench.export.model import Exported
    from workbench.weights.calibration.study import WeightStudy
    from workbench.weights.calibration.texts import Calibration
    from workbench.weights.reports.spectra import Spectra

T = TypeVar("T")
Seen = Captured | Implied
Spec = Recipe | Method | str | Sequence[Method | str]
Outliers = Literal["keys", "values", "activations", "weights"]

_KV_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_TRACES = 4  # readings under other weights or attention that are remembered beside the plain one
_CACHES = 4  # runs whose caches stay, so that more can be asked of them


class Session(Shown):
    """A model, a prompt, and everything recorded about them: the one object a user needs.

    model: a catalogue name, hub id, folder, or a (model, tokenizer or None) pair. device, dtype: where and in what
    precision it computes (float32 on CPU, bfloat16 on CUDA). kv_dtype: the precision in which caches are stored and the
    uncompressed cache is counted: the checkpoint's own 16-bit type, else bfloat16; "float32" reproduces plain
    transformers exactly. seed: for methods that draw at random. keep_trace_on: where recordings rest, for instance
    "cpu" for a model on a GPU. graphs: on a GPU, decode by replaying a CUDA graph where method and model allow it.
    trust: do not compare reading and decoding with the model by itself before the first prompt (`exactness`).
    """

    def __init__(
        self,
        model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | LoadedModel = "smollm2-135m",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        kv_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        keep_trace_on: str | torch.device | None = None,
        graphs: bool = True,
        trust: bool = False,
        progress: Progress | None = None,
    ) -> None:
        loaded = _loaded(model, device, dtype, progress)
        self.model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase | None = loaded.tokenizer
        self.source = loaded.source
        self.facts: Facts = loaded.facts
        self.kv_dtype = _kv_dtype(kv_dtype, loaded.facts)
        self.seed = arguments.whole("seed", seed, 0, 2**63 - 1)
        self.graphs = graphs
        self.trace: Trace | None = None
        self.runs: list[Run] = []
        self._trusted = trust
        self._keep_on = None if keep_trace_on is None else torch.device(keep_trace_on)
        self._variants = Variants(self.model, self.tokenizer)
        self._traces: OrderedDict[Any, Trace] = OrderedDict()
        self._timelines: list[Timeline] = []

    def __repr__(self) -> str:
        read = "nothing read yet" if self.trace is None else f"{self.trace.tokens} tokens read"
        return f"<Session {self.source}: {read}, {len(self.runs)} runs>"

    def summary(self) -> str:
        """The model, the prompt and the runs so far in words."""
        found = self.facts
        lines = [
            f"Session with {self.source}",
            f"  model   {found.layers} layers, {found.heads} heads on {found.kv_heads} KV heads of size "
            f"{found.head_dim}"
            + ("" if found.max_positions == UNLIMITED else f", up to {found.max_positions:,} tokens"),
        ]
        if self.trace is None:
            return "\n".join([*lines, "  prompt  nothing read yet: session.read(text)"])
        full = uncompressed_nbytes(self.trace, self.kv_dtype)
        lines.append(f"  prompt  {self.trace.tokens:,} tokens, whose uncompressed cache takes {mib(full)}")
        for index, run in enumerate(self.runs, 1):
            quality = f"; {run.quality}" if run.measured else ""
            share = run.to_dict(quality=False)["kv_share"]
            lines.append(f"  run {index:<3} {run.recipe.label}: {share:.1%} of the cache{quality}")
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """The model, the prompt's length and each run's evidence, JSON-able."""
        return {
            "model": self.source,
            "tokens": 0 if self.trace is None else self.trace.tokens,
            "runs": [run.numbers() for run in self.runs],
        }

    def controls(self, **options: Any) -> Any:
        """A control panel for notebooks: method, parameters, live budget, runs. Raises MissingExtra without widgets."""
        return controls(self, **options)

    # -- reading and planning

    def read(
        self, text: Text, *, chat: bool | None = None, record: bool = True, progress: Progress | None = None
    ) -> Trace:
        """Read a prompt: text, chat messages, or token ids [n]; everything later is asked of it.

        chat: whether plain text is wrapped in the model's chat template (default: where it has one). Token ids are read
        as they are. record: False takes the prompt in without reading it as a whole, for texts too long for that; only
        methods that read in bounded memory can be used then, and quality is not measured. Raises BadPrompt,
        PromptTooLong; NotApplicable for a model that cannot be read exactly; Cancelled between layers, with the earlier
        prompt still in place.
        """
        if chat is not None:
            arguments.flag("chat", chat)
        arguments.flag("record", record)
        prompt = replace(Prompt.of(text, self.tokenizer, chat), tokenizer=self.tokenizer)
        if not self._trusted:
            verify(self.model, self.facts, progress)
            self._trusted = True
        reading = read if record else take_in
        trace = reading(
            self.model,
            self.facts,
            prompt,
            keep_on=self._keep_on,
            weight_nbytes=self.facts.weight_bytes,
            progress=progress,
        )
        self.trace, self.runs = trace, []
        self.facts = seen(self.facts, trace)
        self._traces.clear()
        self._timelines.append(trace.timeline)
        return trace

    def plan(self, recipe: Spec = "full", *, progress: Progress | None = None, **parameters: Any) -> Plan:
        """What the recipe's KV methods would keep of the prompt; no model call, and no change to anything.

        Parameters such as `budget=0.25` go to the method (or, with several, `budget` is for all together).
        Raises BudgetTooSmall, BadRecipe, BadParameter, UnknownMethod, NotRead.
        """
        spec = Recipe.of(recipe, **parameters)
        return self._plan(spec, self._trace(spec, progress), progress)

    def _plan(self, recipe: Recipe, trace: Trace, progress: Progress | None, question: Tensor | None = None) -> Plan:
        methods = _kv(recipe)
        _check_together(_attention(recipe), methods)
        model = self._variants.get(recipe.family("weights"))
        return make_plan(trace, methods, self.kv_dtype, recipe.budget, model, progress, question)

    def _trace(self, recipe: Recipe, progress: Progress | None = None) -> Trace:
        """The reading of the prompt under the recipe's weights and attention."""
        if self.trace is None:
            raise NotRead("no prompt has been read yet: call read(text) first")
        attention, weights = _attention(recipe), recipe.family("weights")
        if attention is None and not weights:
            return self.trace
        key = (tuple(weights), attention)
        if key not in self._traces:
            widths = [(layer.keys_held.shape[-1], layer.values_held.shape[-1]) for layer in self.trace.layers]
            reading = take_in
            if self.trace.recorded:
                reading = partial(read, method=attention, plain=self.model, plain_widths=widths)
            self._traces[key] = reading(
                self._variants.get(weights, progress),
                self.facts,
                self.trace.prompt,
                keep_on=self._keep_on,
                weight_nbytes=self._variants.nbytes(weights),
                progress=progress,
            )
            self._timelines.append(self._traces[key].timeline)
            while len(self._traces) > _TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(key)
        return self._traces[key]

    # -- weights

    def calibrate(
        self, source: str | Path | None = None, *, samples: int = 32, tokens: int = 512, seed: int = 0
    ) -> WeightStudy:
        """Choose the texts that weight methods look at; returns what they learn from them, measured when asked for.

        source: "workbench" (the project's own text, the default), "python" (the running Python's documentation of its
        topics), "sampled" (what the model itself says; always so without a tokenizer), or the path of a text file or a
        data set (.txt, .md, .jsonl, .parquet). samples: stretches of `tokens` tokens. Without a source nothing
        changes. Raises BadParameter, InputError.
        """
        from workbench.weights.calibration.texts import SHIPPED, Calibration

        chosen = Calibration(
            SHIPPED if source is None else str(arguments.path("source", source)), samples, tokens, seed
        )
        if source is not None:
            if chosen.source != "sampled" and self.tokenizer is not None:
                chosen.text()  # refused now, and not in the middle of a run
            self._variants.calibrate(chosen)
            for key in [key for key in self._traces if key[0]]:
                del self._traces[key]
        return self._variants.study()

    @property
    def calibration(self) -> Calibration | None:
        """The texts that weight methods look at; None: those that are the default."""
        return self._variants.calibration

    def census(
        self, recipe: Spec, *, outputs: bool = True, progress: Progress | None = None, **parameters: Any
    ) -> pd.DataFrame:
        """What a recipe's weight methods made of each weight: one row a matrix, also of those left as they are.

        Columns: layer, module, name, form, bits, rank, density, chosen, bytes, share, weight_error, output_error,
        reason; explained in `workbench.weights.reports.census`. outputs: also the error of each layer's outputs over the
        calibration texts, whose second moments are gathered once for that.
        """
        from workbench.weights.reports.census import census_of

        methods = _weights(Recipe.of(recipe, **parameters))
        arguments.flag("outputs", outputs)
        twin = self._variants.get(methods, progress)
        reasons = {name: why for method in methods for name, why in method.left_alone(self.model).items()}
        return census_of(self.model, twin, self._variants.study() if outputs else None, reasons, progress)

    def sensitivity(
        self,
        recipe: Spec,
        *,
        each: Literal["layer", "module"] = "layer",
        texts: int = 4,
        tokens: int = 256,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """Which layer hurts: what a weight method does to the model's predictions in one decoder layer alone, and in
        one kind of module alone; with each="module", in each module of each layer.

        Columns: layer, module, kl, error; explained in `workbench.weights.reports.sensitivity`. texts, tokens: how much of the
        calibration texts is read for it. Raises NotApplicable for methods whose layers only make sense together.
        """
        from workbench.weights.reports.sensitivity import sensitivity_of

        methods = _weights(Recipe.of(recipe, **parameters))
        for method in methods:
            if not method.alone:
                raise NotApplicable(f"{method.key} changes layers together: no part of what it does stands alone")
        arguments.choice("each", each, ("layer", "module"))
        ids = self._some_ids(texts, tokens)
        return sensitivity_of(self.model, self._variants.get(methods, progress), ids, each, progress)

    def export(
        self,
        path: str | Path,
        recipe: Spec,
        *,
        format: Literal["auto", "workbench", "compressed-tensors"] = "auto",
        dtype: str | torch.dtype | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Exported:
        """Write the model, compressed by a recipe's weight methods, into a folder; `wb.Session(path)` opens it.

        format: "auto" takes compressed-tensors, which transformers and servers load, where the layers have a place in
        it, else the workbench's own (safetensors and JSON). dtype: in which what is not compressed is written (default:
        as it is held). Raises NotApplicable, MissingExtra, and InputError for a folder that holds something else.
        """
        from workbench.export.model import Format, export_twin

        methods, folder = _weights(Recipe.of(recipe, **parameters)), arguments.path("path", path)
        arguments.choice("format", format, get_args(Format))
        twin = self._variants.get(methods, progress)
        return export_twin(self.model, twin, methods, self.facts, self.tokenizer, folder, format, dtype)

    def spectra(
        self,
        recipe: Spec | None = None,
        *,
        layer: int | None = None,
        module: str | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Spectra:
        """The singular values of the weights in the decoder's layers, and how many directions they use.

        recipe: of the weights as its weight methods made them (default: of the model's own). layer, module: only of
        one decoder layer, or of the modules of one name.
        """
        from workbench.weights.reports.spectra import spectra_of

        methods = [] if recipe is None else _weights(Recipe.of(recipe, **parameters))
        return spectra_of(self._variants.get(methods, progress), layer=layer, module=module, progress=progress)

    def rounding(
        self,
        recipe: Spec | None = None,
        *,
        bits: int = 8,
        texts: int = 4,
        tokens: int = 256,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """How well what enters each linear layer lends itself to rounding: one row a layer.

        Columns: layer, module, kernel, kernel_cross, space; explained in `workbench.weights.reports.rounding`. recipe: under
        its weight methods (default: in the model as it is). texts, tokens: how much of the calibration texts is read.
        """
        from workbench.weights.reports.rounding import rounding_of

        methods = [] if recipe is None else _weights(Recipe.of(recipe, **parameters))
        bits, ids = arguments.whole("bits", bits, 2, 16), self._some_ids(texts, tokens)
        return rounding_of(self._variants.get(methods, progress), ids, bits, progress)

    def _some_ids(self, texts: int, tokens: int) -> Tensor:
        """The beginning of the calibration texts, at most `tokens` of each of `texts`: int64 [t, n]."""
        texts, tokens = arguments.whole("texts", texts, low=1), arguments.whole("tokens", tokens, low=1)
        return self._variants.study().ids[:texts, :tokens]

    def weight_nbytes(
        self, recipe: Spec | None = None, *, progress: Progress | None = None, **parameters: Any
    ) -> tuple[int, int]:
        """Bytes of the model's weights under a recipe's weight methods, and of its own weights.

        Both with plain weights at 16 bits, as budgets count them, in whatever precision they are computed here.
        """
        methods = () if recipe is None else Recipe.of(recipe, **parameters).family("weights")
        return self._variants.deployed_nbytes(methods, progress), self._variants.deployed_nbytes(())

    # -- running

    def run(
        self,
        recipe: Spec = "full",
        *,
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Run:
        """Generate greedily under a recipe: a key, a method, or a list of methods of any family.

        question: asked after the prompt (None: go on from the prompt). Further parameters go to the method.
        Raises what `plan` raises, PromptTooLong, and Cancelled if `progress` was cancelled.
        """
        return self.stream(
            recipe, question=question, max_new_tokens=max_new_tokens, progress=progress, **parameters
        ).run

    def stream(
        self,
        recipe: Spec = "full",
        *,
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Stream:
        """The same as `run`, but token by token: iterate over the result, then take its `run`.

        Planning, and reading under other weights or attention, happen before this returns.
        """
        spec, progress = Recipe.of(recipe, **parameters), progress or Progress()
        max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, 1, arguments.MOST_TOKENS)
        trace = self._trace(spec, progress)
        began = time.perf_counter()
        ids = trace.prompt.question_ids(question, self.tokenizer)
        plan = self._plan(spec, trace, progress, ids if ids.numel() else None)
        plan_s = time.perf_counter() - began
        # The reading that a method made while planning is on its timeline, not part of planning.
        plan_s = max(plan_s - plan.read_seconds, 0.0) if isinstance(plan, StreamedPlan) else plan_s
        return self._conversation(spec, plan).begin(question, max_new_tokens, progress, plan_s)

    def _conversation(self, recipe: Recipe, plan: Plan) -> Conversation:
        assert self.trace is not None
        weights = recipe.family("weights")
        weight_notes = [method.note(self.model) for method in weights if isinstance(method, WeightMethod)]
        return Conversation(
            recipe=recipe,
            plan=plan,
            model=self._variants.get(weights),
            weight_nbytes=self._variants.nbytes(weights),
            plain=self._plan(Recipe.of("full"), self.trace, None) if self.trace.recorded else None,
            plain_model=self.model,
            facts=self.facts,
            tokenizer=self.tokenizer,
            notes=(*self.trace.prompt.notes, *plan.notes, *weight_notes, *self._variants.notes),
            on_run=partial(self._remember, self.trace),
            graphs=self.graphs,
        )

    def _remember(self, trace: Trace, run: Run) -> None:
        """Keep a finished run, and the caches of the last few only."""
        self._timelines.append(run.memory.without("read"))
        if trace is not self.trace:  # a stream that was begun before another prompt was read
            return
        self.runs.append(run)
        for old in self.runs[:-_CACHES]:
            old.release()

    # -- comparing

    def compare(
        self,
        recipes: Sequence[Spec],
        *,
        budgets: Sequence[float | str] = (0.5, 0.25),
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Run every recipe at every budget and put them side by side: one row a run, as a pandas DataFrame.

        Recipes without a budget (the full cache, weights alone) run once. A recipe that fails, for instance at a budget
        that it cannot meet, gives a row whose `error` says why. What ends all of it (`progress` was cancelled, Ctrl-C)
        carries the rows so far as `finished`, a DataFrame; `compare_rows` gives them one by one.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        try:
            for row in self.compare_rows(
                recipes, budgets=budgets, question=question, max_new_tokens=max_new_tokens, progress=progress
            ):
                rows.append(row)
        except (Cancelled, KeyboardInterrupt) as stopped:
            stopped.finished = pd.DataFrame(rows, columns=list(COLUMNS))  # type: ignore[union-attr]
            stopped.add_note(f"{len(rows)} rows were finished before that: they are in this error's `finished`")
            raise
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def compare_rows(
        self,
        recipes: Sequence[Spec],
        *,
        budgets: Sequence[float | str] = (0.5, 0.25),
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The same as `compare`, row by row, each as soon as its run is measured; `COLUMNS` are what a row has.

        What is wrong with all of them raises at once: an unknown method, a bad budget, a question that cannot be read.
        """
        one: Any = isinstance(recipes, str | Method | Recipe) and [recipes]
        planned = [Recipe.of(spec) for spec in one or arguments.several("recipes", recipes, "recipes")]
        if not planned:
            raise BadRecipe("no recipe is given: name at least one method, for instance 'full'")
        wanted = [Budget.parse(each) for each in _several(budgets)]
        if not wanted and any(map(_takes_budget, planned)):
            raise BadBudget("no budget is given: give for instance budgets=[0.5, 0.25]")
        cases = [(recipe, b) for recipe in planned for b in (wanted if _takes_budget(recipe) else [None])]
        if self.trace is None:
            raise NotRead("no prompt has been read yet: call read(text) first")
        self.trace.prompt.question_ids(question, self.tokenizer)
        arguments.whole("max_new_tokens", max_new_tokens, 1, arguments.MOST_TOKENS)
        return self._compared(cases, question, max_new_tokens, progress or Progress())

    def _compared(
        self, cases: Sequence[tuple[Recipe, Budget | None]], question: Question, max_new_tokens: int, progress: Progress
    ) -> Iterator[dict[str, Any]]:
        for done, (recipe, budget) in enumerate(cases):
            progress.update("comparing", done, len(cases))
            label = recipe.label
            try:
                spec = recipe if budget is None else Recipe.of(recipe, budget=budget)
                label = spec.label
                run = self.run(spec, question=question, max_new_tokens=max_new_tokens, progress=progress)
                run.measure(progress=progress)
                row = row_of(run)
            except Cancelled:
                raise
            except Exception as error:  # one recipe that fails must not take the others with it
                reason = " ".join(str(error).split())
                told = reason if isinstance(error, WorkbenchError) else f"unexpected {type(error).__name__}: {reason}"
                row = {**dict.fromkeys(COLUMNS), "recipe": label, "budget": _shown(budget), "error": told}
            yield row
        progress.update("comparing", len(cases), len(cases))

    # -- looking

    def attention(
        self,
        layer: int,
        head: int,
        recipe: Spec | None = None,
        *,
        pixels: int = 512,
        pooling: Pooling = "max",
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> PooledMap:
        """The attention map of one query head over the prompt, pooled to at most pixels x pixels cells.

        recipe: whose attention. rows, cols: zoom into a window of positions (from, to); a window of at most `pixels`
        tokens shows each of them. Memory does not grow with the square of the length.

        Under KV methods every query sees what the plan holds, as if it had been decided before the prompt was read.
        Under an attention method that changes reading, the map is what that method really added up
        (`workbench.inspection.implied`), whatever KV methods stand beside it: the prompt's queries attended before they
        dropped anything. Queries after the prompt see what their plan holds: by softmax, so for that leave the
        attention method out, or in the way of a method that says `decodes`. Weight methods change what is recorded.
        """
        _check_view(self.trace, pixels, pooling, rows, cols)
        seen = self._seen(_recipe(recipe, parameters), layer, head, progress)
        return seen.maps(pixels=pixels, pooling=pooling, rows=rows, cols=cols, progress=progress)[0]

    def attention_grid(
        self,
        recipe: Spec | None = None,
        *,
        pixels: int = 32,
        pooling: Pooling = "max",
        progress: Progress | None = None,
        **parameters: Any,
    ) -> GridOfMaps:
        """The attention maps of all layers and query heads, each pooled to at most pixels x pixels cells.

        recipe: as in `attention`. One pass over each layer; memory for the cells and a few blocks of rows. Under an
        attention method whose weights have to be found, largest values take time with the third power of the length;
        the heads are judged on the way, and `heads` is quick after it.
        """
        spec = _recipe(recipe, parameters)
        _check_view(self.trace, pixels, pooling)
        trace = _need_recording(self._trace(spec, progress))
        judged: list[HeadStats] = []

        def maps(seen: Seen, steps: Progress) -> list[PooledMap]:
            if isinstance(seen, Implied) and pooling == "max":
                found, stats = seen.survey(trace.ids, pixels=pixels, progress=steps)
                judged.append(stats)
                return found
            return seen.maps(pixels=pixels, pooling=pooling, progress=steps)

        grid = GridOfMaps.of(self._each_layer(spec, maps, "attention maps", progress))
        if judged:
            trace.once(_stats_key(spec), lambda: HeadStats.join(judged))
        return grid

    def received(
        self,
        layer: int,
        head: int | None = None,
        recipe: Spec | None = None,
        *,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Tensor:
        """The attention that each token of the prompt receives from all queries together: [n] float32, on the CPU.

        head: of one query head (default: the mean of the layer's). Adds up to the number of queries, where each sees
        something. recipe: as in `attention`; what it does not hold receives nothing.
        """
        seen = self._seen(_recipe(recipe, parameters), layer, head, progress)
        return seen.received(progress).mean(dim=0)

    def heads(self, recipe: Spec | None = None, *, progress: Progress | None = None, **parameters: Any) -> pd.DataFrame:
        """Where each head's attention goes, and its class: one row a layer and query head.

        Columns: layer, head, kv_head, entropy, sink, local, retrieval, distance, class; they are explained in
        `workbench.measure.HeadStats` and `Thresholds`. recipe: as in `attention`.
        """
        return self.head_stats(recipe, progress=progress, **parameters).to_frame(self.facts.kv_heads)

    def head_stats(
        self, recipe: Spec | None = None, *, progress: Progress | None = None, **parameters: Any
    ) -> HeadStats:
        """The same figures as tensors, with each head's profile of distances; measured once for each recipe."""
        spec = _recipe(recipe, parameters)
        trace = _need_recording(self._trace(spec, progress))

        def stats(seen: Seen, steps: Progress) -> HeadStats:
            return seen.judge(trace.ids, steps)

        return trace.once(
            _stats_key(spec), lambda: HeadStats.join(self._each_layer(spec, stats, "judging heads", progress))
        )

    def _seen(self, recipe: Recipe, layer: int, head: int | None, progress: Progress | None) -> Seen:
        """What attention of a layer, or one query head of it, is under a recipe."""
        trace = _need_recording(self._trace(recipe, progress))
        layer = arguments.index("layer", layer, len(trace.layers), "the model's layers")
        if head is not None:
            head = arguments.index("head", head, self.facts.heads, "the model's query heads")
        return self._view(recipe, trace, progress)(layer, head)

    def _each_layer(
        self, recipe: Recipe, work: Callable[[Seen, Progress], T], stage: str, progress: Progress | None
    ) -> list[T]:
        """`work` on all heads of each layer under a recipe. Within a layer it can be cancelled, and reports where a
        layer takes long.
        """
        trace = _need_recording(self._trace(recipe, progress))
        progress = progress or Progress()
        quiet = Progress(lambda *_: progress.check())
        view, found, layers = self._view(recipe, trace, progress), [], len(trace.layers)
        for layer in progress.track(range(layers), stage, layers):
            seen = view(layer, None)
            found.append(work(seen, progress.part(layer, layers, stage) if isinstance(seen, Implied) else quiet))
        return found

    def _view(self, recipe: Recipe, trace: Trace, progress: Progress | None) -> Callable[[int, int | None], Seen]:
        """What finds the attention of a layer and a query head (None: all) under a recipe."""
        method = _attention(recipe)
        if method is not None and changes_reading(method):
            _check_together(method, _kv(recipe))
            return partial(as_read, method, trace.layers)
        plan = self._plan(recipe, trace, progress)
        return lambda layer, head: capture(trace.layers[layer], plan, head)

    def operator(
        self,
        operator: Operator | str,
        layer: int,
        head: int = 0,
        *,
        heads: Iterable[int] | None = None,
        pixels: int = 512,
        pooling: Pooling = "max",
        rows: Span | None = None,
        cols: Span | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> OperatorStudy:
        """What another attention operator makes of a layer's recorded queries, keys and values, beside exact attention.

        operator: one of `wb.methods("operator")`, whose parameters may follow. Gives the output error of each head, or
        of those in `heads`, and the maps of `head`, the implied one and the exact one, pooled as `attention` does.
        """
        from workbench.attention.operators import Operator, study_operator

        chosen = find(operator)(**parameters) if isinstance(operator, str) else operator
        if not isinstance(chosen, Operator):
            what = chosen.key if isinstance(chosen, Method) else quoted(chosen)
            raise BadParameter(f"{what} is no attention operator: choose one of wb.methods('operator')")
        if self.trace is None:
            raise NotRead("no prompt has been read yet: call read(text) first")
        _check_view(self.trace, pixels, pooling, rows, cols)
        view: dict[str, Any] = {"heads": heads, "pixels": pixels, "pooling": pooling, "rows": rows, "cols": cols}
        return study_operator(_need_recording(self.trace), chosen, layer, head, **view, progress=progress)

    def outliers(
        self,
        kind: Outliers = "keys",
        recipe: Spec | None = None,
        *,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """Largest magnitude, kurtosis and share of energy of every channel, layer by layer.

        kind: "keys", "values", "activations" (the residual stream before each layer) or "weights". recipe: under its
        weight methods, whose layers count as the weights they stand for; its other methods change nothing here.
        """
        from workbench.inspection.channels import KINDS, channel_table

        arguments.choice("kind", kind, KINDS)
        weights = () if recipe is None else Recipe.of(recipe, **parameters).family("weights")
        model = self._variants.get(weights, progress)
        if kind == "weights":
            return channel_table(kind, model, progress=progress, weights=_used(model) if weights else None)
        trace = self._trace(Recipe.of(list(weights) or "full"), progress)
        return channel_table(kind, model, _need_recording(trace), progress)

    @property
    def memory(self) -> Timeline:
        """Live bytes over time, by category: everything read and run so far, each reading once."""
        return Timeline.concat(self._timelines, run="session")

    # -- keeping

    def restore(self, trace: Trace, runs: Sequence[Run]) -> None:
        """Take over a trace and the runs on it, as `load` does."""
        self.trace, self.runs = trace, list(runs)
        self._timelines = [trace.timeline, *(run.memory.without("read") for run in runs)]

    def save(self, path: str | Path) -> Path:
        """Write the prompt, its trace and the record of all runs into a folder (safetensors and JSON)."""
        from workbench.storage.sessions import save

        if self.trace is not None:
            _need_recording(self.trace)
        return save(self, arguments.path("path", path))

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Session:
        """Open what `save` wrote; the model is loaded from where it came from, or given as `model=`.

        A folder that `export` wrote opens as a new session with that model, as `Session(path)` does.
        """
        from workbench.export.model import is_exported
        from workbench.storage.sessions import load as load_session

        folder = arguments.path("path", path)
        if is_exported(folder):
            return cls(folder, **options)
        return load_session(cls, folder, **options)


COLUMNS = (
    *("recipe", "budget", "kv_share", "kv_mib", "host_mib", "attention", "score_share", "weights_mib"),
    *("kl", "top1", "nll_difference", "perplexity", "first_divergence", "first_token_s", "tokens_per_s"),
    *("text", "error"),
)


def row_of(run: Run) -> dict[str, Any]:
    """A run as one row of a table, with `COLUMNS`."""
    quality = run.quality
    budget = run.recipe.budget
    if budget is None and len(run.recipe.methods) == 1:
        budget = run.recipe.methods[0].effective_budget
    return {
        "recipe": run.recipe.label,
        "budget": _shown(budget),
        "kv_share": run.plan.share,
        "kv_mib": run.plan.nbytes / 2**20,
        "host_mib": run.plan.host_nbytes / 2**20,
        "attention": next((method.key for method in run.recipe.family("attention")), None),
        "score_share": run.plan.trace.score_share,
        "weights_mib": run.memory.samples[-1].categories["weights"] / 2**20,
        "kl": quality.kl,
        "top1": quality.top1_agreement,
        "nll_difference": quality.nll_difference,
        "perplexity": quality.perplexity,
        "first_divergence": quality.first_divergence,
        "first_token_s": run.timing.first_token_s,
        "tokens_per_s": run.timing.tokens_per_s,
        "text": run.text,
        "error": None,
    }


def _used(model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """The weights of a compressed model's linear layers by name, as they are used."""
    from workbench.weights.surgery.linears import linear_layers, weight_of

    return {name: partial(weight_of, module) for name, module in linear_layers(model).items()}  # type: ignore[misc]


def _recipe(spec: Spec | None, parameters: dict[str, Any]) -> Recipe:
    """The recipe that is looked at: the full cache where none is named."""
    return Recipe.of("full" if spec is None else spec, **parameters)


def _check_view(
    trace: Trace | None, pixels: int, pooling: Pooling, rows: Span | None = None, cols: Span | None = None
) -> None:
    """Raise BadParameter for a map that cannot be made of the prompt, before anything is computed for it."""
    check_pooling(pixels, pooling)
    for name, span in (("rows", rows), ("cols", cols)):
        if span is not None and trace is not None:
            arguments.span(name, span, trace.tokens)


def _need_recording(trace: Trace) -> Trace:
    if not trace.recorded:
        raise NotRead("this prompt was taken in without a recording: call read(text) without record=False")
    return trace


def _several(budgets: Any) -> list[Any]:
    """Budgets as they were given, one of them or several."""
    alone = isinstance(budgets, str | Real | Budget)
    return [budgets] if alone else arguments.several("budgets", budgets, "budgets")


def _shown(budget: Budget | None) -> float | str | None:
    return None if budget is None else budget.to_json()


def _takes_budget(recipe: Recipe) -> bool:
    return any(method.key != "full" for method in recipe.family("kv"))


def _stats_key(recipe: Recipe) -> tuple[Any, ...]:
    """Under what a trace remembers the statistics of heads: of a reading that a method changed there are only one."""
    return ("head_stats",) if changes_reading(_attention(recipe)) else ("head_stats", recipe.methods, recipe.budget)


def _kv(recipe: Recipe) -> list[KVMethod]:
    return [method for method in recipe.family("kv") if isinstance(method, KVMethod)] or [Full()]


def _weights(recipe: Recipe) -> list[WeightMethod]:
    """The weight methods of a recipe that has no others."""
    methods = [method for method in recipe.methods if isinstance(method, WeightMethod)]
    others = [method.key for method in recipe.methods if not isinstance(method, WeightMethod)]
    if others:
        raise BadRecipe(f"{', '.join(others)}: only weight methods change the model's weights; leave the others out")
    return methods


def _check_together(attention: AttentionMethod | None, methods: Sequence[KVMethod]) -> None:
    """Raise BadRecipe where an attention method and KV methods both want to do the same thing."""
    if attention is None:
        return
    for method in methods:
        if method.supplies("read"):
            raise BadRecipe(f"{method.key} reads the prompt in its own way, and so does {attention.key}: use one")
        if attention.decodes and (method.supplies("evict") or method.supplies("retrieve")):
            raise BadRecipe(
                f"{attention.key} attends in its own way while decoding, where {method.key} watches or fetches: use "
                "one of the two"
            )


def _attention(recipe: Recipe) -> AttentionMethod | None:
    methods = [method for method in recipe.family("attention") if isinstance(method, AttentionMethod)]
    if len(methods) > 1:
        raise BadRecipe(f"{' and '.join(m.key for m in methods)}: a recipe has one attention method")
    return methods[0] if methods else None


def _loaded(model: Any, device: Any, dtype: Any, progress: Progress | None) -> LoadedModel:
    from transformers import PreTrainedModel

    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        from workbench.export.model import is_exported
        from workbench.export.model import load as load_exported

        loading = load_exported if is_exported(model) else load
        return loading(model, device=device, dtype=dtype, progress=progress)
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], PreTrainedModel):
        network, tokenizer = model
        if any(weight.is_meta for weight in network.parameters()):
            raise ModelNotFound(
                f"{type(network).__name__} has weights without data (on the meta device): load it whole"
            )
        if device is not None or dtype is not None:
            network = network.to(device=device, dtype=dtype)  # type: ignore[call-overload]
        found = facts(network)
        return LoadedModel(network.eval(), tokenizer, found.name, found)
    raise ModelNotFound("a model is a name, a hub id, a folder, or a pair (model, tokenizer or None)")


def _kv_dtype(wanted: str | torch.dtype | None, found: Facts) -> torch.dtype:
    if wanted is None:
        own = found.checkpoint_dtype
        return own if own in (torch.float16, torch.bfloat16) else torch.bfloat16
    name = str(wanted).removeprefix("torch.")
    if name not in _KV_DTYPES:
        raise BadParameter(f"kv_dtype {wanted!r} is not one of {', '.join(_KV_DTYPES)}")
    return _KV_DTYPES[name]
