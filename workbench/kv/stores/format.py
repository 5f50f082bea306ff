"""How entries will be stored, as data: what it costs in bytes, and how to build it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.mixed import MixedStore
from workbench.kv.stores.packed import WHOLE, PackedStore, packed_length
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace
from workbench_kernels.rows import Axis

INDEX_BYTES = 4  # positions, starts and lengths are int32, the numbers of an eviction state float32
_BALANCE_BYTES = 2  # float16


@dataclass(frozen=True)
class Shape:
    """What the size of a layer's cache depends on: KV heads, positions read, head sizes, bytes of an uncompressed
    number. `images` is from where to where, the end not included, image tokens stand in the prompt. `layer` says whose
    it is; shapes that differ in nothing else are equal.
    """

    kv_heads: int
    tokens: int
    key_width: int
    value_width: int
    itemsize: int
    layer: int = field(default=0, compare=False)
    images: tuple[int, int] | None = None

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one uncompressed entry: one position of one KV head."""
        return (self.key_width + self.value_width) * self.itemsize

    @property
    def full_nbytes(self) -> int:
        """Bytes of the uncompressed layer."""
        return self.kv_heads * self.tokens * self.entry_nbytes


class Format(ABC):
    """A way to store what a method selected. `tiers` names the precisions, best first; a plan numbers them from 1.

    attends_itself: whether its stores attend in a way of their own: keys cannot be turned for them, nor what they
    attend to be chosen. rewritable: whether its stores' entries can be changed. of_rows: whether what it does to rows
    does not depend on their being keys and values that queries meet, so that its stores can hold others (latents).
    exact: whether entries are held as they are.
    """

    tiers: tuple[str, ...]
    attends_itself: ClassVar[bool] = False
    rewritable: ClassVar[bool] = False
    of_rows: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs_all: ClassVar[bool] = False  # cannot be built where positions were dropped

    @property
    def keeps_rest(self) -> bool:
        """Whether what was not selected stays at a lower precision instead of being dropped."""
        return len(self.tiers) > 1

    @abstractmethod
    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        """The bytes that `build` will hold in all layers of this shape when selected [l, k] entries of each are
        selected.
        """

    def kind(self, shape: Shape) -> Hashable:
        """What tells layers of equal shape apart, as far as their bytes go: `nbytes` is asked of each kind at once."""
        return None

    def beside(self, shape: Shape) -> int:
        """Bytes of a layer that `nbytes` counts beside its entries, whatever is selected."""
        return 0

    def host_nbytes(self, shape: Shape, selected: Tensor) -> int:
        """The same for host memory, which no budget limits."""
        return 0

    def of_everything(self) -> Format:
        """The format of a plan that keeps everything: this one, without what only evicting needs."""
        return self

    def droppable(self) -> Format | None:
        """The same format, of whose entries each can leave by itself while decoding; None where they are stored
        together.
        """
        return None

    def layers_with(self, layer: int) -> tuple[int, ...]:
        """The layers, in order, that hold something in common with this one and are built together; itself included."""
        return (layer,)

    def build_together(self, layers: Sequence[LayerTrace], tiers: Sequence[Tensor]) -> list[Store]:
        """The stores of several such layers, under tiers [k, n] each.

        `nbytes` counts what they hold in common at one of them, and each store names its `partner`.
        """
        raise NotImplementedError

    @abstractmethod
    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        """The store of a layer under tiers [k, n] (0 dropped, else number of the tier); state [k, n] or [k, n, w]: the
        eviction state, of methods that evict while decoding.
        """


def stored_nbytes(form: Format, shapes: Sequence[Shape], counts: Tensor, *, host: bool = False) -> int:
    """The bytes of layers of these shapes when counts [l, k] entries are selected; in `host` memory, if asked for."""
    nbytes, counts = (form.host_nbytes if host else form.nbytes), counts.cpu()
    alike: dict[tuple[Shape, Hashable], list[int]] = {}
    for index, shape in enumerate(shapes):
        alike.setdefault((shape, form.kind(shape)), []).append(index)
    return sum(nbytes(shape, counts[layers]) for (shape, _), layers in alike.items())


@dataclass(frozen=True)
class DenseFormat(Format):
    """Every kept entry at `dtype`, with an eviction state of `state` numbers for methods that evict while decoding.

    drops: entries leave while decoding without such a state; their positions are held even where all are kept.
    always: entries leave while decoding also where the plan keeps everything.
    """

    rewritable: ClassVar[bool] = True
    of_rows: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    dtype: torch.dtype
    state: int = 0
    drops: bool = False
    always: bool = False

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (str(self.dtype).removeprefix("torch."),)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        placed = bool(self.state) or self.drops
        partial = selected if placed else selected[(selected < shape.tokens).any(dim=1)]  # these need positions
        entries = int(selected.sum()) * shape.entry_nbytes + int(partial.sum()) * INDEX_BYTES * (1 + self.state)
        return entries + index_nbytes(partial) * (3 + bool(self.state))

    def of_everything(self) -> DenseFormat:
        return self if self.always else DenseFormat(self.dtype)

    def droppable(self) -> DenseFormat:
        return replace(self, state=0, drops=True)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        keep, state = tiers > 0, state if self.state else None
        return DenseStore.where(layer.keys, layer.values, keep, self.dtype, state, positions=self.drops)


@dataclass(frozen=True)
class PackedFormat(Format):
    """Kept entries at `bits` bits in groups of `group`, the last `residual` at `dtype`.

    value_bits: those of the values, if they differ from the keys'. A side at 16 bits is not quantised. drops: entries
    leave while decoding, for which each is quantised by itself and as soon as it has attended; positions are held.
    """

    of_rows: ClassVar[bool] = True

    dtype: torch.dtype
    bits: int
    group: int
    residual: int
    key_axis: Axis = "channel"
    value_bits: int | None = None
    drops: bool = False

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        keys, values = (self._named(bits) for bits in (self.bits, self._value_bits))
        return (keys if keys == values else f"{keys} keys, {values} values",)

    @property
    def _value_bits(self) -> int:
        return self.value_bits or self.bits

    def _named(self, bits: int) -> str:
        return str(self.dtype).removeprefix("torch.") if bits == WHOLE else f"{bits}-bit"

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        partial = selected if self.drops else selected[(selected < shape.tokens).any(dim=1)]  # these need positions
        return (
            self._side(selected, self.bits, shape.key_width, shape.itemsize, self.key_axis)
            + self._side(selected, self._value_bits, shape.value_width, shape.itemsize, "token")
            + int(partial.sum()) * INDEX_BYTES
            + index_nbytes(partial)
        )

    def _side(self, selected: Tensor, bits: int, width: int, itemsize: int, axis: Axis) -> int:
        packed = packed_length(selected, self.residual, self.group, axis, bits)
        tail = selected - packed
        codes = -(-width * bits // 8)
        if axis == "channel":
            scales, scale_rows = width, packed // self.group
        else:
            scales, scale_rows = -(-width // self.group), packed
        packed_nbytes = int(packed.sum()) * codes + 2 * 2 * scales * int(scale_rows.sum())
        indices = index_nbytes(packed) * 3 + index_nbytes(tail)
        return packed_nbytes + int(tail.sum()) * width * itemsize + indices

    def droppable(self) -> PackedFormat | None:
        return replace(self, drops=True) if self.key_axis == "token" and not self.residual else None

    def of_everything(self) -> PackedFormat:
        return replace(self, drops=False)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        return PackedStore.where(
            layer.keys,
            layer.values,
            tiers > 0,
            self.dtype,
            bits=self.bits,
            group=self.group,
            residual=self.residual,
            key_axis=self.key_axis,
            value_bits=self.value_bits,
            positions=self.drops,
            drops=self.drops,
        )


@dataclass(frozen=True)
class MixedFormat(Format):
    """Selected entries at `dtype`, all others at `bits` bits per token in groups of `group` channels.

    While decoding the share of selected entries stays as it is (see `MixedStore`), for which the attention that each
    of them received is remembered; the newest `recent` part of them is safe. With `balance` the others' keys are
    balanced channel by channel before they are quantised (see `balancer`).
    """

    attends_itself: ClassVar[bool] = True

    dtype: torch.dtype
    bits: int
    group: int
    balance: bool = False
    recent: float = 0.5

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (str(self.dtype).removeprefix("torch."), f"{self.bits}-bit")

    @property
    def _low(self) -> PackedFormat:
        return PackedFormat(self.dtype, self.bits, self.group, residual=0, key_axis="token")

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        mixed = (selected < shape.tokens).any(dim=1)
        some = selected[mixed]
        factors = _BALANCE_BYTES * shape.kv_heads * shape.key_width * len(some) if self.balance else 0
        low = self._low.nbytes(shape, shape.tokens - some) + self._low_positions(shape, some)
        high = DenseFormat(self.dtype, state=1).nbytes(shape, some)
        return DenseFormat(self.dtype).nbytes(shape, selected[~mixed]) + high + low + factors

    @staticmethod
    def _low_positions(shape: Shape, selected: Tensor) -> int:
        """PackedFormat counts none for layers of which it holds everything, but a mixed store needs them."""
        everything = selected[(selected == 0).all(dim=1)]
        return everything.numel() * shape.tokens * INDEX_BYTES

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        selected = tiers == 1
        if not bool((tiers == 2).any()):
            return DenseFormat(self.dtype).build(layer, selected.to(tiers.dtype), None)
        low = PackedStore.where(
            layer.keys,
            layer.values,
            tiers == 2,
            self.dtype,
            bits=self.bits,
            group=self.group,
            residual=0,
            key_axis="token",
            balance=balancer(layer) if self.balance else None,
            positions=True,
        )
        high = DenseStore.where(layer.keys, layer.values, selected, self.dtype, layer.received())
        return MixedStore(high, low, share=float(selected.float().mean()), recent=self.recent)


def balancer(layer: LayerTrace) -> Tensor:
    """What the keys of each channel are multiplied with to be as large as the queries, float16 [k, d].

    sqrt(max |query| / max |key|) over the prompt, the queries of a KV head's group taken together.
    """
    queries = layer.queries.float().abs().amax(dim=1).unflatten(0, (-1, layer.groups)).amax(dim=1)  # [k, d]
    keys = layer.keys.float().abs().amax(dim=1)
    factors = torch.where((queries > 0) & (keys > 0), (queries / keys).sqrt(), 1.0)
    return factors.clamp(2.0**-14, 2.0**14).to(torch.float16)


def left_over(shape: Shape, selected: Tensor) -> Tensor:
    """How many entries of each head [l, k] are not selected, for the layers that have any such: [l', k]."""
    others = shape.tokens - selected
    return others[(others > 0).any(dim=1)]


def index_nbytes(lengths: Tensor) -> int:
    """Starts and lengths that rows of unequal length [l, k] need."""
    unequal = (lengths != lengths[:, :1]).any(dim=1)
    return 2 * INDEX_BYTES * lengths.shape[1] * int(unequal.sum())
