"""What runs on the workers of a cluster: one model a worker, and rows that leave as soon as they are there."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import torch
from distributed import WorkerPlugin, get_worker

from workbench.errors import Cancelled, WorkbenchError
from workbench.progress import Progress
from workbench.results.schema import Row, checked
from workbench.sweep.grid import Item, ModelSpec, Options
from workbench.sweep.measuring import Workplace, computing_on, keys_of, measure
from workbench.sweep.placement import pinned


class SweepPlugin(WorkerPlugin):
    """A worker's workplace, for as long as a sweep lasts; Dask knows it by `name`."""

    def __init__(self, name: str, options: Options) -> None:
        self.name = name
        self.options = options

    def setup(self, worker: Any) -> None:
        self.worker = worker
        self.workplace: Workplace | None = Workplace(self.options)
        self.progress = Progress()
        self.one_at_a_time = threading.Lock()  # workers with several threads still hold one model

    def teardown(self, worker: Any) -> None:
        self.progress.cancel()
        self.workplace = None


def named_keys(plugin: str, model: ModelSpec, items: tuple[Item, ...], rank: int) -> list[str] | WorkbenchError:
    """The keys of the rows that items will be, or why the model cannot be loaded."""
    here = _plugin(plugin)
    with here.one_at_a_time:
        try:
            return keys_of(_workplace(here).bench(_here(model, rank), here.progress), items)
        except WorkbenchError as error:
            return WorkbenchError(str(error)) if isinstance(error, Cancelled) else error


def measured(plugin: str, model: ModelSpec, items: tuple[Item, ...], rank: int) -> list[Row]:
    """The rows of items; each is also told under the plugin's name as soon as it is there. Fewer where cancelled."""
    here = _plugin(plugin)
    rows: list[Row] = []

    def give(row: Row) -> None:
        rows.append(row)
        here.worker.log_event(here.name, checked(row))

    # Where it was cancelled, what was measured is what there is.
    with here.one_at_a_time, computing_on(here.options.threads), suppress(Cancelled):
        measure(_workplace(here).bench(_here(model, rank), here.progress), items, give, here.progress)
    return rows


def stop(plugin: str, dask_worker: Any = None) -> None:
    """Cancel what a worker does for a sweep. Dask runs it beside the work, and gives the worker."""
    found = dask_worker.plugins.get(plugin)
    if found is not None:
        found.progress.cancel()


def _plugin(name: str) -> SweepPlugin:
    return cast("SweepPlugin", get_worker().plugins[name])


def _workplace(plugin: SweepPlugin) -> Workplace:
    if plugin.workplace is None:
        raise Cancelled("the sweep has ended")
    return plugin.workplace


def _here(model: ModelSpec, rank: int) -> ModelSpec:
    return replace(model, device=pinned(model.device, rank, torch.cuda.device_count()))
