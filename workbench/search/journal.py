"""The trials of a search on the disk: Optuna's journal, held by one process at a time and good after any end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from workbench.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from optuna.study import Study

OBJECTIVES = 3


@contextmanager
def study_in(folder: Path, name: str) -> Iterator[Study]:
    """A study whose trials lie in `folder`/`name`.journal; one that is there already goes on.

    Raises InputError while another process has it, MissingExtra without Optuna.
    """
    optuna = _optuna()
    verbosity = optuna.logging.get_verbosity()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.journal"
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"this search is running already, in {folder}: stop it first, or choose another folder"
        ) from None
    try:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        _without_half_a_line(file)
        backend = optuna.storages.journal.JournalFileBackend(str(file), lock_obj=_Held())
        storage = optuna.storages.JournalStorage(backend)
        yield optuna.create_study(
            storage=storage, study_name=name, directions=["minimize"] * OBJECTIVES, load_if_exists=True
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


class _Held:
    """Optuna's lock of a journal, where the whole journal is held already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return


def _without_half_a_line(file: Path) -> None:
    """Cut off what a process that was killed had begun to write."""
    if not file.exists():
        return
    with file.open("rb+") as journal:
        content = journal.read()
        if content and not content.endswith(b"\n"):
            journal.truncate(content.rfind(b"\n") + 1)


def _optuna() -> Any:
    """The library. Raises MissingExtra."""
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise MissingExtra("a search needs Optuna: pip install 'inference-workbench[search]'") from None
    return optuna
