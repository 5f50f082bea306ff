"""Shapes and dtypes of what stages, stores, operators, layers and core functions take and give, checked at every call.

Users pay nothing for it: the signatures stand here, and `watched` puts them around the code for the length of a test.

b batch, h query heads, k KV heads, n tokens read, q new tokens, m slots, d size of a key, dv of a value, v vocabulary,
l layers, o outputs, i inputs. A letter means the same size throughout one call, `{...}` is computed from its arguments.
What only steers a function goes through `*rest` and `**options`.
"""
# No `from __future__ import annotations` here: jaxtyping reads the annotations themselves.
# ruff: noqa: F722, F821 (a shape is a string in an annotation, but no Python)
# mypy: ignore-errors

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped, UInt8, jaxtyped
from torch import Tensor, nn

from workbench.attention.base import AttentionMethod, PassContext
from workbench.attention.operators.base import Operator
from workbench.attention.visible_scores import VisibleScores
from workbench.core.attention_rows import RowBlock, attention_rows, row_blocks
from workbench.core.causal_attention import causal_attention
from workbench.core.kmeans import kmeans
from workbench.core.nearest import nearest_kept
from workbench.core.partial_softmax import PartialSoftmax
from workbench.core.rope import Rotation
from workbench.kv.base import Holding, KVMethod, Study
from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult
from workbench.kv.held import HeldLayer
from workbench.kv.plan import Plan
from workbench.kv.ranking import Ranking
from workbench.kv.stores import Dequantised, Store
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import Format, Shape
from workbench.kv.stores.offload import Index, Retriever
from workbench.kv.stores.selected import Selection, Selector
from workbench.kv.stores.tiered import TieredStore
from workbench.measure.attention import column_sums, row_entropy, sink_mass
from workbench.measure.quality import output_error
from workbench.trace import LayerTrace, Trace
from workbench.weights.base import WeightMethod
from workbench.weights.bases.pruner import Pruner
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers.compact import CompactLinear
from workbench_kernels import Scoring
from workbench_kernels.rotary import rotate

Declared = Callable[..., Any]


class WrongDtype(TypeError):
    """A result is not of the dtype that an argument asks for."""


def in_dtype_of(argument: str) -> Callable[[Declared], Declared]:
    """The first tensor of the result has the dtype of this argument, a tensor or a dtype."""

    def marked(declared: Declared) -> Declared:
        declared.dtype_of = argument
        return declared

    return marked


# -- KV methods

OfLayer = Float32[Tensor, "{layer.kv_heads} {layer.tokens}"]
State = Float32[Tensor, "k m"] | Float32[Tensor, "k m {self.state_width}"]


class OfKVMethod:
    def score(self, layer: LayerTrace) -> OfLayer: ...

    def scores(
        self, study: Study
    ) -> Float32[
        Tensor, "{len(study.trace.compressible)} {study.trace.compressible[0].kv_heads} {study.trace.tokens}"
    ]: ...

    def scores_at(self, study: Study, scores: Float32[Tensor, "l k n"], share: float) -> Float32[Tensor, "l k n"]: ...

    def importance(self, study: Study) -> Shaped[Tensor, "..."] | None: ...

    def allocate(self, ranking: Ranking, entries: int) -> Int64[Tensor, "{ranking.layers} {ranking.kv_heads}"]: ...

    def merge(
        self, layer: LayerTrace, kept: Bool[Tensor, "{layer.kv_heads} {layer.tokens}"], scores: OfLayer
    ) -> tuple[
        Float[Tensor, "{layer.kv_heads} {layer.tokens} {layer.keys_held.shape[2]}"],
        Float[Tensor, "{layer.kv_heads} {layer.tokens} {layer.values_held.shape[2]}"],
    ]: ...

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format: ...

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format: ...

    def retrieve(self, study: Study, shapes: Sequence[Shape]) -> Index: ...

    def select(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape]) -> Selection: ...

    def read(self, prefill: ChunkedPrefill) -> PrefillResult: ...

    def eviction_state(
        self, layer: LayerTrace
    ) -> OfLayer | Float32[Tensor, "{layer.kv_heads} {layer.tokens} {self.state_width}"]: ...

    def update_state(self, state: State, weights: Float32[Tensor, "k g q m"]) -> State: ...

    def evict(self, state: State, positions: Int[Tensor, "k m"], room: int) -> Int64[Tensor, "k leaving"]: ...

    def rescore(
        self, held: HeldLayer, scorer: KVMethod, holding: Holding
    ) -> Float32[Tensor, "{held.kv_heads} {held.tokens}"]: ...


class OfRanking:
    def __init__(self, scores: Float[Tensor, "l k n"]) -> None: ...

    def beside(self, importance: Shaped[Tensor, "..."] | None) -> Ranking: ...

    def selected(
        self, counts: Int64[Tensor, "{self.layers} {self.kv_heads}"]
    ) -> Bool[Tensor, "{self.layers} {self.kv_heads} {self.tokens}"]: ...


class OfChunkedPrefill:
    def feed(self, ids: Int64[Tensor, "p"], *rest: Any, **options: Any) -> Float[Tensor, "v"]: ...

    def feed_below(
        self, layer: int, ids: Int64[Tensor, "p"]
    ) -> tuple[Float[Tensor, "h p d"], Float[Tensor, "k p d"]]: ...

    def probe(self, ids: Int64[Tensor, "q"], score: Callable[[int, Tensor], Tensor]) -> list[Tensor]: ...

    def read_only(self, where: Int64[Tensor, "m"], most: int, *, closed_up: bool = False) -> None: ...


class OfPrefillResult:
    def __init__(
        self,
        stores: list[Store],
        logits: Float[Tensor, "v"],
        position: int,
        format: Format,
        tiers: UInt8[Tensor, "l k n"] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None: ...


class OfPlan:
    def __init__(
        self,
        trace: Trace,
        methods: tuple[KVMethod, ...],
        stages: Any,
        format: Format,
        tiers: UInt8[Tensor, "{len(trace.layers)} k {trace.tokens}"],
        dtype: torch.dtype,
        nbytes: int,
        full_nbytes: int,
        *rest: Any,
        **more: Any,
    ) -> None: ...

    def kept(self, layer: int, kv_head: int) -> Int64[Tensor, "m"]: ...

    def survival(self) -> Float32[Tensor, "{self.trace.tokens}"]: ...


# -- what is recorded


class OfLayerTrace:
    def __init__(
        self,
        index: int,
        keys_held: Float[Tensor, "k n d"],
        values_held: Float[Tensor, "k n dv"],
        queries_held: Float[Tensor, "h asked d"],  # n, but of what is held only the last
        device: torch.device,
        scoring: Scoring,
        *rest: Any,
        **options: Any,
    ) -> None: ...

    def attention(self, last: int) -> Float32[Tensor, "{self.kv_heads} {self.groups} _ {self.tokens}"]: ...

    def received(self) -> Float32[Tensor, "{self.kv_heads} {self.tokens}"]: ...

    def unrotated_queries(self) -> Float32[Tensor, "{self.heads} {self.tokens} {self.keys_held.shape[2]}"]: ...


class OfTrace:
    def __init__(
        self,
        prompt: Any,
        layers: tuple[LayerTrace, ...],
        logits: Float32[Tensor, "v"],
        read_seconds: float,
        *rest: Any,
        **options: Any,
    ) -> None: ...


# -- stores; a store that holds entries as bytes hands these on to the stores that it is made of

Positions = Int[Tensor, "{self.kv_heads} m"] | Int[Tensor, "1 m"]
Valid = Bool[Tensor, "{self.kv_heads} m"] | None


class OfStore:
    def append(
        self,
        keys: Float[Tensor, "{self.kv_heads} q d"] | UInt8[Tensor, "{self.kv_heads} q d"],
        values: Float[Tensor, "{self.kv_heads} q dv"] | UInt8[Tensor, "{self.kv_heads} q dv"],
        positions: Int64[Tensor, "q"],
    ) -> None: ...

    def reads(self, ids: Int64[Tensor, "q"], positions: Int64[Tensor, "q"]) -> None: ...

    def slots(self) -> tuple[Positions, Valid]: ...

    @in_dtype_of("dtype")
    def contents(self, dtype: torch.dtype) -> Dequantised: ...

    def tensors(self) -> dict[str, list[Tensor]]: ...

    def host_tensors(self) -> dict[str, list[Tensor]]: ...

    def clone(self) -> Store: ...

    def reserve(self, tokens: int) -> None: ...

    def tiers(self, tokens: int) -> UInt8[Tensor, "{self.kv_heads} {tokens}"]: ...

    @property
    def entries(self) -> int: ...

    @property
    def slot_positions(self) -> Positions: ...

    @property
    def positions(self) -> list[Int64[Tensor, "_"]]: ...

    @in_dtype_of("query")
    def attend(
        self, query: Float[Tensor, "h q d"], query_positions: Int64[Tensor, "q"], scoring: Scoring, **options: Any
    ) -> tuple[
        Float[Tensor, "h q dv"], Float32[Tensor, "{self.kv_heads} {query.shape[0]//self.kv_heads} q m"] | None
    ]: ...

    def by_kernel(
        self, query: Float[Tensor, "h q d"], query_positions: Int64[Tensor, "q"], scoring: Scoring, **options: Any
    ) -> Float[Tensor, "h q dv"] | None: ...


class OfDequantised:
    def __init__(
        self,
        keys: Float[Tensor, "k m d"] | UInt8[Tensor, "k m d"],
        values: Float[Tensor, "k m dv"] | UInt8[Tensor, "k m dv"],
        positions: Int[Tensor, "k m"] | Int[Tensor, "1 m"],
        valid: Bool[Tensor, "k m"] | None,
    ) -> None: ...


class OfEvictable:
    @property
    def counts(self) -> Int64[Tensor, "{self.kv_heads}"]: ...

    @property
    def eviction_state(self) -> Float32[Tensor, "{self.kv_heads} m"] | Float32[Tensor, "{self.kv_heads} m w"]: ...

    def replace_state(
        self, state: Float32[Tensor, "{self.kv_heads} m"] | Float32[Tensor, "{self.kv_heads} m w"]
    ) -> None: ...

    def evict(self, slots: Int64[Tensor, "{self.kv_heads} leaving"]) -> None: ...


class OfTieredStore:
    @in_dtype_of("dtype")
    def near_contents(self, dtype: torch.dtype) -> Dequantised: ...

    def index(self) -> list[Tensor]: ...

    def host_index(self) -> list[Tensor]: ...


class OfFormat:
    def nbytes(self, shape: Shape, selected: Int64[Tensor, "l {shape.kv_heads}"]) -> int: ...

    def host_nbytes(self, shape: Shape, selected: Int64[Tensor, "l {shape.kv_heads}"]) -> int: ...

    def of_everything(self) -> Format: ...

    def layers_with(self, layer: int) -> tuple[int, ...]: ...

    def build_together(self, layers: Sequence[LayerTrace], tiers: Sequence[Tensor]) -> list[Store]: ...

    def build(
        self,
        layer: LayerTrace,
        tiers: UInt8[Tensor, "{layer.kv_heads} {layer.tokens}"],
        state: OfLayer | Float32[Tensor, "{layer.kv_heads} {layer.tokens} w"] | None,
    ) -> Store: ...


class OfIndex:
    def nbytes(self, shape: Shape, others: Int64[Tensor, "l {shape.kv_heads}"]) -> int: ...

    def host_nbytes(self, shape: Shape, others: Int64[Tensor, "l {shape.kv_heads}"]) -> int: ...

    def build(self, layer: LayerTrace, others: Bool[Tensor, "{layer.kv_heads} {layer.tokens}"]) -> Retriever: ...


Slots = tuple[Int64[Tensor, "k q c"], Bool[Tensor, "k q c"]]


class OfRetriever:
    def find(self, query: Float[Tensor, "h q d"], scale: float) -> Slots: ...

    def find_at(self, query: Float[Tensor, "h q d"], positions: Int64[Tensor, "q"], scale: float) -> Slots: ...

    def add(
        self, keys: Float[Tensor, "k e d"], values: Float[Tensor, "k e dv"], positions: Int[Tensor, "k e"]
    ) -> None: ...

    def reads(self, ids: Int64[Tensor, "q"], positions: Int64[Tensor, "q"]) -> None: ...

    def observe(self, weights: Float32[Tensor, "k g q m"], positions: Int64[Tensor, "k m"]) -> None: ...

    def tensors(self) -> list[Tensor]: ...

    def host_tensors(self) -> list[Tensor]: ...

    def clone(self) -> Retriever: ...


class OfSelection:
    def nbytes(self, shape: Shape, held: Int64[Tensor, "l {shape.kv_heads}"]) -> int: ...

    def build(self, layer: LayerTrace, held: Bool[Tensor, "{layer.kv_heads} {layer.tokens}"]) -> Selector | None: ...


class OfSelector:
    def choose(
        self, query: Float32[Tensor, "k g d"], order: Int64[Tensor, "k m"], seen: Bool[Tensor, "k m"]
    ) -> Bool[Tensor, "k g m"]: ...

    def append(self, keys: Float[Tensor, "k q d"]) -> None: ...

    def tensors(self) -> list[Tensor]: ...

    def clone(self) -> Selector: ...


# -- attention methods and operators


class OfAttentionMethod:
    @in_dtype_of("query")
    def attend(
        self,
        query: Float[Tensor, "h n d"],
        key: Float[Tensor, "k n d"],
        value: Float[Tensor, "k n dv"],
        *rest: Any,
        **options: Any,
    ) -> Float[Tensor, "h n dv"]: ...

    @in_dtype_of("query")
    def learn(
        self,
        query: Float[Tensor, "h n d"],
        key: Float[Tensor, "k n d"],
        value: Float[Tensor, "k n dv"],
        *rest: Any,
        **options: Any,
    ) -> Float[Tensor, "h n dv"]: ...

    def begin(self, layer: LayerTrace, context: PassContext) -> None: ...

    @in_dtype_of("query")
    def decode(
        self,
        query: Float[Tensor, "h q d"],
        contents: Dequantised,
        visible: Bool[Tensor, "{len(contents.keys)} q {contents.keys.shape[1]}"],
        *rest: Any,
        **options: Any,
    ) -> Float[Tensor, "h q {contents.values.shape[2]}"]: ...

    def span(self, layer: int, layers: int, tokens: int) -> int | None: ...

    def entries(self, tokens: int, layers: int) -> int: ...


class OfVisibleScores:
    def __new__(
        cls, slots: Int64[Tensor, "k c"], scores: Float32[Tensor, "h r c"], values: Float[Tensor, "k c dv"]
    ) -> VisibleScores: ...


class OfOperator:
    def prepared(
        self, q: Float[Tensor, "h n d"], k: Float[Tensor, "k n d"], scale: float
    ) -> Callable[[int, int], Tensor]: ...

    def rows(
        self, q: Float[Tensor, "h n d"], k: Float[Tensor, "k n d"], scale: float, first: int, stop: int
    ) -> Float32[Tensor, "h {stop-first} {stop}"]: ...

    def weights(
        self, q: Float[Tensor, "h n d"], k: Float[Tensor, "k n d"], scale: float
    ) -> Float32[Tensor, "h n n"]: ...

    @in_dtype_of("q")
    def plain(
        self, q: Float[Tensor, "h n d"], k: Float[Tensor, "k n d"], v: Float[Tensor, "k n dv"], scale: float
    ) -> Float[Tensor, "h n dv"]: ...

    @in_dtype_of("q")
    def apply(
        self, q: Float[Tensor, "h n d"], k: Float[Tensor, "k n d"], v: Float[Tensor, "k n dv"], scale: float
    ) -> Float[Tensor, "h n dv"]: ...

    def for_head(self, head: int, heads: int) -> Operator: ...


# -- weight methods and their layers


class OfWeightMethod:
    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module: ...


class OfPruner:
    def prune(
        self, weight: Float[Tensor, "o i"], count: int, inputs: InputStats | None
    ) -> tuple[Float[Tensor, "o i"], Bool[Tensor, "o i"]]: ...


class OfInputStats:
    def __init__(
        self,
        tokens: int,
        mean: Float32[Tensor, "i"],
        absmean: Float32[Tensor, "i"],
        absmax: Float32[Tensor, "i"],
        square: Float32[Tensor, "i"],
        accumulated: Float32[Tensor, "i i"] | None = None,
    ) -> None: ...

    def output_error(self, change: Float[Tensor, "o i"]) -> Float32[Tensor, "o"]: ...


class OfCompactLinear:
    @in_dtype_of("dtype")
    def rows(self, first: int, last: int, dtype: torch.dtype) -> Float[Tensor, "{last-first} {self.in_features}"]: ...

    @in_dtype_of("dtype")
    def dequantised(
        self, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "{self.out_features} {self.in_features}"]: ...

    @in_dtype_of("x")
    def forward(self, x: Float[Tensor, "*b {self.in_features}"]) -> Float[Tensor, "*b {self.out_features}"]: ...


# -- core


class OfPartialSoftmax:
    def __init__(
        self, maximum: Float[Tensor, "h r 1"], total: Float[Tensor, "h r 1"], weighted: Float[Tensor, "h r dv"]
    ) -> None: ...

    def extended(self, scores: Float[Tensor, "h r c"], values: Float[Tensor, "k c dv"]) -> PartialSoftmax: ...

    def merged(self, other: PartialSoftmax) -> PartialSoftmax: ...

    def output(self, scoring: Scoring) -> Float[Tensor, "h r dv"]: ...


Turn = Float[Tensor, "*c n r"] | Float[Tensor, "1 r"]  # a table for each position, or one for all


class OfRotation:
    def __call__(
        self, positions: Int64[Tensor, "*at"]
    ) -> tuple[Float32[Tensor, "*at {self.width}"], Float32[Tensor, "*at {self.width}"]]: ...

    def halved(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]: ...

    def unhalved(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]: ...

    def apply(self, x: Float[Tensor, "*b n d"], positions: Int64[Tensor, "*c n"]) -> Float[Tensor, "*b n d"]: ...

    def undo(self, x: Float32[Tensor, "*b n d"], positions: Int64[Tensor, "*c n"]) -> Float32[Tensor, "*b n d"]: ...

    def turned_back(
        self, x: Float[Tensor, "*b n d"], positions: Int64[Tensor, "*c n"]
    ) -> Float32[Tensor, "*b n d"]: ...

    def by(self, x: Float[Tensor, "*b n d"], cos: Turn, sin: Turn) -> Float[Tensor, "*b n d"]: ...


class OfRowBlock:
    def __new__(cls, rows: slice, keys: slice, probs: Float32[Tensor, "h r c"]) -> RowBlock: ...


@in_dtype_of("query")
def of_causal_attention(
    query: Float[Tensor, "h n d"],
    key: Float[Tensor, "k n d"],
    value: Float[Tensor, "k n dv"],
    *rest: Any,
    **options: Any,
) -> Float[Tensor, "h n dv"]: ...


def of_row_blocks(
    queries: Float[Tensor, "h nq d"], keys: Float[Tensor, "k nk d"], scoring: Scoring, **options: Any
) -> Iterator[RowBlock]: ...


def of_attention_rows(
    queries: Float[Tensor, "h nq d"], keys: Float[Tensor, "k nk d"], scoring: Scoring, **options: Any
) -> Iterator[tuple[slice, Tensor]]: ...


def of_rotate(x: Float[Tensor, "*b n d"], cos: Turn, sin: Turn) -> Float[Tensor, "*b n d"]: ...


def of_kmeans(
    points: Float[Tensor, "p d"], clusters: int, **options: Any
) -> tuple[Float64[Tensor, "c d"], Int64[Tensor, "p"]]: ...


def of_nearest_kept(
    keys: Float[Tensor, "k n d"], kept: Bool[Tensor, "k n"], block: int = 2048
) -> tuple[Float32[Tensor, "k n"], Int64[Tensor, "k n"]]: ...


def of_column_sums(
    queries: Float[Tensor, "h nq d"], keys: Float[Tensor, "k nk d"], *rest: Any, **options: Any
) -> Float32[Tensor, "h nk"]: ...


def of_row_entropy(
    queries: Float[Tensor, "h nq d"], keys: Float[Tensor, "k nk d"], *rest: Any, **options: Any
) -> Float32[Tensor, "h nq"]: ...


def of_sink_mass(
    queries: Float[Tensor, "h nq d"], keys: Float[Tensor, "k nk d"], *rest: Any, **options: Any
) -> Float32[Tensor, "h nq"]: ...


def of_output_error(reference: Float[Tensor, "h t _"], other: Float[Tensor, "h t _"]) -> Float32[Tensor, "h"]: ...


OF_CLASSES: dict[type, type] = {
    KVMethod: OfKVMethod,
    Ranking: OfRanking,
    ChunkedPrefill: OfChunkedPrefill,
    PrefillResult: OfPrefillResult,
    Plan: OfPlan,
    LayerTrace: OfLayerTrace,
    Trace: OfTrace,
    Store: OfStore,
    DenseStore: OfEvictable,
    TieredStore: OfTieredStore,
    Dequantised: OfDequantised,
    Format: OfFormat,
    Index: OfIndex,
    Retriever: OfRetriever,
    Selection: OfSelection,
    Selector: OfSelector,
    AttentionMethod: OfAttentionMethod,
    VisibleScores: OfVisibleScores,
    Operator: OfOperator,
    WeightMethod: OfWeightMethod,
    Pruner: OfPruner,
    InputStats: OfInputStats,
    CompactLinear: OfCompactLinear,
    PartialSoftmax: OfPartialSoftmax,
    Rotation: OfRotation,
    RowBlock: OfRowBlock,
}
"""What a class and all that derive from it are held to; the first that fits a name declares it."""
OF_FUNCTIONS: dict[Declared, Declared] = {
    causal_attention: of_causal_attention,
    row_blocks: of_row_blocks,
    attention_rows: of_attention_rows,
    rotate: of_rotate,
    kmeans: of_kmeans,
    nearest_kept: of_nearest_kept,
    column_sums: of_column_sums,
    row_entropy: of_row_entropy,
    sink_mass: of_sink_mass,
    output_error: of_output_error,
}


@contextmanager
def watched(*bases: type) -> Iterator[set[str]]:
    """Hold every class and function to its signature while the block runs, or only these classes and what derives from
    them; gives what was called, by qualified name.
    """
    called: set[str] = set()
    with ExitStack() as patches:
        for base, declarations in OF_CLASSES.items():
            for cls in () if bases and base not in bases else (base, *derived(base)):
                for name, declared in _signatures(declarations).items():
                    if name in vars(cls):
                        checked = _checked(vars(cls)[name], declared, called)
                        patches.enter_context(mock.patch.object(cls, name, checked))
        modules = [module for name, module in sys.modules.items() if name.startswith("workbench")]
        for function, declared in () if bases else OF_FUNCTIONS.items():
            checked = _checked(function, declared, called)
            for module in modules:
                if vars(module).get(function.__name__) is function:
                    patches.enter_context(mock.patch.object(module, function.__name__, checked))
        yield called


def derived(base: type) -> set[type]:
    """All classes that derive from it, directly or not."""
    return {cls for direct in base.__subclasses__() for cls in (direct, *derived(direct))}


def declared_of(cls: type) -> set[str]:
    """The functions in a class's own body whose shapes are declared, by qualified name."""
    bases = [declarations for base, declarations in OF_CLASSES.items() if issubclass(cls, base)]
    names = {name for declarations in bases for name in _signatures(declarations)}
    return {_name(own) for name, own in vars(cls).items() if name in names and inspect.isfunction(own)}


def _signatures(declarations: type) -> dict[str, Any]:
    """The functions and properties that stand there, by name."""
    kinds = (FunctionType, property, staticmethod)  # Python makes `__new__` a static one
    return {name: declared for name, declared in vars(declarations).items() if isinstance(declared, kinds)}


def _checked(attribute: Any, declared: Any, called: set[str]) -> Any:
    """The attribute of a class, held to what is declared."""
    if isinstance(attribute, property):
        return property(_checked(attribute.fget, declared.fget, called), attribute.fset)
    if isinstance(attribute, staticmethod):
        return staticmethod(_checked(attribute.__func__, declared.__func__, called))
    if not inspect.isfunction(attribute) or getattr(attribute, "__isabstractmethod__", False):
        return attribute
    dtype_of = getattr(declared, "dtype_of", None)

    @wraps(declared)  # jaxtyping reads the signature through `__wrapped__`
    def call(*args: Any, **options: Any) -> Any:
        called.add(_name(attribute))
        result = attribute(*args, **options)
        if dtype_of is not None:
            asked = inspect.signature(declared).bind(*args, **options)
            asked.apply_defaults()
            _same_dtype(_name(attribute), result, asked.arguments[dtype_of])
        return result

    call.__module__, call.__qualname__ = attribute.__module__, attribute.__qualname__
    return jaxtyped(call, typechecker=beartype)


def _name(function: Declared) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _same_dtype(name: str, result: Any, asked: Tensor | torch.dtype) -> None:
    """Raise WrongDtype unless a result, the first of several, or the keys and values of contents are of this dtype."""
    dtype = asked.dtype if isinstance(asked, Tensor) else asked
    if isinstance(result, Dequantised):
        found = (result.keys, result.values)
    else:
        found = (result[0],) if isinstance(result, tuple) else (result,)
    if any(tensor.dtype != dtype for tensor in found):
        raise WrongDtype(f"{name}: asked for {dtype}, got {[tensor.dtype for tensor in found]}")
