"""What a method is given that reads the prompt in bounded memory, and what it returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.core.bisection import largest
from workbench.errors import BudgetTooSmall, NotApplicable, PromptTooLong
from workbench.kv.stores import ChunkStore, DenseStore, SlidingStore, Store
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, stored_nbytes
from workbench.models import max_positions
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.trace import LayerTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called at each layer with its index and the queries [h, q, d], keys [k, q, d] and values [k, q, dv] just read."""


@dataclass(frozen=True)
class PrefillResult:
    """What a prefill left: a store for each layer, the logits [v] after the last token, and where the next one stands.

    format: how entries are stored, for its tiers. tiers: where each position of the prompt lies, uint8 [l, k, n];
    None: what the stores say. notes: what a reader of the run should know.
    """

    stores: list[Store]
    logits: Tensor
    position: int
    format: Format
    tiers: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class ChunkedPrefill(ABC):
    """A prompt to be read, what the method may use for it, and what it has read so far.

    layers: shape and place of each layer, without data; exact: those that may not be compressed. dtype: of the caches.
    limit: the bytes that all caches together may take on the device at any moment, None where nothing limits them.
    question: the ids [q] that will be asked, where they are known. label: the method, as messages name it. stores: the
    caches; they begin empty. position: where the next token stands. logits: after the last one, [v].
    """

    model: PreTrainedModel
    device: torch.device
    prompt: Prompt
    layers: tuple[LayerTrace, ...]
    exact: frozenset[int]
    dtype: torch.dtype
    limit: int | None
    question: Tensor | None
    progress: Progress
    label: str
    stores: list[Store] = field(init=False)
    position: int = field(init=False, default=0)
    logits: Tensor = field(init=False, default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.stores = [self.empty(layer) for layer in self.layers]

    # -- running the model

    @abstractmethod
    def feed(
        self,
        ids: Tensor,
        observer: Observer | None = None,
        stores: Sequence[Store] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Let the model read ids [p] as the next tokens: they enter the stores. Returns its logits [v] after them.

        stores: instead of the prefill's own. observer: sees what each layer read. positions: where the tokens stand,
        int64 [p] ascending (see `reset`), by default from `position` on. Raises PromptTooLong beyond the model's
        positions, unless every store limits the distances that it attends at.
        """

    @abstractmethod
    def feed_below(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Let only the layers below `layer` read ids [p] as the next tokens; their stores take them.

        Returns the queries [h, p, d] and keys [k, p, d] that this layer would attend with; there the pass stops.
        """

    @abstractmethod
    def probe(self, ids: Tensor, score: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Let the model read ids [q] after what is held without keeping them.

        score: called at each compressible layer with its index and the attention that each entry gets from them,
        float32 [k, g, q, m] by slot, to make of it what is returned, one for each compressible layer.
        """

    # -- the prompt

    def need_text(self) -> None:
        """Raise NotApplicable for a prompt with images, in the name of a method that moves or compares its tokens."""
        if self.prompt.images is not None:
            raise NotApplicable(f"{self.label} moves or compares pieces of a text, which images are not")

    @property
    def ids(self) -> Tensor:
        """The prompt, int64 [n]."""
        return self.prompt.ids

    @property
    def tokens(self) -> int:
        """The length of the prompt."""
        return int(self.ids.numel())

    def pieces(self, most: int) -> Iterator[Tensor]:
        """The prompt in pieces [p] of at most `most` tokens; progress is reported and cancelling noticed."""
        for start in range(0, self.tokens, most):
            self.progress.update(f"reading for {self.label}", start, self.tokens)
            yield self.ids[start : start + most]
        self.progress.update(f"reading for {self.label}", self.tokens, self.tokens)

    def feed_prompt(self, most: int) -> None:
        """Let the model read the whole prompt, at most `most` tokens at a time."""
        for piece in self.pieces(most):
            self.feed(piece)

    def read_only(self, where: Tensor, most: int, *, closed_up: bool = False) -> None:
        """Forget all that was read, and read only the tokens at `where` int64 [m] ascending, `most` at a time.

        closed_up: they stand one after another from position 0 on, instead of where they stand in the prompt.
        """
        self.reset()
        stand = torch.arange(where.numel()) if closed_up else where
        for piece, positions in zip(where.split(most), stand.split(most), strict=True):
            self.progress.update(f"reading again for {self.label}", int(piece[0]), self.tokens)
            self.feed(self.ids[piece], positions=positions)
        self.progress.update(f"reading again for {self.label}", self.tokens, self.tokens)

    @property
    def max_positions(self) -> int:
        """How many positions the model has."""
        return max_positions(self.model)

    def check_positions(self, end: int) -> None:
        """Raise PromptTooLong if the model does not have the positions before `end`."""
        if end > self.max_positions:
            raise PromptTooLong(
                f"{self.label} reads at true positions, up to {end:,} here, but the model has only "
                f"{self.max_positions:,}; shorten the text"
            )

    # -- the caches

    @property
    def compressible(self) -> tuple[LayerTrace, ...]:
        """The layers that may be compressed; the others keep a store of their own, which needs no attention."""
        return tuple(layer for layer in self.layers if layer.index not in self.exact)

    @property
    def widest_window(self) -> int:
        """The widest window or chunk of the layers that stay exact; 0 where there is none."""
        return max((layer.bound or 0 for layer in self.layers if layer.index in self.exact), default=0)

    def shape(self, layer: LayerTrace) -> Shape:
        """The size of a layer's uncompressed cache."""
        widths = layer.keys_held.shape[-1], layer.values_held.shape[-1]
        return Shape(layer.kv_heads, self.tokens, *widths, self.dtype.itemsize, layer.index, layer.image_span)

    def empty(self, layer: LayerTrace, *, scattered: bool = False) -> Store:
        """A store that holds nothing yet: plain, or a window where the layer slides.

        scattered: for tokens that do not all follow one another from position 0 on.
        """
        widths = layer.keys_held.shape[-1], layer.values_held.shape[-1]
        keys, values = (torch.empty(layer.kv_heads, 0, w, dtype=self.dtype, device=layer.device) for w in widths)
        if layer.index in self.exact and layer.chunk is not None:
            return ChunkStore(keys, values, 0, layer.chunk)
        if layer.index in self.exact and layer.window is not None:
            return SlidingStore(keys, values, 0, layer.window)
        everything = keys.new_ones(keys.shape[:2], dtype=torch.bool)
        if scattered:
            return DenseStore.of(keys, values, torch.empty(1, 0, device=layer.device), everything, self.dtype)
        return DenseStore.where(keys, values, everything, self.dtype)

    def reset(self) -> None:
        """Forget all that was read: the next tokens may stand anywhere."""
        self.stores = [self.empty(layer, scattered=True) for layer in self.layers]
        self.position = 0

    def keep(self, layer: int, slots: Tensor) -> None:
        """Keep of a layer's plain store only the entries at which slots bool [k, m] is True."""
        if bool(slots.all()):
            return
        dense = self.stores[layer].contents(self.dtype)
        if dense.valid is not None:
            slots = slots & dense.valid
        self.stores[layer] = DenseStore.of(dense.keys, dense.values, dense.positions, slots, self.dtype)

    def result(
        self, *, tiers: Tensor | None = None, form: Format | None = None, notes: tuple[str, ...] = ()
    ) -> PrefillResult:
        """What there is now, as the end of the prefill."""
        return PrefillResult(self.stores, self.logits, self.position, form or DenseFormat(self.dtype), tiers, notes)

    # -- their bytes

    @property
    def full_nbytes(self) -> int:
        """Bytes of the uncompressed cache of the layers that may be compressed."""
        return sum(self.shape(layer).full_nbytes for layer in self.compressible)

    @property
    def room(self) -> int:
        """The limit, without what exact layers take: what is left for those that may be compressed."""
        assert self.limit is not None
        return self.limit - self._exact_nbytes

    @property
    def _exact_nbytes(self) -> int:
        """What the layers that stay exact take at most."""
        exact = (layer for layer in self.layers if layer.index in self.exact)
        return sum(
            min(layer.bound or self.tokens, self.tokens) * layer.kv_heads * self.shape(layer).entry_nbytes
            for layer in exact
        )

    @property
    def scattered_nbytes(self) -> int:
        """What sliding layers hold besides at most while their positions do not follow one another."""
        exact = (layer for layer in self.layers if layer.index in self.exact)
        return sum(INDEX_BYTES * min(layer.bound or 0, self.tokens) for layer in exact)

    def entries(self, least: int, extra: Callable[[int], int] | None = None) -> int:
        """How many entries each head of each layer may hold at any moment: at least `least`, at most all.

        extra: further bytes over all layers when each head holds so many, for instance of an index. Raises
        BudgetTooSmall where fewer than `least` (or the whole prompt, if it is shorter) fit.
        """
        shapes = [self.shape(layer) for layer in self.compressible]
        form = DenseFormat(self.dtype)

        def nbytes(each: int) -> int:
            if each >= self.tokens:
                return self.full_nbytes
            counts = torch.tensor([[each] * shape.kv_heads for shape in shapes])
            return stored_nbytes(form, shapes, counts) + (extra(each) if extra is not None else 0)

        least = min(least, self.tokens)
        if self.limit is None or not shapes or nbytes(self.tokens) <= self.room:
            return self.tokens
        if nbytes(least) > self.room:
            self.refuse(nbytes(least))
        return largest(lambda each: nbytes(each) <= self.room, least, self.tokens)

    def refuse(self, need: int) -> None:
        """Say that the caches would need `need` bytes besides those of exact layers. Raises BudgetTooSmall."""
        assert self.limit is not None
        full = sum(self.shape(layer.rows).full_nbytes for layer in self.compressible) + self._exact_nbytes
        smallest = math.ceil(min(need + self._exact_nbytes, full) / full * 1e4) / 1e4
        raise BudgetTooSmall(
            f"{self.label}: the budget {self.limit / full:.4g} does not hold what one piece of this prompt needs while "
            f"it is read; the smallest possible is {smallest:.4g}",
            smallest,
        )
