"""Silence the libraries' own bars and notices while the workbench reports progress itself."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator

# These loggers announce optional binaries that do not fit this machine, at import: nothing the user can act on.
_CHATTY = ("torchao", "torch.utils._pytree")


@contextlib.contextmanager
def quiet(stderr: bool = False) -> Iterator[None]:
    """Within the block transformers shows no bars and no warnings; afterwards everything is as it was.

    The settings belong to the process, so they are counted: with several loads at once the first silences and the last
    restores. `stderr=True` also swallows what is written to `sys.stderr`, for bars that have no switch.
    """
    with _PROCESS.silenced(), contextlib.redirect_stderr(io.StringIO()) if stderr else contextlib.nullcontext():
        yield


class _Process:
    """How many blocks want silence, and what the last of them to end has to undo."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._undo = threading.Lock(), 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        with self._lock:
            if self._blocks == 0:
                self._undo.enter_context(_silenced())
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._undo.close()


_PROCESS = _Process()  # as the settings are the process's, so is the count


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in _CHATTY:
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        from transformers.utils import logging as notices

        undo.callback(notices.set_verbosity, notices.get_verbosity())
        notices.set_verbosity(logging.CRITICAL)
        if notices.is_progress_bar_enabled():
            undo.callback(notices.enable_progress_bar)
            notices.disable_progress_bar()
        yield
