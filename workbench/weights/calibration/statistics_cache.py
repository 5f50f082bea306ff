"""Statistics of layers' inputs on disk: in the cache folder, or in a temporary one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.models import cache_dir
from workbench.weights.calibration.hessian import InputStats

_PARTS = {  # what a file calls each field
    "mean": "mean",
    "absmean": "absmean",
    "absmax": "absmax",
    "square": "square",
    "accumulated": "moment",
}
_BLOCKS = "blocks.safetensors"  # written last: a folder without it is not complete


class StatisticsCache:
    """Where statistics are kept: folders by name, each with a file for every block.

    persistent: in the cache folder, where the next session finds them; otherwise, or where that cannot be written to,
    in a temporary folder that goes with this object. notes: what could not be written, and why.
    """

    def __init__(self, *, persistent: bool) -> None:
        self.notes: list[str] = []
        self._persistent = persistent
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._nowhere = False  # whether not even temporary files can be written

    def folder(self, name: str | None) -> Path | None:
        """Where statistics of this name lie, or will; None without a name, or without a place to write to."""
        if name is None or self._nowhere:
            return None
        if self._persistent:
            return cache_dir() / "calibration" / name
        if self._temporary is None:
            try:
                self._temporary = tempfile.TemporaryDirectory(prefix="workbench-calibration-")
            except OSError as error:
                self.fail(error)
                return None
        return Path(self._temporary.name) / name

    def begin(self, name: str | None) -> Path | None:
        """A folder beside that of this name, to be filled; None where nothing can be written."""
        folder = self.folder(name)
        if folder is None:
            return None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gathering-"))
        except OSError as error:
            self.fail(error)
            return self.begin(name)

    def read(self, folder: Path, index: int, linears: Mapping[str, nn.Linear]) -> dict[str, InputStats] | None:
        """What was written of the layers of one block, on their devices; None, and the folder is gone, where it is not
        there, damaged, or of other layers.
        """
        stats = _read(_file(folder, index), linears)
        if stats is None:
            shutil.rmtree(folder, ignore_errors=True)
        return stats

    def fail(self, error: Exception) -> None:
        """Keep what comes from now on in a temporary folder, or, where that failed, not at all."""
        reason = getattr(error, "strerror", None) or error
        if self._persistent:
            self._persistent = False
            self.notes.append(
                f"calibration is not kept for the next session: {cache_dir()} cannot be written to ({reason})"
            )
        else:
            self._nowhere = True
            self.notes.append(
                f"calibration is measured anew for each method: temporary files cannot be written ({reason})"
            )


class StatisticsWriter:
    """Writes the statistics of one block after another, which appear under their name all at once, or not at all."""

    def __init__(self, cache: StatisticsCache, name: str | None, blocks: int) -> None:
        self._cache, self._name, self._blocks = cache, name, blocks
        self._folder: Path | None = None
        self._written = 0

    def __enter__(self) -> Self:
        self._folder = self._cache.begin(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up()

    def write(self, stats: Mapping[str, InputStats]) -> None:
        """Write those of the next block."""
        if self._folder is None:
            return
        try:
            _write(stats, _file(self._folder, self._written))
        except (OSError, SafetensorError) as error:
            self._cache.fail(error)
            self._give_up()
        self._written += 1

    def finish(self, similarity: Tensor) -> None:
        """Move what was written to its place, unless another process was first; similarity: of each block [l]."""
        if self._folder is None or self._name is None:
            return
        target = self._folder.parent / self._name
        try:
            save_file({"similarity": similarity}, self._folder / _BLOCKS)
            if similarity_in(target, self._blocks) is None:
                shutil.rmtree(target, ignore_errors=True)
                self._folder.rename(target)
        except (OSError, SafetensorError) as error:
            if similarity_in(target, self._blocks) is None:
                self._cache.fail(error)

    def _give_up(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def similarity_in(folder: Path, blocks: int) -> Tensor | None:
    """The similarity of that many blocks, which is written last; None where a folder is not complete, or damaged."""
    try:
        with safe_open(folder / _BLOCKS, framework="pt") as file:
            similarity: Tensor = file.get_tensor("similarity")
    except (OSError, SafetensorError):
        return None
    return similarity if similarity.shape == (blocks,) else None


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index}.safetensors"


def _write(stats: Mapping[str, InputStats], path: Path) -> None:
    """Statistics that layers share are written once."""
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    notes: dict[str, str] = {}
    for name, layer in stats.items():
        owner = owners.setdefault(id(layer), name)
        notes[name] = owner
        if owner == name:
            notes[f"{name} tokens"] = str(layer.tokens)
            for field, part in _PARTS.items():
                tensor: Tensor | None = getattr(layer, field)
                if tensor is not None:
                    tensors[f"{name}/{part}"] = tensor.cpu().clone()
    save_file(tensors, path, metadata=notes)


def _read(path: Path, linears: Mapping[str, nn.Linear]) -> dict[str, InputStats] | None:
    """What was written of these layers; None where the file is not there, damaged, or of other layers."""
    owned: dict[str, InputStats] = {}
    try:
        with safe_open(path, framework="pt") as file:
            notes: dict[str, str] = file.metadata()
            present = set(file.keys())
            for name in linears:
                if notes[name] == name:
                    fields = {
                        field: file.get_tensor(f"{name}/{part}")
                        for field, part in _PARTS.items()
                        if field != "accumulated" or f"{name}/{part}" in present
                    }
                    owned[name] = InputStats(int(notes[f"{name} tokens"]), **fields).to(linears[name].weight.device)
            return {name: owned[notes[name]] for name in linears}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
