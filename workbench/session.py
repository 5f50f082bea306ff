"""The session: one model, one prompt, and everything recorded about them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from workbench import arguments
from workbench.display import Shown, controls
from workbench.engine.attention_hook import devices_of
from workbench.errors import BadParameter, ModelNotFound, NotApplicable
from workbench.formatting import mib
from workbench.inspection import attention as maps
from workbench.inspection import heads, operators, outliers
from workbench.inspection.channels import Kind as Outliers
from workbench.kv.plan import Plan, uncompressed_nbytes
from workbench.measure.memory import Timeline
from workbench.models import UNLIMITED, Facts, LoadedModel, facts, load
from workbench.models.devices import check_data
from workbench.models.image_text import is_processor, tokenizer_of
from workbench.models.load import device_for, dtype_for
from workbench.progress import Progress
from workbench.recipe import Recipe, Spec
from workbench.runtime.comparison import COLUMNS, Comparison, Row, row_of, tabulated
from workbench.runtime.compiling import telling
from workbench.runtime.conversation import Conversation
from workbench.runtime.readings import Readings
from workbench.runtime.rehearsal import Rehearsal, begin
from workbench.runtime.run import Question, Run, Stream
from workbench.runtime.task_evaluation import TASK_COLUMNS, TaskEvaluation
from workbench.weights.reports import census, rounding, sensitivity, size, spectra

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from workbench.attention.operators import Operator
    from workbench.attention.operators import Study as OperatorStudy
    from workbench.budget import BudgetLike
    from workbench.export.model import Exported, Format
    from workbench.measure.attention import PooledMap, Pooling, Span
    from workbench.measure.grid import GridOfMaps
    from workbench.measure.head_classes import HeadStats
    from workbench.models.image_text import Picture
    from workbench.models.load import DeviceMap
    from workbench.prompt import Text
    from workbench.registry import Method
    from workbench.tasks import Task
    from workbench.trace import Trace
    from workbench.weights.calibration.study import WeightStudy
    from workbench.weights.calibration.texts import Calibration
    from workbench.weights.reports.spectra import Spectra

__all__ = ["COLUMNS", "TASK_COLUMNS", "Outliers", "Session", "Spec", "row_of"]

_KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHES = 4  # runs whose caches stay, so that more can be asked of them


class Session(Shown):
    """A model, a prompt, and everything recorded about them: the one object a user needs.

    model: a catalogue name, hub id, folder, or a pair of a model and its tokenizer, its processor (for images) or None.
    device, dtype: where and in what precision it computes (float32 on CPU, bfloat16 on CUDA). device_map,
    max_memory: spread it over several devices, as `load` says; caches lie with their layers. kv_dtype: the precision
    in which caches are stored and the uncompressed cache is counted: the checkpoint's own 16-bit type, else bfloat16;
    "float32" reproduces plain transformers exactly. seed: for methods that draw at random. keep_trace_on: where
    recordings rest, for instance "cpu" for a model on a GPU. graphs: where method and model allow it, decode by
    replaying a CUDA graph on a GPU, and on a CPU without the model's modules, from a copy of its weights in fewer
    bytes. trust: do not compare reading and decoding with the model by itself before the first prompt (`exactness`).

    Wherever a recipe is taken, `budget` and further parameters are those of its method; with several methods `budget`
    is for all together, and there are no others.
    """

    def __init__(
        self,
        model: str
        | Path
        | tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin | None]
        | LoadedModel = "smollm2-135m",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        kv_dtype: str | torch.dtype | None = None,
        seed: int = 0,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        keep_trace_on: str | torch.device | None = None,
        graphs: bool = True,
        trust: bool = False,
        progress: Progress | None = None,
    ) -> None:
        loaded = _loaded(model, device, dtype, progress, device_map, max_memory)
        self.readings = Readings(
            loaded,
            _kv_dtype(kv_dtype, loaded.facts),
            keep_on=None if keep_trace_on is None else torch.device(keep_trace_on),
            trusted=trust,
        )
        self.source = loaded.source
        self.seed = arguments.whole("seed", seed, 0, 2**63 - 1)
        self.graphs = graphs
        self.runs: list[Run] = []
        self._rehearsal: Rehearsal | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model as it was loaded."""
        return self.readings.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None: prompts are token ids."""
        return self.readings.tokenizer

    @property
    def facts(self) -> Facts:
        """What is fixed about the model."""
        return self.readings.facts

    @property
    def kv_dtype(self) -> torch.dtype:
        """The precision in which caches are stored and the uncompressed cache is counted."""
        return self.readings.kv_dtype

    @property
    def trace(self) -> Trace | None:
        """What was recorded of the prompt; None before `read`."""
        return self.readings.plain

    @property
    def calibration(self) -> Calibration | None:
        """The texts that weight methods look at; None: those that are the default."""
        return self.readings.variants.calibration

    @property
    def memory(self) -> Timeline:
        """Live bytes over time, by category: everything read and run so far, each reading once."""
        return Timeline.concat(self.readings.timelines, run="session")

    # -- showing

    def __repr__(self) -> str:
        read = "nothing read yet" if self.trace is None else f"{self.trace.tokens} tokens read"
        return f"<Session {self.source}: {read}, {len(self.runs)} runs>"

    def summary(self) -> str:
        """The model, the prompt and the runs so far in words."""
        model = self.facts
        lines = [
            f"Session with {self.source}",
            f"  model   {model.layers} layers, {model.heads} heads on {model.kv_heads} KV heads of size "
            f"{model.head_dim}"
            + ("" if model.max_positions == UNLIMITED else f", up to {model.max_positions:,} tokens"),
        ]
        if self.trace is None:
            return "\n".join([*lines, "  prompt  nothing read yet: session.read(text)"])
        full = uncompressed_nbytes(self.trace, self.kv_dtype)
        held = f" ({self.trace.latent} numbers a token)" if self.trace.latent else ""
        lines.append(f"  prompt  {self.trace.tokens:,} tokens, whose uncompressed cache takes {mib(full)}{held}")
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

    def report(self, path: str | Path) -> Path:
        """Write all of this into one HTML file that works offline: the runs, what their recipes keep at any budget (a
        slider), the answers and the memory; returns its path. The same as `save_html`.
        """
        return self.save_html(path)

    def controls(self, **options: Any) -> Any:
        """A control panel for notebooks: method, parameters, live budget, runs. Raises MissingExtra without widgets."""
        return controls(self, **options)

    # -- reading and planning

    def read(
        self,
        text: Text,
        *,
        images: Sequence[Picture] = (),
        chat: bool | None = None,
        record: bool = True,
        expecting: Spec | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Read a prompt: text, chat messages, or token ids [n]; everything later is asked of it.

        chat: whether plain text is wrapped in the model's chat template (default: where it has one). Token ids are read
        as they are. images: PIL images, arrays [height, width, 3] of bytes, or paths of files, for a model that sees
        them; "<image>" in the text says where each stands (default: before it), in messages a part {"type": "image"}.
        record: False takes the prompt in without reading it as a whole, for texts too long for that; only methods that
        read in bounded memory can be used then, and quality is not measured. expecting: the recipe that will be run
        later: on a GPU its kernels begin to compile, where this machine never did so; a plan or a run waits for them.
        Raises BadPrompt, PromptTooLong; NotApplicable for a model that cannot be read exactly; Cancelled between
        layers, with the earlier prompt still in place.
        """
        recipe = None if expecting is None else Recipe.of(expecting)
        begun = None if recipe is None else partial(self._rehearse, recipe)
        trace = self.readings.read(text, images=images, chat=chat, record=record, progress=progress, begun=begun)
        self.runs = []
        return trace

    def plan(
        self,
        recipe: Spec = "full",
        *,
        budget: BudgetLike | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Plan:
        """What the recipe's KV methods would keep of the prompt; no model call, and no change to anything.

        budget, parameters: as everywhere where a recipe is taken (see the class).
        Raises BudgetTooSmall, BadBudget, BadRecipe, BadParameter, UnknownMethod, NotRead.
        """
        spec = Recipe.of(recipe, budget=budget, **parameters)
        with self._compiled(progress):
            return self.readings.plan(spec, self.readings.trace(spec, progress), progress)

    def _rehearse(self, recipe: Recipe, tokens: int) -> None:
        """Let kernels compile that a recipe and a first map need, beside what is done next."""
        look = partial(maps.attention_map, recipe=Recipe.of("full"), layer=0, head=0)
        self._rehearsal = begin(self.model, self.facts, tokens, recipe, self.kv_dtype, look)

    @contextmanager
    def _compiled(self, progress: Progress | None) -> Iterator[None]:
        """Work for which kernels may compile: those of a rehearsal are waited for, and others are reported."""
        if self._rehearsal is not None:
            self._rehearsal.finish(progress)
            self._rehearsal = None
        with telling(progress):
            yield

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
        return self.readings.calibrate(source, samples=samples, tokens=tokens, seed=seed)

    def census(
        self,
        recipe: Spec,
        *,
        budget: BudgetLike | None = None,
        outputs: bool = True,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """What a recipe's weight methods made of each weight: one row a matrix, also of those left as they are.

        Columns: layer, module, name, form, bits, rank, density, chosen, bytes, share, weight_error, output_error,
        reason; explained in `workbench.weights.reports.census`. outputs: also the error of each layer's outputs over
        the calibration texts, whose second moments are gathered once for that.
        """
        methods = Recipe.of(recipe, budget=budget, **parameters).methods
        return census.census(self.readings.variants, methods, outputs=outputs, progress=progress)

    def sensitivity(
        self,
        recipe: Spec,
        *,
        budget: BudgetLike | None = None,
        each: Literal["layer", "module"] = "layer",
        texts: int = 4,
        tokens: int = 256,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """Which layer hurts: what a weight method does to the model's predictions in one decoder layer alone, and in
        one kind of module alone; with each="module", in each module of each layer.

        Columns: layer, module, kl, error; explained in `workbench.weights.reports.sensitivity`. texts, tokens: how much
        of the calibration texts is read for it. Raises NotApplicable for methods whose layers only make sense together.
        """
        methods = Recipe.of(recipe, budget=budget, **parameters).methods
        return sensitivity.sensitivity(
            self.readings.variants, methods, each=each, texts=texts, tokens=tokens, progress=progress
        )

    def export(
        self,
        path: str | Path,
        recipe: Spec,
        *,
        budget: BudgetLike | None = None,
        format: Format = "auto",
        dtype: str | torch.dtype | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Exported:
        """Write the model, compressed by a recipe's weight methods, into a folder; `wb.Session(path)` opens it.

        format: "auto" takes compressed-tensors, which transformers and servers load, where the layers have a place in
        it, else the workbench's own (safetensors and JSON). dtype: in which what is not compressed is written (default:
        as it is held). Raises NotApplicable, MissingExtra, and InputError for a folder that holds something else.
        """
        from workbench.export.model import export

        methods = Recipe.of(recipe, budget=budget, **parameters).methods
        return export(
            self.readings.variants, methods, path, known=self.facts, format=format, dtype=dtype, progress=progress
        )

    def spectra(
        self,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        layer: int | None = None,
        module: str | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Spectra:
        """The singular values of the weights in the decoder's layers, and how many directions they use.

        recipe: of the weights as its weight methods made them (default: of the model's own). layer, module: only of
        one decoder layer, or of the modules of one name.
        """
        methods = _methods(recipe, budget, parameters)
        return spectra.spectra(self.readings.variants, methods, layer=layer, module=module, progress=progress)

    def rounding(
        self,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        bits: int = 8,
        texts: int = 4,
        tokens: int = 256,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """How well what enters each linear layer lends itself to rounding: one row a layer.

        Columns: layer, module, kernel, kernel_cross, space; explained in `workbench.weights.reports.rounding`. recipe:
        under its weight methods (default: in the model as it is). texts, tokens: how much of the calibration texts is
        read.
        """
        methods = _methods(recipe, budget, parameters)
        return rounding.rounding(
            self.readings.variants, methods, bits=bits, texts=texts, tokens=tokens, progress=progress
        )

    def weight_nbytes(
        self,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> tuple[int, int]:
        """Bytes of the model's weights under a recipe's weight methods, and of its own weights.

        Both with plain weights at 16 bits, as budgets count them, in whatever precision they are computed here.
        """
        return size.weight_nbytes(
            self.readings.variants, _weights(_methods(recipe, budget, parameters)), progress=progress
        )

    # -- running

    def run(
        self,
        recipe: Spec = "full",
        *,
        budget: BudgetLike | None = None,
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Run:
        """Generate greedily under a recipe: a key, a method, or a list of methods of any family.

        question: asked after the prompt (None: go on from the prompt). budget, parameters: as everywhere where a recipe
        is taken (see the class). Raises what `plan` raises, PromptTooLong, and Cancelled if `progress` was cancelled.
        """
        spec = Recipe.of(recipe, budget=budget, **parameters)
        return self.stream(spec, question=question, max_new_tokens=max_new_tokens, progress=progress).run

    def stream(
        self,
        recipe: Spec = "full",
        *,
        budget: BudgetLike | None = None,
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Stream:
        """The same as `run`, but token by token: iterate over the result, then take its `run`.

        Planning, and reading under other weights or attention, happen before this returns.
        """
        spec, progress = Recipe.of(recipe, budget=budget, **parameters), progress or Progress()
        max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, 1, arguments.MOST_TOKENS)
        with self._compiled(progress):
            trace = self.readings.trace(spec, progress)
            began = time.perf_counter()
            ids = trace.prompt.question_ids(question, self.tokenizer)
            plan = self.readings.plan(spec, trace, progress, ids if ids.numel() else None)
        plan_s = time.perf_counter() - began
        # The reading that a method made while planning is on its timeline, not part of planning.
        plan_s = max(plan_s - plan.read_seconds, 0.0) if plan.chunked else plan_s
        return self._conversation(spec, plan).begin(question, max_new_tokens, progress, plan_s)

    def _conversation(self, recipe: Recipe, plan: Plan) -> Conversation:
        prompt, variants, weights = self.readings.of_prompt(), self.readings.variants, recipe.family("weights")
        return Conversation(
            recipe=recipe,
            plan=plan,
            model=variants.get(weights),
            weight_nbytes=variants.nbytes(weights),
            plain=self.readings.plan(Recipe.of("full"), prompt) if prompt.recorded else None,
            plain_model=self.model,
            facts=self.facts,
            tokenizer=self.tokenizer,
            notes=(*prompt.prompt.notes, *plan.notes, *variants.said(weights), *variants.notes),
            on_run=partial(self._remember, prompt),
            graphs=self.graphs,
            fusing=self.readings.fusing if self.graphs else None,
        )

    def _remember(self, trace: Trace, run: Run) -> None:
        """Keep a finished run, and the caches of the last few only."""
        self.readings.timelines.append(run.memory.without("read"))
        if trace is not self.trace:  # a stream that was begun before another prompt was read
            return
        self.runs.append(run)
        for old in self.runs[:-_CACHES]:
            old.release()

    # -- comparing

    def compare_rows(
        self,
        recipes: Sequence[Spec],
        *,
        budgets: Sequence[BudgetLike] = (0.5, 0.25),
        question: Question = None,
        max_new_tokens: int = 32,
        progress: Progress | None = None,
    ) -> Iterator[Row]:
        """The same as `compare`, row by row, each as soon as its run is measured; `COLUMNS` are what a row has.

        What is wrong with all of them raises at once: an unknown method, a bad budget, a question that cannot be read.
        """
        comparison, progress = Comparison.of(recipes, budgets), progress or Progress()
        self.readings.of_prompt().prompt.question_ids(question, self.tokenizer)
        arguments.whole("max_new_tokens", max_new_tokens, 1, arguments.MOST_TOKENS)
        run = partial(self.run, question=question, max_new_tokens=max_new_tokens, progress=progress)
        return comparison.rows(run, progress)

    @tabulated(compare_rows)
    def compare(self, recipes: Sequence[Spec], **options: Any) -> None:
        """Run every recipe at every budget and put them side by side: one row a run, as a pandas DataFrame.

        Recipes without a budget (the full cache, weights alone) run once. A recipe that fails, for instance at a budget
        that it cannot meet, gives a row whose `error` says why. What ends all of it (`progress` was cancelled, Ctrl-C)
        carries the rows so far as `finished`, a DataFrame; `compare_rows` gives them one by one, and takes the same.
        """

    # -- evaluating

    def evaluate_rows(
        self,
        task: Task | str,
        recipes: Sequence[Spec] | Spec = "full",
        *,
        budgets: Sequence[BudgetLike] | BudgetLike = (0.5, 0.25),
        cases: int | None = None,
        chat: bool | None = None,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Row]:
        """The same as `evaluate`, row by row, each as soon as it is measured; `TASK_COLUMNS` are what a row has.

        What is wrong with all of them raises at once: an unknown task or method, a bad budget, a file that is missing.
        """
        comparison, progress = Comparison.of(recipes, budgets), progress or Progress()
        evaluation = TaskEvaluation.of(
            task, comparison, self.tokenizer, cases=cases, chat=chat, max_new_tokens=max_new_tokens
        )
        beside = self.beside()

        def read(text: Text, chat: bool | None) -> Trace:
            return beside.read(text, chat=chat, progress=progress)

        def run(recipe: Recipe, question: Question, max_new_tokens: int) -> Run:
            return beside.run(recipe, question=question, max_new_tokens=max_new_tokens, progress=progress)

        return evaluation.rows(read, run, progress)

    def beside(self, *, kv_dtype: str | torch.dtype | None = None) -> Session:
        """A session with what is known of the same model and its twins, for prompts that leave this one's alone.

        kv_dtype: as in `Session` (None: this one's).
        """
        other = Session(
            LoadedModel(self.model, self.tokenizer, self.source, self.facts, self.readings.processor),
            kv_dtype=kv_dtype or self.kv_dtype,
            seed=self.seed,
            keep_trace_on=self.readings.keep_on,
            graphs=self.graphs,
            trust=self.readings.trusted,
        )
        known, mine = other.readings, self.readings
        known.variants, known.rotations, known.fusing = mine.variants, mine.rotations, mine.fusing
        return other

    @tabulated(evaluate_rows, TASK_COLUMNS)
    def evaluate(self, task: Task | str, recipes: Sequence[Spec] | Spec = "full", **options: Any) -> None:
        """What recipes get right of a task: one row a case, recipe and budget, as a pandas DataFrame.

        task: as `wb.task` makes it, or the key of one. recipes, budgets: as in `compare`. cases: how many (default: all
        of a file, 4 of a task that has no end). chat: whether texts are wrapped in the chat template (default: where
        there is one, but for texts that the reply continues). max_new_tokens: the longest reply (default: as the task
        says).

        Beside the columns of `compare`: task, case (its seed), tokens, question, expected; right and score of the
        recipe's reply, full_right and full_score of the uncompressed model's, and that reply, full_text. score goes
        from 0 to 1, right is a score of 1. Each prompt is read once; this session's own prompt and runs stay as they
        are. A case that cannot be read, or a recipe that fails, gives rows whose `error` says why.
        """

    # -- looking

    def attention(
        self,
        layer: int,
        head: int,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        pixels: int = 512,
        pooling: Pooling = "max",
        rows: Span | None = None,
        cols: Span | None = None,
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
        spec = _recipe(recipe, budget, parameters)
        look = partial(maps.attention_map, pixels=pixels, pooling=pooling, rows=rows, cols=cols, progress=progress)
        with telling(progress):
            return look(self.readings, spec, layer, head)

    def attention_grid(
        self,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
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
        spec = _recipe(recipe, budget, parameters)
        with telling(progress):
            return maps.attention_grid(self.readings, spec, pixels=pixels, pooling=pooling, progress=progress)

    def received(
        self,
        layer: int,
        head: int | None = None,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> Tensor:
        """The attention that each token of the prompt receives from all queries together: [n] float32, on the CPU.

        head: of one query head (default: the mean of the layer's). Adds up to the number of queries, where each sees
        something. recipe: as in `attention`; what it does not hold receives nothing.
        """
        return maps.received(self.readings, _recipe(recipe, budget, parameters), layer, head, progress=progress)

    def heads(
        self,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """Where each head's attention goes, and its class: one row a layer and query head.

        Columns: layer, head, kv_head, entropy, sink, local, retrieval, distance, class; they are explained in
        `workbench.measure.HeadStats` and `Thresholds`. recipe: as in `attention`.
        """
        stats = self.head_stats(recipe, budget=budget, progress=progress, **parameters)
        trace = self.readings.recorded(_recipe(recipe, budget, parameters))
        return stats.to_frame([layer.kv_heads for layer in trace.layers], numbers=trace.numbers)

    def head_stats(
        self,
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> HeadStats:
        """The same figures as tensors, with each head's profile of distances; measured once for each recipe."""
        with telling(progress):
            return heads.head_stats(self.readings, _recipe(recipe, budget, parameters), progress=progress)

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
        view: operators.View = {"heads": heads, "pixels": pixels, "pooling": pooling, "rows": rows, "cols": cols}
        chosen = operators.operator_of(operator, **parameters)
        return operators.operator_study(self.readings, chosen, layer, head, progress=progress, **view)

    def outliers(
        self,
        kind: Outliers = "keys",
        recipe: Spec | None = None,
        *,
        budget: BudgetLike | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> pd.DataFrame:
        """Largest magnitude, kurtosis and share of energy of every channel, layer by layer.

        kind: "keys", "values", "activations" (the residual stream before each layer) or "weights". recipe: under its
        weight methods, whose layers count as the weights they stand for; its other methods change nothing here.
        """
        weights = _weights(_methods(recipe, budget, parameters))
        return outliers.outliers(self.readings, kind, weights, progress=progress)

    # -- keeping

    def restore(self, trace: Trace, runs: Sequence[Run]) -> None:
        """Take over a trace and the runs on it, as `load` does."""
        self.readings.restore(trace, [run.memory.without("read") for run in runs])
        self.runs = list(runs)

    def save(self, path: str | Path) -> Path:
        """Write the prompt, its trace and the record of all runs into a folder (safetensors and JSON)."""
        from workbench.storage.sessions import save

        if self.trace is not None:
            self.trace.need_recording()
        return save(arguments.path("path", path), self.readings, self.runs, source=self.source, seed=self.seed)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Self:
        """Open what `save` wrote; the model is loaded from where it came from, or given as `model=`.

        A folder that `export` wrote opens as a new session with that model, as `Session(path)` does.
        """
        from workbench.export.model import is_exported
        from workbench.storage.sessions import opened

        folder = arguments.path("path", path)
        if is_exported(folder):
            return cls(folder, **options)
        with opened(folder) as saved:
            session = saved.on_its_model(cls, options)
            trace, runs = saved.contents(session.readings)
            if trace is not None:
                session.restore(trace, runs)
        return session


def _recipe(spec: Spec | None, budget: BudgetLike | None, parameters: dict[str, Any]) -> Recipe:
    """The recipe that is looked at: the full cache where none is named."""
    return Recipe.of("full" if spec is None else spec, budget=budget, **parameters)


def _methods(spec: Spec | None, budget: BudgetLike | None, parameters: dict[str, Any]) -> tuple[Method, ...]:
    """The methods of a recipe; none where none is named."""
    return () if spec is None else Recipe.of(spec, budget=budget, **parameters).methods


def _weights(methods: Iterable[Method]) -> tuple[Method, ...]:
    return tuple(method for method in methods if method.family == "weights")


def _loaded(
    model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin | None] | LoadedModel,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    progress: Progress | None,
    device_map: DeviceMap | None,
    max_memory: Mapping[int | str, int | str] | None,
) -> LoadedModel:
    from transformers import PreTrainedModel

    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        from workbench.export.model import is_exported
        from workbench.export.model import load as load_exported

        if device_map is None and max_memory is None:
            loading = load_exported if is_exported(model) else load
            return loading(model, device=device, dtype=dtype, progress=progress)
        if is_exported(model):
            raise NotApplicable(
                f"{model}: a folder in the workbench's own format is loaded onto one device; leave device_map out"
            )
        return load(model, device, dtype, progress, device_map=device_map, max_memory=max_memory)
    if device_map is not None or max_memory is not None:
        raise BadParameter("device_map is for a model given by name; dispatch a model object before you give it")
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], PreTrainedModel):
        network, given = model
        check_data(network)
        if (device is not None or dtype is not None) and len(devices_of(network)) > 1:
            raise BadParameter("the model lies on several devices: leave device and dtype out")
        if device is not None:
            nn.Module.to(network, device_for(device))
        if dtype is not None:
            nn.Module.to(network, dtype_for(dtype, network.device))
        known = facts(network)
        processor: Any = given if is_processor(given) else None
        tokenizer: Any = given if processor is None else tokenizer_of(processor)
        return LoadedModel(network.eval(), tokenizer, known.name, known, processor)
    raise ModelNotFound("a model is a name, a hub id, a folder, or a pair (model, tokenizer, processor or None)")


def _kv_dtype(dtype: str | torch.dtype | None, model: Facts) -> torch.dtype:
    if dtype is None:
        checkpoint = model.checkpoint_dtype
        return checkpoint if checkpoint in (torch.float16, torch.bfloat16) else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if name not in _KV_DTYPES:
        raise BadParameter(f"kv_dtype {dtype!r} is not one of {', '.join(_KV_DTYPES)}")
    return _KV_DTYPES[name]
