"""The search for a recipe: trials drawn by Optuna, measured on more and more cases, the best of them on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from workbench import arguments
from workbench.budget import BudgetLike
from workbench.errors import BudgetTooSmall, Cancelled, WorkbenchError
from workbench.formatting import mib
from workbench.kv.layerwise import LayerwiseMethod
from workbench.kv.plan import held_shape
from workbench.models import LoadedModel
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import find
from workbench.results import Results
from workbench.results.schema import key_of
from workbench.runtime.planning import study_of
from workbench.search.found import Found, Tried
from workbench.search.goal import Goal
from workbench.search.journal import study_in
from workbench.search.measuring import Candidate, Measuring, Patience, TimeOver
from workbench.search.space import Space, WeightOption, at_sizes, chosen_methods
from workbench.search.standing import layers, promoted, rungs
from workbench.session import Session
from workbench.sweep.bench import Bench
from workbench.sweep.grid import TaskLike, tasks_of
from workbench.weights.base import WeightMethod

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.search.sampler import Levels
    from workbench.trace import Trace

TASKS = ("needle length=512", "multi-key length=512")
_BATCH = 8  # trials that are drawn together
_FINALISTS = 3  # of those that are ahead at the end, measured on all cases
_PAIRED = 2  # methods that choose what stays, each of which is tried with every store
_DRAWING = 0.75  # of the time, after which the rest is for those that are ahead
_LOSSES = 2  # cases on which each layer alone is measured


def search(
    model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | LoadedModel | Session,
    tasks: Sequence[TaskLike] | TaskLike = TASKS,
    *,
    limit: BudgetLike | None = None,
    quality: Mapping[str, float] | None = None,
    memory: str = "total",
    methods: Sequence[str] | None = None,
    cases: int = 4,
    trials: int = 100,
    minutes: float | None = 9.0,
    patience: float = 60.0,
    seed: int = 0,
    results: str | Path | None = None,
    on_front: Callable[[Found], None] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    kv_dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    max_new_tokens: int | None = None,
) -> Found:
    """Find the recipe that serves best within a limit of memory, or the smallest that is good enough.

    model: as `Session` takes it, or a session, whose prompt and runs stay as they are. tasks: by which recipes are
    judged, `cases` of each: tasks, or texts as "needle length=512".

    limit: the most bytes ("200 MiB") that the model and its cache may hold on any case; `memory` says which: "total",
    weights, cache and states wherever they lie; "device", those on the device; "deployed", as total, with plain weights
    at 16 bits; "kv", the cache alone. quality: bounds that a recipe must keep: {"kl": 0.02} (the most, nats a token, on
    average), {"correct": 0.95} (the least share of the answers that the uncompressed model has right), {"top1": 0.9}.
    Without bounds the best recipe is the one with most right answers within the limit, then the least KL; with them the
    smallest. methods: keys of those to choose from, of any family (default: all KV methods, and weight methods that
    take seconds).

    trials: recipes drawn at most. minutes: how long at most (None: until the trials are done). patience: seconds that a
    recipe may take on a case. seed: the same seed draws and finds the same, unless time ends it. results: a folder to
    keep rows and trials in; the same search in the same folder goes on where it ended, and more trials continue it.
    on_front: called with what was found so far whenever a recipe was measured.

    How: methods by themselves first, then what Optuna's multi-objective TPE draws around the best; bits of layers by
    EvoPress's mutation from those whose isolated losses add up to the least. Each recipe is measured on one case of
    each task, a third of those on more, of these a third on all. Raises BudgetTooSmall where nothing could ever fit,
    BadParameter, BadBudget, UnknownMethod, UnknownTask, MissingExtra without Optuna; Cancelled carries what was found
    as `finished`.
    """
    goal = Goal.of(limit, memory, quality)
    wanted = tasks_of(tasks)
    trials = arguments.whole("trials", trials, 1)
    seed = arguments.whole("seed", seed, 0, 2**31 - 1)
    chosen = chosen_methods(methods, host="free" if goal.memory == "device" else "counts")
    taken = [(each, number) for number in range(max(each.count(cases) for each in wanted)) for each in wanted]
    taken = [(each, number) for each, number in taken if number < each.count(cases)]
    folder = TemporaryDirectory(prefix="workbench-search-") if results is None else None
    kept = Results(folder.name if folder is not None else arguments.path("results", results))
    progress = progress or Progress()
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    bench = Bench(_session(model, device, dtype, kv_dtype, progress), chat=chat, max_new_tokens=max_new_tokens)
    asked = {
        "model": bench.fingerprint,
        "cases": [bench.case_hash(*case) for case in taken],
        "goal": [goal.limit, goal.memory, [list(bound) for bound in goal.quality]],
        "methods": None if methods is None else list(methods),
        "seed": seed,
        "settings": [str(bench.session.kv_dtype), str(bench.session.model.dtype), chat, max_new_tokens],
    }
    name = f"search-{key_of(asked)[:12]}"
    bench.study = name
    began = time.monotonic()
    with study_in(kept.path, name) as study:
        found = Found(folder or kept.path, goal, len(taken))

        def show() -> None:
            if on_front is not None:
                found.tried = tuple(work.tried())
                on_front(found)

        measuring = Measuring(bench, kept, taken, patience, Patience(progress, end), show)
        work = _Search(goal, study, measuring, len(wanted), seed, trials, began + _DRAWING * (end - began))
        try:
            found.ended = work.run(chosen)
        except TimeOver:
            found.ended = f"{minutes:g} minutes were over"
        except (Cancelled, KeyboardInterrupt) as stopped:
            found.tried, found.ended = tuple(work.tried()), "it was stopped"
            stopped.finished = found  # type: ignore[union-attr]
            raise
        found.tried = tuple(work.tried())
    return found


@dataclass
class _Search:
    """A search under way. first: cases that every recipe is measured on. drawn_until: when no more trials are drawn."""

    goal: Goal
    study: Study
    measuring: Measuring
    first: int
    seed: int
    trials: int
    drawn_until: float

    def __post_init__(self) -> None:
        self.rungs = rungs(len(self.measuring.cases), self.first)
        self.candidates: dict[int, Candidate] = {}
        self.on: dict[int, int] = {}  # the rung that each was measured on last
        self._levels: Levels | None = None

    def tried(self) -> list[Tried]:
        """What was measured so far, each recipe once."""
        found: dict[Recipe, Tried] = {}
        for number, each in sorted(self.candidates.items()):
            measured = each.measured(self.goal)
            if each.recipe is not None and measured.cases > (
                found[each.recipe].measured.cases if each.recipe in found else 0
            ):
                found[each.recipe] = Tried(number, each.recipe, measured)
        return sorted(found.values(), key=lambda each: each.number)

    def run(self, chosen: Any) -> str:
        """Draw and measure until the trials or the time for drawing are over; returns which."""
        from workbench.search.sampler import Sampler

        plain = Candidate(-1, Recipe.of("full"))
        self.measuring.extend([plain], self.first)
        self.plain = plain.measured(self.goal)
        self.space = self._space(chosen, plain)
        self.study.sampler = Sampler(self.seed, self._known_levels, self.space.bytes_for_cache)
        if not self.study.get_trials(deepcopy=False):
            for parameters in self.space.beginnings():
                self.study.enqueue_trial(parameters)
        self._take_up()
        begun = len(list(self.space.beginnings()))
        while len(self.candidates) < self.trials and time.monotonic() < self.drawn_until:
            if len(self.candidates) >= begun:
                self._pair()
            self._batch()
        if len(self.candidates) >= begun:
            self._pair()
        self._finish()
        return f"{len(self.candidates)} trials were done" if len(self.candidates) >= self.trials else "time for drawing"

    def _pair(self) -> None:
        """Once every method was tried by itself: join those that are ahead with every store. Raises BudgetTooSmall
        where none is within the limit, nor could be.
        """
        if "paired" not in self.study.user_attrs:
            self._check_limit()
            for parameters in self.space.pairs(self._ahead()):
                self.study.enqueue_trial(parameters)
            self.study.set_user_attr("paired", True)

    def _batch(self) -> None:
        """Draw some trials, measure them on the first rung, and promote whoever is ahead on any."""
        number = len(self.candidates) // _BATCH
        drawn = [self._draw(number) for _ in range(min(_BATCH, self.trials - len(self.candidates)))]
        self._measure(drawn)

    def _draw(self, batch: int) -> int:
        trial = self.study.ask()
        recipe = self.space.recipe(trial)
        trial.set_user_attr("batch", batch)
        trial.set_user_attr("recipe", None if recipe is None else recipe.to_dict())
        self.candidates[trial.number] = Candidate(trial.number, recipe)
        return trial.number

    def _measure(self, drawn: Sequence[int]) -> None:
        for number in drawn:
            self.on[number] = 0
        self.measuring.extend([self.candidates[number] for number in drawn], self.rungs[0])
        for rung in range(len(self.rungs) - 1):
            order = self._order(rung)
            rising = promoted(order, self.on, rung)
            self.measuring.extend([self.candidates[number] for number in rising], self.rungs[rung + 1])
            for number in rising:
                self.on[number] = rung + 1
        for number in drawn:
            self._tell(number)

    def _order(self, rung: int, *, fronts: bool = True) -> list[int]:
        """The numbers of recipes that can be run and are measured on a rung, best first: by what serves the goal, in
        turn with those on the fronts of memory, answers and KL. Those beyond the limit are left out where any is
        within it.
        """
        able = [number for number, on in self.on.items() if on >= rung and not self.candidates[number].failed]
        seen = {number: self.candidates[number].measured(self.goal, self.rungs[rung]) for number in able}
        within = [number for number in able if not self.goal.excess(seen[number])] or able
        serving = sorted(within, key=lambda number: (self.goal.place(seen[number]), number))
        if not fronts:
            return serving
        front = dict(zip(serving, layers([seen[number].figures for number in serving]), strict=True))
        ahead = sorted(serving, key=lambda number: front[number])  # stable: on each front in the order of serving
        return list(dict.fromkeys(number for pair in zip(serving, ahead, strict=True) for number in pair))

    def _ahead(self) -> list[str]:
        """The methods that choose what stays whose recipes by themselves are ahead, best first."""
        methods = [
            each.recipe.methods for number in self._order(0, fronts=False) if (each := self.candidates[number]).recipe
        ]
        return list(dict.fromkeys(found[0].key for found in methods if found[0].key in self.space.keep))[:_PAIRED]

    def _tell(self, number: int) -> None:
        measured = self.candidates[number].measured(self.goal)
        trial = self._trial(number)
        if not trial.study.get_trials(deepcopy=False)[number].state.is_finished():
            for name, value in zip(("limit", "quality"), self.goal.constraints(measured), strict=True):
                trial.set_constraint(name, value)
            trial.set_user_attr("place", self.goal.place(measured))
            self.study.tell(number, self.goal.values(measured, self.plain.memory))

    def _trial(self, number: int) -> Trial:
        import optuna

        return optuna.trial.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)  # noqa: SLF001

    def _take_up(self) -> None:
        """Go on with what an earlier run of the same search drew: measure again what it had not told."""
        import optuna

        batches: dict[int, list[FrozenTrial]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state == optuna.trial.TrialState.WAITING:
                continue
            if "recipe" not in trial.user_attrs:  # it was stopped while it was drawn
                if not trial.state.is_finished():
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                continue
            batches.setdefault(trial.user_attrs["batch"], []).append(trial)
        for _, batch in sorted(batches.items()):
            for trial in batch:
                written = trial.user_attrs["recipe"]
                recipe = None if written is None else Recipe.from_dict(written)
                self.candidates[trial.number] = Candidate(trial.number, recipe)
            self._measure([trial.number for trial in batch])

    def _finish(self) -> None:
        """Measure those that are ahead on all cases, so that the best is one of them."""
        last = len(self.rungs) - 1
        for rung in range(last):
            order = self._order(rung, fronts=False)
            ahead = [number for number in order[:_FINALISTS] if self.on[number] == rung]
            self.measuring.extend([self.candidates[number] for number in ahead], self.rungs[last])
            for number in ahead:
                self.on[number] = last

    def _check_limit(self) -> None:
        """Raise BudgetTooSmall where no method by itself is within the limit, nor could be."""
        limit = self.goal.limit
        if limit is None or any(
            each.measured.error is None and not self.goal.excess(each.measured) for each in self.tried()
        ):
            return
        session, sizes = self.measuring.bench.session, []
        option, room = min(zip(self.space.weights, self.space.room, strict=True), key=lambda pair: pair[0].nbytes)
        for key in (*self.space.keep, *self.space.store):
            self.measuring.progress.check()
            try:
                session.plan(key, budget="1 byte")
            except BudgetTooSmall as refusal:
                sizes.append((int(refusal.smallest * self.space.full), key))
            except WorkbenchError:
                continue  # it takes no budget, or not this model: its row said so
        least, key = min(sizes, default=(self.space.full, "full"))
        if room is not None and least > room:
            whole = least if self.goal.memory == "kv" else least + limit - room
            raise BudgetTooSmall(
                f"nothing here fits into {_size(limit)}: the least that any method takes by itself is {_size(whole)}, "
                f"{key}" + ("" if option.method is None else f" with {option.label}"),
                float(whole),
            )

    # -- the space

    def _space(self, chosen: Any, plain: Candidate) -> Space:
        """What there is to choose from, within the limit. Raises BudgetTooSmall where nothing could fit."""
        rows = plain.rows
        full = max(row["kv_full_nbytes"] for row in rows)
        states = max(row["state_nbytes"] for row in rows)
        options = self._weight_options(chosen.weights, rows[0])
        limit, cache_alone = self.goal.limit, self.goal.memory == "kv"
        rooms = [None if limit is None else limit - (0 if cache_alone else each.nbytes + states) for each in options]
        fitting = [(each, room) for each, room in zip(options, rooms, strict=True) if room is None or room > 0]
        if not fitting:
            least = min(options, key=lambda each: each.nbytes)
            raise BudgetTooSmall(
                f"nothing here fits into {_size(limit or 0)}: weights alone take at least "
                f"{_size(least.nbytes + states)}, {least.label}; give a larger limit or methods for smaller weights",
                float(least.nbytes + states),
            )
        return Space(
            chosen.keep,
            chosen.beside,
            chosen.store,
            chosen.attention,
            tuple(each for each, _ in fitting),
            tuple(room for _, room in fitting),
            full,
            len((self.measuring.bench.session.trace or self._read(0)).compressible),
        )

    def _weight_options(self, keys: Sequence[str], plain: Mapping[str, Any]) -> list[WeightOption]:
        """Ways to hold the weights, in the order in which they are tried. What a method makes of them is foretold."""
        session = self.measuring.bench.session
        deployed = self.goal.memory == "deployed"
        live = plain["weight_deployed_nbytes" if deployed else "weight_nbytes"]
        options = [WeightOption(None, live)]
        kinds = [cls for key in keys if issubclass(cls := find(key), WeightMethod)]
        for method in [] if self.goal.memory == "kv" else [each for cls in kinds for each in at_sizes(cls)]:
            survey = method.survey(session.model)
            taken = sum(
                (2 if deployed else x.weight.element_size()) * x.weight.numel() for x in survey.linears.values()
            )
            options.append(WeightOption(method, live - taken + survey.nbytes))
        return options

    def _known_levels(self) -> Levels:
        """What each layer alone loses at each level, the mean over some cases, and its bytes at the largest."""
        from workbench.search.sampler import Levels

        if self._levels is None:
            bench, progress = self.measuring.bench, self.measuring.progress
            method = next(cls() for key in self.space.store if issubclass(cls := find(key), LayerwiseMethod))
            losses, sizes = [], []
            for place in range(min(_LOSSES, len(self.measuring.cases))):
                trace, dtype = self._read(place), bench.session.kv_dtype
                shapes = [held_shape(layer, dtype) for layer in trace.compressible]
                losses.append(method.losses(study_of(trace, bench.session.model, progress), dtype))
                sizes.append(method.sizes(dtype, shapes))
            self._levels = Levels(torch.stack(losses).mean(0), torch.stack(sizes).amax(0))
        return self._levels

    def _read(self, place: int) -> Trace:
        """A case, read by the model as it is."""
        return self.measuring.bench.read(*self.measuring.cases[place], self.measuring.progress)


def _size(nbytes: int) -> str:
    return mib(nbytes) if nbytes >= 2**20 else f"{nbytes:,} bytes"


def _session(model: Any, device: Any, dtype: Any, kv_dtype: Any, progress: Progress) -> Session:
    if isinstance(model, Session):
        return model.beside(kv_dtype=kv_dtype)
    return Session(model, device=device, dtype=dtype, kv_dtype=kv_dtype, progress=progress)
