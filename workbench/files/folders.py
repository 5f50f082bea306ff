"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from workbench.errors import InputError, WorkbenchError
from workbench.files.paths import place
from workbench.formatting import quoted


def located(folder: str | Path) -> Path:
    """A folder as an absolute path, ~ written out. Raises InputError for a path that no system takes."""
    try:
        found = place(folder).absolute()
        os.fsencode(found)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{quoted(str(folder), 200)} is no path: {getattr(error, 'strerror', None) or error}"
        ) from error
    return found


@contextmanager
def whole(folder: Path, ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """A folder beside `folder`, to be filled; it takes that place when the block ends, and goes if the block fails.

    What is there already is replaced where it is empty or `ours`; InputError otherwise, which says that it is not
    `what` ("a saved session"). folder: absolute.
    """
    _check(folder, ours, what)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror or error}") from error
    try:
        yield work
        _put(work, folder)
    except (OSError, SafetensorError) as error:
        raise WorkbenchError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(folder: Path, ours: Callable[[Path], bool], what: str) -> None:
    try:
        if not folder.exists():
            return
        replaceable = folder.is_dir() and (not any(folder.iterdir()) or ours(folder))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not replaceable:
        raise InputError(f"{folder} exists and is not {what}: choose another folder, nothing was overwritten")


def _put(work: Path, folder: Path) -> None:
    """Move the finished folder to its place; what was there before comes back if that fails."""
    if not folder.exists():
        work.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
    folder.rename(aside / folder.name)
    try:
        work.rename(folder)
    except OSError:
        (aside / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
