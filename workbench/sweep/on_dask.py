"""Sweeps on the workers of a Dask cluster, wherever that runs.

The driver hands out pieces of work, one to a worker at a time, so that a worker keeps the model it holds and never
holds two. Rows come back one by one and are stored by the driver alone: workers need no common disk. What a worker was
at when it died is given to another.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from distributed import Client

from workbench.errors import Cancelled, InputError, WorkbenchError
from workbench.progress import Progress
from workbench.results import Results
from workbench.results.schema import COLUMNS, Row
from workbench.sweep.dask_worker import SweepPlugin, measured, named_keys, stop
from workbench.sweep.grid import Grid, Item, ModelSpec
from workbench.sweep.placement import check_fits, check_sendable, choose, needed_nbytes
from workbench.sweep.tally import Tally, check_loaded

_LOOK_S = 0.2  # between looks at what has come
_DEATHS = 3  # of workers at the same row, after which it is given up
_PATIENCE_S = 60.0  # without any worker
_DIED = "the worker died; is its memory too small?"


@dataclass
class Piece:
    """Work for one worker: items to be measured with a model, or, before anything is known, to be named."""

    model: ModelSpec
    items: tuple[Item, ...]
    keys: tuple[str, ...] = ()

    @property
    def naming(self) -> bool:
        return not self.keys


@dataclass
class _Given:
    piece: Piece
    future: Any


def on_dask(grid: Grid, into: Results, known: frozenset[str], progress: Progress, executor: Any) -> None:
    """Measure a grid on a cluster. Raises as `sweep` does; WorkbenchError where the cluster is lost."""
    check_sendable(grid.models)
    with _client(executor) as client:
        plugin = SweepPlugin(f"workbench-sweep-{uuid4().hex[:12]}", grid.options)
        arrived: queue.SimpleQueue[Row] = queue.SimpleQueue()
        try:
            client.register_plugin(plugin, name=plugin.name)
            client.subscribe_topic(plugin.name, lambda event: arrived.put(_row_of(event)))
            _Driver(grid, into, known, progress, client, plugin.name, arrived).run()
        finally:
            with suppress(Exception):  # of a cluster that is lost in between nothing is left to put right
                if client.status == "running":
                    client.unsubscribe_topic(plugin.name)
                    client.unregister_worker_plugin(plugin.name)


def _row_of(event: tuple[float, dict[str, Any]]) -> Row:
    """The row that a worker told; Dask adds which worker that was."""
    return {name: value for name, value in event[1].items() if name in COLUMNS}


@contextmanager
def _client(executor: Any) -> Iterator[Any]:
    """The client that was given, or one for an address, closed afterwards."""
    if isinstance(executor, Client):
        yield executor
        return
    if not isinstance(executor, str):
        raise InputError("executor is a Dask client, the address of a scheduler ('tcp://host:8786'), or None")
    try:
        client = Client(executor, timeout=20)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"no Dask scheduler answers at {executor}: {error}") from error
    try:
        yield client
    finally:
        client.close(timeout=2)


class _Driver:
    """One sweep on one cluster, from the first piece to the last row."""

    def __init__(
        self,
        grid: Grid,
        into: Results,
        known: frozenset[str],
        progress: Progress,
        client: Any,
        plugin: str,
        arrived: queue.SimpleQueue[Row],
    ) -> None:
        self.grid, self.into, self.known = grid, into, known
        self.progress, self.client, self.plugin, self.arrived = progress, client, plugin, arrived
        self.waiting: dict[ModelSpec, deque[Piece]] = {model: deque() for model in grid.models}
        self.needed = {model: needed_nbytes(model) for model in grid.models}
        self.given: dict[str, _Given] = {}  # by the worker's address
        self.held: dict[str, ModelSpec] = {}
        self.deaths: Counter[Any] = Counter()
        self.stored: set[str] = set()
        self.refused: dict[ModelSpec, WorkbenchError] = {}
        self.tally = Tally(progress, grid.total)
        self.seen_at = time.monotonic()  # when there was a worker

    def run(self) -> None:
        for model in self.grid.models:
            self.waiting[model].append(Piece(model, self.grid.items))
        try:
            while self.given or any(self.waiting.values()):
                self.progress.check()
                workers = self._workers()
                check_fits(self.needed, [worker["memory_limit"] for worker in workers.values()])
                self._bury(workers)
                self._hand_out(workers)
                self._take(_LOOK_S)
                self._finish()
        except BaseException:
            self._stop()
            raise
        check_loaded(self.grid, self.refused)

    def _workers(self) -> dict[str, Any]:
        if self.client.status != "running":
            raise WorkbenchError("the Dask scheduler is gone; rows so far are kept: run the same again to go on")
        workers = dict(self.client.scheduler_info(n_workers=-1)["workers"])
        if workers:
            self.seen_at = time.monotonic()
        elif time.monotonic() - self.seen_at > _PATIENCE_S:
            raise WorkbenchError(f"the cluster has had no worker for {_PATIENCE_S:.0f} s; rows so far are kept")
        return workers

    def _hand_out(self, workers: dict[str, Any]) -> None:
        ranks = _ranks(workers)
        for address, worker in workers.items():
            if address in self.given:
                continue
            waiting = {model: len(pieces) for model, pieces in self.waiting.items()}
            serving = Counter(given.piece.model for given in self.given.values())
            model = choose(waiting, self.held.get(address), serving, self.needed, worker["memory_limit"])
            if model is None:
                continue
            piece = self.waiting[model].popleft()
            self.held[address] = model
            work = named_keys if piece.naming else measured
            future = self.client.submit(
                work, self.plugin, model, piece.items, ranks[address], workers=[address], pure=False, retries=0
            )
            self.given[address] = _Given(piece, future)

    def _take(self, wait_s: float) -> None:
        """Store the rows that have come; wait for the first so long."""
        rows: list[Row] = []
        try:
            rows.append(self.arrived.get(timeout=wait_s))
            while True:
                rows.append(self.arrived.get_nowait())
        except queue.Empty:
            self._store(rows)

    def _store(self, rows: list[Row]) -> None:
        fresh = list({row["key"]: row for row in rows if row["key"] not in self.stored}.values())
        self.into.add(fresh)
        self.stored.update(row["key"] for row in fresh)
        if fresh:
            self.tally.tell(len(fresh))

    def _finish(self) -> None:
        """Take back pieces that are done."""
        for address, given in list(self.given.items()):
            if not given.future.done():
                continue
            del self.given[address]
            if given.future.status != "finished":  # the worker died, or the cluster let go of it
                self._again(given.piece, _reason(given.future))
            elif given.piece.naming:
                self._named(given.piece, given.future.result())
            else:
                self._store(given.future.result())

    def _named(self, piece: Piece, keys: list[str] | WorkbenchError) -> None:
        """Cut what is missing of a model's rows into pieces."""
        if isinstance(keys, WorkbenchError):
            self.refused[piece.model] = keys
            self.tally.total -= len(piece.items)
            return
        by_item = {item: key for item, key in zip(piece.items, keys, strict=True) if key not in self.known}
        self.tally.total -= len(piece.items) - len(by_item)
        self.tally.tell(0)
        for items in self.grid.units(list(by_item), max(1, len(self._workers()))):
            self.waiting[piece.model].append(Piece(piece.model, items, tuple(by_item[item] for item in items)))

    def _bury(self, workers: dict[str, Any]) -> None:
        """Give the work of workers that are gone to others."""
        for address in set(self.given) - set(workers):
            given = self.given.pop(address)
            self._take(0.0)
            given.future.cancel()
            self._again(given.piece, _DIED)
        for address in set(self.held) - set(workers):
            del self.held[address]

    def _again(self, piece: Piece, why: str) -> None:
        """What is left of a piece, once more; the row that was being measured is given up at the third time."""
        left = [(item, key) for item, key in zip(piece.items, piece.keys, strict=False) if key not in self.stored]
        if not piece.naming and not left:
            return
        culprit = piece.model if piece.naming else left[0][1]
        self.deaths[culprit] += 1
        if self.deaths[culprit] >= _DEATHS:
            told = f"given up after {_DEATHS} attempts: {why}"
            if piece.naming:
                self.refused[piece.model] = WorkbenchError(told)
                self.tally.total -= len(piece.items)
                return
            item, key = left.pop(0)
            self._store([_failed(piece.model, item, key, told, self.grid.options.study)])
        if piece.naming:
            self.waiting[piece.model].appendleft(piece)
        elif left:
            items, keys = zip(*left, strict=True)
            self.waiting[piece.model].appendleft(Piece(piece.model, items, keys))

    def _stop(self) -> None:
        """Tell workers to stop, and store what still comes."""
        with suppress(Exception):  # the cluster may be what is wrong
            if self.client.status == "running":
                self.client.run(stop, self.plugin)
                self._take(_LOOK_S)
                self.client.cancel([given.future for given in self.given.values()])
        with suppress(Cancelled, WorkbenchError):
            self._take(0.0)


def _ranks(workers: dict[str, Any]) -> dict[str, int]:
    """The number of each worker among those of its machine."""
    seen: Counter[str] = Counter()
    ranks = {}
    for address in sorted(workers):
        host = str(workers[address]["host"])
        ranks[address] = seen[host]
        seen[host] += 1
    return ranks


def _reason(future: Any) -> str:
    error = future.exception() if future.status == "error" else None
    return _DIED if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"


def _failed(model: ModelSpec, item: Item, key: str, why: str, study: str | None) -> Row:
    """The row of an item that no worker survived."""
    task = item.task
    return {
        "key": key,
        "status": "failed",
        "error": why,
        "study": study,
        "model": model.name,
        "recipe": item.recipe.label,
        "recipe_json": item.recipe.to_dict(),
        "task": task.label,
        "task_json": {"task": task.key, **task.model_dump(mode="json")},
        "case_number": task.seed + item.number,
    }
