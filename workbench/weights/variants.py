"""A model under weight methods: compressed copies that share everything they do not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

from torch import Tensor

from workbench import arguments
from workbench.core.memo import Memo
from workbench.measure.memory import tensor_bytes
from workbench.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.registry import Method
    from workbench.weights.calibration.study import WeightStudy
    from workbench.weights.calibration.texts import Calibration

_PATIENCE_S = 0.1  # how often a waiting thread looks whether it was cancelled


class Variants:
    """The plain model and the last compressed one made from it, by the weight methods that made it.

    model: the plain one. tokenizer: of the texts it is calibrated on; None: the model says them itself. calibration:
    which texts; None: those that are the default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.calibration = calibration
        self._made: dict[tuple[Method, ...], PreTrainedModel] = {}
        self._said: dict[tuple[Method, ...], tuple[str, ...]] = {}
        self._nbytes: dict[tuple[Method, ...], int] = {}
        self._studies: dict[tuple[Method, ...], WeightStudy] = {}
        self._measured: dict[tuple[Method, ...], Memo] = {}
        self._lock = RLock()

    def get(self, methods: Sequence[Method], progress: Progress | None = None) -> PreTrainedModel:
        """The model compressed by `methods`, in order; made once, and remembered until another is asked for."""
        key = tuple(methods)
        if not key:
            return self.model
        with self._alone(progress):
            if key not in self._made:
                from workbench.weights.compress import compressed, weight_methods
                from workbench.weights.stages import ordered

                steps = ordered(weight_methods(key))
                self._made = {}  # the last one goes before the next is made: there is never room for two
                self._measured = {known: memo for known, memo in self._measured.items() if not known}
                before = {steps[:number] for number in range(len(steps))}
                self._studies = {known: study for known, study in self._studies.items() if known in before}

                def study(model: PreTrainedModel, number: int) -> WeightStudy:
                    return self._studies.setdefault(steps[:number], self._study(model, plain=not number))

                said: list[str] = []
                self._made = {key: compressed(self.model, steps, progress, study, said.append)}
                self._said = {key: tuple(said)}
            return self._made[key]

    def said(self, methods: Sequence[Method]) -> tuple[str, ...]:
        """One line for each of these methods: what was compressed to which size, and what was left alone."""
        self.get(methods)
        return self._said.get(tuple(methods), ())

    def measured(self, methods: Sequence[Method]) -> Memo:
        """What was measured of the model under `methods`, whatever it read; forgotten with the model."""
        return self._measured.setdefault(tuple(methods), Memo())

    def study(self) -> WeightStudy:
        """Calibration of the plain model: what weight methods know of it."""
        return self._studies.setdefault((), self._study(self.model, plain=True))

    def ids(self, texts: int, tokens: int) -> Tensor:
        """The beginning of the calibration texts, at most `tokens` of each of `texts`: int64 [t, n]."""
        texts, tokens = arguments.whole("texts", texts, low=1), arguments.whole("tokens", tokens, low=1)
        return self.study().ids[:texts, :tokens]

    def _study(self, model: PreTrainedModel, *, plain: bool) -> WeightStudy:
        from workbench.weights.calibration.study import WeightStudy

        return WeightStudy(model, self.tokenizer, self.calibration, persistent=plain)

    def calibrate_on(
        self, source: str | Path | None = None, *, samples: int = 32, tokens: int = 512, seed: int = 0
    ) -> WeightStudy:
        """Choose the texts by where they come from (see `Calibration`), and return the study of the plain model.

        Without a source nothing changes. Raises BadParameter, and InputError for a text that cannot be read.
        """
        from workbench.weights.calibration.texts import SAMPLED, SHIPPED, Calibration

        given = SHIPPED if source is None else str(arguments.path("source", source))
        chosen = Calibration(given, samples, tokens, seed)
        if source is not None:
            if chosen.source != SAMPLED and self.tokenizer is not None:
                chosen.text()  # refused now, and not in the middle of a run
            self.calibrate(chosen)
        return self.study()

    def calibrate(self, calibration: Calibration) -> None:
        """Look at other texts from now on; what was compressed with the earlier ones is forgotten."""
        with self._alone(None):
            self.calibration = calibration
            self._made, self._said, self._nbytes, self._studies = {}, {}, {}, {}
            self._measured = {known: memo for known, memo in self._measured.items() if not known}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run's record has to say of how the models were calibrated."""
        return tuple(dict.fromkeys(note for study in self._studies.values() for note in study.notes))

    def nbytes(self, methods: Sequence[Method]) -> int:
        """Live bytes of the model's weights under `methods`."""
        key = tuple(methods)
        if key not in self._nbytes:
            model = self.get(key)
            self._nbytes[key] = tensor_bytes([*model.parameters(), *model.buffers()])
        return self._nbytes[key]

    def deployed_nbytes(self, methods: Sequence[Method], progress: Progress | None = None) -> int:
        """Bytes of the weights under `methods` as they would be deployed: what was not compressed at 16 bits."""
        model = self.get(methods, progress)
        others = {id(buffer) for buffer in self.model.buffers()}  # rotary frequencies and the like
        made = [buffer for buffer in model.buffers() if id(buffer) not in others]
        return sum(2 * weight.numel() for weight in model.parameters()) + tensor_bytes(made)

    @contextmanager
    def _alone(self, progress: Progress | None) -> Iterator[None]:
        """One thread compresses at a time; whoever waits can still be cancelled."""
        while not self._lock.acquire(timeout=_PATIENCE_S):
            if progress is not None:
                progress.check()
        try:
            yield
        finally:
            self._lock.release()
