"""Which worker gets which model: by what it holds already, and by what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.errors import InputError, ModelNotFound
from workbench.files.paths import place
from workbench.models.catalog import catalogue
from workbench.models.checkpoint import stored, weights_in
from workbench.sweep.grid import ModelSpec

_BESIDE = 1.25  # what a model needs in memory, as a multiple of its weights: the library, a prompt's recording


def needed_nbytes(model: ModelSpec) -> int | None:
    """About what a model takes of a worker's memory; None where that cannot be told here: on a GPU, on other machines.

    Weights at float32, or at 16 bits where such a dtype is asked for, and a quarter more.
    """
    if (model.device or "cpu").partition(":")[0] != "cpu" or not isinstance(model.source, str | Path):
        return None
    name = str(model.source)
    numbers = {entry.name: entry.parameters for entry in catalogue()}.get(name)
    if numbers is None:
        try:
            folder = weights_in(place(name))
            numbers = sum(tensor.elements for tensor in stored(folder).values()) if folder.is_dir() else None
        except (OSError, InputError):
            numbers = None
    width = 4 if model.dtype in (None, "float32") else 2
    return None if numbers is None else int(numbers * width * _BESIDE)


def choose(
    waiting: Mapping[ModelSpec, int],
    held: ModelSpec | None,
    serving: Mapping[ModelSpec, int],
    needed: Mapping[ModelSpec, int | None],
    memory: int | None,
) -> ModelSpec | None:
    """The model whose work an idle worker takes: the one it holds, else the one with the most waiting for each worker.

    waiting: pieces of work by model. serving: workers by the model they hold. memory: of the worker, in bytes (None:
    not bounded).
    """
    able = [model for model, pieces in waiting.items() if pieces and fits(needed[model], memory)]
    if held in able:
        return held
    return max(able, key=lambda model: waiting[model] / (1 + serving.get(model, 0)), default=None)


def fits(needed: int | None, memory: int | None) -> bool:
    """Whether a model fits into a worker, as far as both are known."""
    return needed is None or not memory or needed <= memory


def check_fits(needed: Mapping[ModelSpec, int | None], memories: Sequence[int | None]) -> None:
    """Raise InputError for a model that fits into no worker."""
    for model, nbytes in needed.items():
        if memories and nbytes is not None and not any(fits(nbytes, memory) for memory in memories):
            largest = max(memory or 0 for memory in memories)
            raise InputError(
                f"{model.name} takes about {nbytes / 2**30:.1f} GiB, and the largest worker has {largest / 2**30:.1f} "
                "GiB: start workers with more memory"
            )


def check_sendable(models: Sequence[ModelSpec]) -> None:
    """Raise ModelNotFound for a model that workers cannot load by themselves."""
    for model in models:
        if not isinstance(model.source, str | Path):
            raise ModelNotFound(
                f"{model.name} lies in this process: workers load a model by its name, hub id, or a folder they see"
            )


def pinned(device: str | None, rank: int, gpus: int) -> str | None:
    """The device a worker computes on: what was asked for, else a GPU of its own where it sees several.

    rank: the worker's number among those of its machine. Workers of dask-cuda see one each, which needs nothing here.
    """
    return f"cuda:{rank % gpus}" if device is None and gpus > 1 else device
