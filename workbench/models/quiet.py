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


class _Silence:
    """How many want silence now; the first of them silences, the last restores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._wanted == 0:
                self._undo.enter_context(_silenced())
            self._wanted += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                self._undo.close()


_SILENCE = _Silence()  # the settings belong to the process, and so does the count of those who changed them


@contextlib.contextmanager
def quiet(stderr: bool = False) -> Iterator[None]:
    """Within the block transformers shows no bars and no warnings; afterwards everything is as it was.

    The settings belong to the process, so they are counted: with several loads at once the first silences and the last
    restores. `stderr=True` also swallows what is written to `sys.stderr`, for bars that have no switch.
    """
    with _SILENCE, contextlib.redirect_stderr(io.StringIO()) if stderr else contextlib.nullcontext():
        yield


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
