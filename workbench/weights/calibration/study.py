"""What calibration tells about a model: measured once, block by block, and kept for every method and budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from workbench.core.memo import Memo
from workbench.engine.attention_hook import exclusive
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of
from workbench.progress import Progress
from workbench.weights.calibration.block_runner import BlockRunner
from workbench.weights.calibration.fisher import FisherInformation, fisher_information
from workbench.weights.calibration.hessian import FIRST, InputObserver, InputStats
from workbench.weights.calibration.statistics_cache import StatisticsCache, StatisticsWriter, similarity_in
from workbench.weights.calibration.texts import Calibration, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

KEPT = 4 << 30  # bytes of statistics that are written down; beyond, blocks are run again each time they are asked for


class WeightStudy:
    """A model's layers over calibration texts.

    Everything is measured when it is first asked for. Statistics of inputs are accumulated in one pass and, up to 4
    GiB, written to the cache folder under the model's and the texts' fingerprints: the next session reads them there.
    With `persistent=False` (a model that is compressed already) they live in a temporary folder that goes with this
    object; so they do where the cache folder cannot be written to, which `notes` then say. What is damaged is measured
    again. Inputs are those of the model as it is, unless a copy is named behind whose compressed blocks they are taken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        calibration: Calibration | None = None,
        *,
        persistent: bool = False,
    ) -> None:
        self.model = model
        self.calibration = calibration or Calibration()
        self._tokenizer = tokenizer
        self._cache = StatisticsCache(persistent=persistent)
        self._memo = Memo()
        self._similarity: Tensor | None = None  # of the last pass

    def __repr__(self) -> str:
        return f"<WeightStudy of {len(self.blocks)} layers over {self.calibration}>"

    @cached_property
    def ids(self) -> Tensor:
        """The calibration texts, int64 [t, n], on the CPU."""
        return self.calibration.ids(self.model, self._tokenizer)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The decoder's layers by name, in order."""
        return decoder_layers(self.model)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run's record has to say: that statistics could not be kept, and why."""
        return tuple(self._cache.notes)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was first called for this key; for what all budgets of a method share."""
        return self._memo.once(key, make)

    def block_runner(self) -> BlockRunner:
        """The texts before the first block, to be run through block after block."""
        with exclusive(self.model):
            return BlockRunner(self.model, self.ids)

    # -- inputs

    def inputs(
        self, *, hessians: bool, progress: Progress | None = None, behind: PreTrainedModel | None = None
    ) -> Iterator[tuple[str, dict[str, InputStats]]]:
        """Block after block: its name, and what enters each of its linear layers, by the layer's full name.

        hessians: with Hessians [i, i]. Only one block's statistics are in memory at a time. behind: a copy of the model
        that is being compressed block by block: each block is shown what the copy's blocks before it make of the texts,
        as they are once the next is asked for. Nothing is kept then, for it holds for this copy alone.
        """
        progress = progress or Progress()
        if behind is not None:
            yield from self._behind(behind, hessians, progress)
            return
        for name in (self._cache_name(hessians), self._cache_name(True)):  # Hessians come with all the rest
            folder = self._cache.folder(name)
            if folder is not None and similarity_in(folder, len(self.blocks)) is not None:
                for index, (block, module) in enumerate(self.blocks.items()):
                    progress.check()
                    stats = self._cache.read(folder, index, _linears(module, block))
                    if stats is None:  # damaged, or another process is replacing it
                        yield from self._from(index, hessians, progress)
                        return
                    yield block, stats
                return
        yield from self._from(0, hessians, progress)

    def _from(self, first: int, hessians: bool, progress: Progress) -> Iterator[tuple[str, dict[str, InputStats]]]:
        """Accumulate all of it, and yield that of the block of this number and those behind it."""
        for index, pair in enumerate(self._accumulate(hessians, progress)):
            if index >= first:
                yield pair

    def _accumulate(self, hessians: bool, progress: Progress) -> Iterator[tuple[str, dict[str, InputStats]]]:
        similarities: list[float] = []
        with StatisticsWriter(self._cache, self._cache_name(hessians), len(self.blocks)) as writer:
            runner = self.block_runner()
            for name, _ in progress.track(runner, "calibrating", len(self.blocks)):
                linears = _linears(self.blocks[name], name)
                observer = InputObserver(hessians=hessians)
                alike, tokens = 0.0, 0
                called = {full: self.model.get_submodule(full) for full in linears}
                with exclusive(self.model), observer.observing(called):
                    for entered, left in runner.run(name):
                        progress.check()
                        cosines = nn.functional.cosine_similarity(entered.float(), left.float(), dim=-1)
                        alike, tokens = alike + float(cosines.sum()), tokens + cosines.numel()
                similarities.append(alike / tokens)
                stats = observer.stats(linears)
                writer.write(stats)
                yield name, stats
            self._similarity = torch.tensor(similarities)
            writer.finish(self._similarity)

    def _behind(
        self, twin: PreTrainedModel, hessians: bool, progress: Progress
    ) -> Iterator[tuple[str, dict[str, InputStats]]]:
        runner = self.block_runner()
        hidden = runner.hidden
        for name, _ in progress.track(runner, "calibrating", len(self.blocks)):
            block = twin.get_submodule(name)
            linears = _linears(block, name)
            observer = InputObserver(hessians=hessians)
            with exclusive(twin), observer.observing({full: twin.get_submodule(full) for full in linears}):
                runner.forward(name, hidden, block)
            yield name, observer.stats(linears)
            with exclusive(twin):
                hidden = runner.forward(name, hidden, twin.get_submodule(name))

    def similarity(self, progress: Progress | None = None) -> Tensor:
        """For each block the mean cosine between what enters and leaves it, float32 [l]: near 1, it does little."""

        def measure() -> Tensor:
            for hessians in (False, True):
                folder = self._cache.folder(self._cache_name(hessians))
                stored = None if folder is None else similarity_in(folder, len(self.blocks))
                if stored is not None:
                    return stored
            for _ in self.inputs(hessians=False, progress=progress):
                pass
            assert self._similarity is not None
            return self._similarity

        return self.once("similarity of blocks", measure)

    def _cache_name(self, hessians: bool) -> str | None:
        """Under which name the statistics are kept; None where there is too much of them."""
        if self._nbytes(hessians) > KEPT:
            return None
        kind = f"moments-{FIRST}" if hessians else "channels"  # as caches of earlier versions are called
        return f"{self.fingerprint}-{key_of(self.ids)}-{kind}"

    def _nbytes(self, hessians: bool) -> int:
        """An upper bound of the statistics' bytes: as if no two layers shared an input."""
        linears = [x for name, block in self.blocks.items() for x in _linears(block, name).values()]
        return sum(4 * x.in_features * (x.in_features if hessians else 4) for x in linears)

    # -- gradients

    def gradients(self, progress: Progress | None = None) -> dict[str, FisherInformation]:
        """The Fisher information of every linear layer of the blocks, by its full name; one pass back through the model
        for each text, at most 256 tokens of it.
        """
        linears = {key: value for name, block in self.blocks.items() for key, value in _linears(block, name).items()}
        measure = partial(fisher_information, self.model, linears, self.ids[:, :256], progress or Progress())
        return self.once("gradients", measure)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model's weights from others: a hash of some values of each."""
        digest = hashlib.sha256()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            flat = tensor.detach().reshape(-1)
            at = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64).long()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(flat[at.to(flat.device)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The plain linear layers of a block, by their full names; Conv1D ones as `linear_of` sees them."""
    linears = {f"{prefix}.{name}": linear_of(module) for name, module in block.named_modules()}
    return {name: linear for name, linear in linears.items() if linear is not None}
