"""The stages of a KV method, each with a default: a method says only what its paper changes.

    score      which positions matter: [k, n] per layer
    refine     what becomes of the scores, whoever found them: by chunks, by what values write, in two steps
    allocate   how many each layer and head may keep
    merge      what of the dropped positions goes into kept ones
    store      at what precision, in which layout
    retrieve   how entries in host memory are found again, where those that are not selected go there
    select     what of the device's entries each new token attends to, where that is not everything
    evict      who leaves while decoding when a new token needs room: by an eviction state kept beside the entries, or
               by the recipe's scores of what is held then (`rescores`)
    place      at which positions entries stand when they are attended to: their true ones, or closed up
    read       how the prompt is read, where that itself has to fit into the budget; it decides all the rest but how
               what it leaves is stored

A stage that a class defines in its own body is its contribution; an inherited one is borrowed, and yields to another
method of the recipe that contributes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.core.memo import Memo
from workbench.errors import NotApplicable
from workbench.kv.ranking import Ranking
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.progress import Progress
from workbench.registry import Family, Method
from workbench.trace import LayerTrace, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult
    from workbench.kv.held import HeldLayer
    from workbench.kv.stores import Store
    from workbench.kv.stores.offload import Index
    from workbench.kv.stores.selected import Selection

# The stages, and the methods of a class any of which supplies one.
_METHODS_OF = {
    "score": ("score", "scores", "scores_at", "wanted"),
    "refine": ("refine",),
    "allocate": ("allocate",),
    "merge": ("merge",),
    "store": ("store", "layout"),
    "retrieve": ("retrieve",),
    "select": ("select",),
    "evict": ("evict", "rescore", "leaving_at_once"),
    "place": ("closes_up",),
    "read": ("read",),
}
STAGES = tuple(_METHODS_OF)

TeacherForcing = Callable[["list[Store]", int, Tensor], Tensor]
"""From stores of what stands before a position, that position and ids [t]: the logits [t, v] that the model gives when
it reads the ids from there on."""


@dataclass(frozen=True)
class Study:
    """What a method may look at when it decides: the trace, the model that read it (None for a trace made by hand).

    ranking: for `importance`, the order of the recipe's scores. forcing: how the model reads on from given stores.
    measured: what was measured of the model, whatever it reads (see `of_model`).
    """

    trace: Trace
    model: PreTrainedModel | None = None
    progress: Progress = field(default_factory=Progress)
    ranking: Ranking | None = None
    forcing: TeacherForcing | None = None
    measured: Memo | None = None

    @property
    def of_model(self) -> Memo:
        """Where what is measured of the model itself is remembered: as long as the model, where a session has it, else
        with the trace.
        """
        return self.trace.memo if self.measured is None else self.measured

    def reader(self, key: str) -> PreTrainedModel:
        """The model, for a method that has to read again. Raises NotApplicable where there is none."""
        if self.model is None:
            raise NotApplicable(f"{key} lets the model read again, but this trace has no model")
        return self.model

    def forced(self, key: str, stores: list[Store], position: int, ids: Tensor) -> Tensor:
        """Logits [t, v] at ids [t], read from `position` on over stores of what stands before, for a method that
        compares candidates. Raises NotApplicable where there is no model.
        """
        self.reader(key)
        if self.forcing is None:
            raise NotApplicable(f"{key} lets the model read on from candidate stores, but nothing here runs it")
        return self.forcing(stores, position, ids)


@dataclass(frozen=True)
class Holding:
    """What a layer's store holds before a pass, for a method that says how many leave.

    entries: of the shortest head. room: how many each head needs for what comes so as not to outgrow the plan; 0 or
    less where there is enough. tokens: read so far. planned, prompt: entries and tokens when decoding began.
    """

    entries: int
    room: int
    tokens: int
    planned: int
    prompt: int


class KVMethod(Method):
    """Base of all methods that decide what the KV cache keeps, and how."""

    family: ClassVar[Family] = "kv"
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "evidence": "eviction_state",
            "watch": "update_state",
            "aligned": "evicts_layerwise",
            "uneven": "head_adaptive",
            "remembers": "state_width",
            "asks": "question_aware",
        }
    )
    evicts_layerwise: ClassVar[bool] = False  # evicts the same positions from all heads of a layer
    evicts_by_position: ClassVar[bool] = False  # what it evicts depends on nothing but the positions held
    evicts_by_rank: ClassVar[bool] = False  # who leaves by `rescore` is told by its place among so many held ones
    head_adaptive: ClassVar[bool] = False  # gives the heads of a layer different lengths
    state_width: ClassVar[int] = 1  # float32 numbers of eviction state an entry
    question_aware: ClassVar[bool] = False  # reads the prompt for the question: another one needs another prefill
    grows: ClassVar[bool] = False  # while it evicts, the cache grows by the share that it keeps of what comes
    rescores: ClassVar[bool] = False  # evicts by scores of what is held, the recipe's, and not by an eviction state
    own_stores: ClassVar[bool] = False  # what it has read lies in stores of its own kind, which no other can replace
    of_entries: ClassVar[bool] = False  # its `store` needs entries alone: it can hold what a reading method leaves
    contributed: ClassVar[frozenset[str]] = frozenset()  # the stages that the class's own body defines
    supplied: ClassVar[frozenset[str]] = frozenset()  # those and the inherited ones

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.supplied = cls._with(lambda name: getattr(cls, name) is not getattr(KVMethod, name))
        # What the class has and none of its bases, its own body defines.
        cls.contributed = cls._with(
            lambda name: all(getattr(cls, name) is not getattr(base, name, None) for base in cls.__bases__)
        )

    @staticmethod
    def _with(defines: Callable[[str], bool]) -> frozenset[str]:
        """The stages for any of whose methods this holds."""
        return frozenset(stage for stage, names in _METHODS_OF.items() if any(map(defines, names)))

    def score(self, layer: LayerTrace) -> Tensor:
        """Importance of each position, float [k, n]; the higher the longer it stays, inf for what must stay."""
        raise NotImplementedError

    def scores(self, study: Study) -> Tensor:
        """The scores of all layers that may be compressed, [l, k, n].

        Override this instead of `score` where layers depend on each other, or the model has to read again.
        """
        layers = study.trace.compressible
        track = study.progress.track(layers, f"scoring by {self.key}", len(layers))
        return stacked([self.score(layer) for layer in track])

    def scores_at(self, study: Study, scores: Tensor, share: float) -> Tensor:
        """The scores [l, k, n] by which this share of all entries is chosen, from those that `scores` found once: for a
        method that blends or cuts them by how much stays. Asked at every size that is tried: compute little here.
        """
        return scores

    def refine(self, study: Study, scores: Tensor, share: float) -> Tensor:
        """The scores [l, k, n] by which this share of all entries is chosen, from those that the recipe's scorer
        found: for a method that improves on the scores of any other. Asked at every size that is tried.
        """
        return scores

    def wanted(self, ranking: Ranking) -> int | None:
        """How many entries it keeps where no budget says so, for instance all above a threshold; None: all."""
        return None

    def importance(self, study: Study) -> Tensor | None:
        """What `allocate` goes by besides the scores, for instance a weight of each layer; found once a trace."""
        return None

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        """How many of `entries` (over all layers and heads) each head keeps, int64 [l, k]; at least one, at most n.

        `ranking.importance` is what `importance` found.
        """
        each = min(max(entries // (ranking.layers * ranking.kv_heads), 1), ranking.tokens)
        return torch.full((ranking.layers, ranking.kv_heads), each)

    def merge(self, layer: LayerTrace, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [k, n, d] and values [k, n, dv] in which the dropped have gone into the kept [k, n].

        scores [k, n]: by which they were kept, those of the recipe's scorer.
        """
        return layer.keys, layer.values

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        """How the kept entries of layers of these shapes are stored, if possible within `limit` bytes."""
        return DenseFormat(dtype)

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        """The same as `store`; override this instead where the format depends on what was read."""
        return self.store(dtype, shapes, limit)

    def retrieve(self, study: Study, shapes: Sequence[Shape]) -> Index:
        """How what was not selected is found again: it goes to host memory, and each query fetches what it needs.

        The budget is for device memory; what lies in host memory is counted apart.
        """
        raise NotImplementedError

    def select(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape]) -> Selection:
        """What of all that is held on the device a new token attends to, chosen by its query; `dtype` is the cache's.

        Nothing is saved so, and what is held to choose by comes on top of the entries.
        """
        raise NotImplementedError

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        """Read the prompt so that the caches never outgrow `prefill.limit` bytes, and return what is left of it."""
        raise NotImplementedError

    def eviction_state(self, layer: LayerTrace) -> Tensor:
        """What is known of each position when decoding begins; only asked of methods that evict then.

        float32 [k, n], or [k, n, w] for a method whose `state_width` w is more than 1; likewise in `update_state` and
        `evict`. The state of a new token is zero before it is updated for the first time.
        """
        return self.score(layer)

    def update_state(self, state: Tensor, weights: Tensor) -> Tensor:
        """The eviction state [k, m] after a pass with softmax rows weights [k, g, q, m] by slot, from that before."""
        return state

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        """Which slots leave so that `room` new tokens can enter, [k, room] or more; state and positions are [k, m] by
        slot. In slots that hold nothing, the state is inf and the position -1: they cannot leave.
        """
        raise NotImplementedError

    @property
    def leaves_prompt(self) -> bool:
        """Whether the prompt stays whole, unscored, and entries leave while decoding, beyond a budget in tokens."""
        return False

    def holds(self, planned: int) -> int:
        """The most entries of a head while decoding, where so many are planned, for a method that evicts then."""
        return planned

    @property
    def observes(self) -> int:
        """How many of the last queries are held beside the entries while decoding, for a method that `rescores`; they
        count in its budget.
        """
        return 0

    def leaving_at_once(self, holding: Holding) -> int:
        """How many entries of each head leave at once, the same of all; asked of methods that `rescores`, before every
        pass and again until it says 0.
        """
        return max(holding.room, 0)

    def rescore(self, held: HeldLayer, scorer: KVMethod, holding: Holding) -> Tensor:
        """Importance of each entry held, float [k, m], by which the lowest leave; `scorer` is the recipe's."""
        return scorer.score(held)

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether a method that has the stage `evict` uses it; one with a parameter for that says so here."""
        return True

    @property
    def closes_up(self) -> bool:
        """Whether entries stand by their place in the cache, closed up wherever others have left, and not at their true
        positions: then no distance is larger than the cache, and one that evicts while decoding has no end.
        """
        return False

    @property
    def scores_by_layer(self) -> bool:
        """Whether `score` alone says what a layer's entries are worth."""
        return type(self).score is not KVMethod.score

    @classmethod
    def contributes(cls, stage: str) -> bool:
        """Whether the stage is this class's own."""
        return stage in cls.contributed

    @classmethod
    def only_rescores(cls) -> bool:
        """Whether all that it brings to a recipe is that others' scores are taken anew while decoding."""
        return cls.rescores and not any(cls.contributes(stage) for stage in STAGES if stage != "evict")

    def supplies(self, stage: str) -> bool:
        """Whether this method, with its parameters, has more than the frame's default for the stage."""
        if stage == "evict" and not self.evicts_while_decoding:
            return False
        return stage in self.supplied and (stage != "place" or self.closes_up)


def keep_last(scores: Tensor, count: int) -> Tensor:
    """The same scores [k, n] with the last `count` positions certain to stay."""
    if count <= 0:
        return scores
    certain = torch.full_like(scores[:, -count:], torch.inf)
    return torch.cat([scores[:, :-count], certain], dim=1)


def keep_first(scores: Tensor, count: int) -> Tensor:
    """The same scores [k, n] with the first `count` positions certain to stay."""
    certain = torch.full_like(scores[:, :count], torch.inf)
    return torch.cat([certain, scores[:, count:]], dim=1)
