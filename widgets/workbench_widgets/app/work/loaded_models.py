"""The models of one server: each loaded once, in the background, and shared by all tabs."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from workbench.progress import Progress

if TYPE_CHECKING:
    from workbench.models import LoadedModel

_GLANCE_S = 0.1  # how often a waiting tab looks for progress, and whether it was cancelled


@dataclass
class _Loading:
    """One load that any number of tabs wait for."""

    future: Future[LoadedModel] = field(default_factory=Future)
    at: tuple[str, int, int] = ("loading the model", 0, 1)


class LoadedModels:
    """Loaded models by name. The latest stays; an earlier one for as long as some session uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: WeakValueDictionary[str, LoadedModel] = WeakValueDictionary()
        self._loading: dict[str, _Loading] = {}
        self._latest: LoadedModel | None = None

    def warm(self, name: str) -> None:
        """Begin to load a model that will be asked for soon; what goes wrong is told to whoever asks."""
        self._begin(name)

    def get(self, name: str, progress: Progress) -> LoadedModel:
        """The model, once it is there. Raises what loading raises; when cancelled, the loading goes on for others."""
        loading = self._begin(name)
        while True:
            with suppress(TimeoutError):
                return loading.future.result(timeout=_GLANCE_S)
            progress.update(*loading.at)

    def _begin(self, name: str) -> _Loading:
        with self._lock:
            known = self._loaded.get(name)
            if known is not None:
                done = _Loading()
                done.future.set_result(known)
                return done
            if name not in self._loading:
                self._loading[name] = _Loading()
                threading.Thread(target=self._load, args=(name,), name=f"load {name}", daemon=True).start()
            return self._loading[name]

    def _load(self, name: str) -> None:
        loading = self._loading[name]

        def report(stage: str, done: int, total: int) -> None:
            loading.at = ("loading the model" if stage == "load" else stage, done, total)

        try:
            from workbench.models import load

            model = load(name, progress=Progress(report))
        except BaseException as error:  # noqa: BLE001  (whoever waits has to get it, whatever it is)
            with self._lock:
                del self._loading[name]  # the next one who asks tries again
            loading.future.set_exception(error)
        else:
            with self._lock:
                self._loaded[name] = self._latest = model
                del self._loading[name]
            loading.future.set_result(model)
