"""Which method of a recipe supplies each stage, and why methods that each supply one may not work together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workbench.errors import BadRecipe
from workbench.kv.method import STAGES, KVMethod


@dataclass(frozen=True)
class Stages:
    """Which method of a recipe supplies each stage; None where the frame's default does."""

    score: KVMethod | None = None
    refine: KVMethod | None = None
    allocate: KVMethod | None = None
    merge: KVMethod | None = None
    store: KVMethod | None = None
    retrieve: KVMethod | None = None
    select: KVMethod | None = None
    evict: KVMethod | None = None
    place: KVMethod | None = None
    read: KVMethod | None = None

    @classmethod
    def of(cls, methods: Sequence[KVMethod]) -> Stages:
        """Resolve the stages of a recipe. Raises BadRecipe if two methods contribute the same one."""
        chosen = {stage: cls._supplier(stage, methods) for stage in STAGES}
        stages = cls(**chosen)
        if stages.read is not None:
            return cls._reading(stages.read, [method for method in methods if method is not stages.read])
        if stages.evict is not None and stages.evict is not stages.score and not stages.evict.contributes("evict"):
            stages = cls(**{**chosen, "evict": None})  # a borrowed one goes with its scorer, whose score it continues
        for contradiction in contradictions(stages):
            raise BadRecipe(contradiction)
        for method in methods if len(methods) > 1 else ():
            if not any(getattr(stages, stage) is method for stage in STAGES):
                raise BadRecipe(
                    f"{method.key} has no part in this recipe: the other methods supply all that it does; leave it out"
                )
        return stages

    @classmethod
    def _reading(cls, read: KVMethod, others: Sequence[KVMethod]) -> Stages:
        """The stages of a recipe whose prompt `read` reads: of all others only `store` is left."""
        for other in others:
            if not other.contributes("store"):
                raise BadRecipe(
                    f"{read.key} decides while it reads, in bounded memory, what stays: only a method that stores it "
                    f"in fewer bytes can join; leave out {other.key}"
                )
            if read.own_stores:
                raise BadRecipe(
                    f"{read.key} holds what it has read in stores of its own, which the store of {other.key} cannot "
                    "replace: use one of the two"
                )
            if not other.of_entries:
                raise BadRecipe(
                    f"{other.key} goes by a recording of the whole prompt (its queries, scores or every position), "
                    f"which {read.key} does not leave: use one of the two"
                )
        return cls(read=read, store=others[0] if others else None)

    @staticmethod
    def _supplier(stage: str, methods: Sequence[KVMethod]) -> KVMethod | None:
        able = [method for method in methods if method.supplies(stage)]
        contributing = [method for method in able if method.contributes(stage)]
        if len(contributing) > 1:
            names = " and ".join(method.key for method in contributing)
            raise BadRecipe(f"{names} each supply the stage {stage!r}: a recipe has one method for each stage")
        return contributing[0] if contributing else able[0] if able else None


def contradictions(stages: Stages) -> Iterator[str]:
    """What contradicts each other among the stages of a recipe that reads its prompt at once."""
    yield from _in_host_memory(stages)
    yield from _without_scores(stages)
    if stages.evict is not None and stages.evict.rescores:
        yield from _rescoring(stages)
    else:
        yield from _evicting(stages)


def _in_host_memory(stages: Stages) -> Iterator[str]:
    """What a store in host memory, or one that is looked into, does not allow."""
    retrieve, place = stages.retrieve, stages.place
    if stages.select is not None and retrieve is not None:
        yield (
            f"{stages.select.key} selects among what is on the device, {retrieve.key} fetches from host memory: use "
            "one of the two"
        )
    for other, does in ((stages.store, "stores them at fewer bits"), (stages.merge, "merges them")):
        if retrieve is not None and other is not None:
            yield (
                f"{retrieve.key} moves what is not selected to host memory, but {other.key} {does}: use one of the two"
            )
    for finding in (retrieve, stages.select):
        if place is not None and finding is not None:
            yield (
                f"{finding.key} finds entries by where they stand in the text, but {place.key} closes them up: use "
                f"{place.key} with true positions"
            )


def _without_scores(stages: Stages) -> Iterator[str]:
    for lost in (stages.refine, stages.allocate, stages.merge):
        if lost is not None and stages.score is None:
            yield (
                f"{lost.key} needs to know which positions matter, but nothing in this recipe scores them; add a "
                "method that does, for instance snapkv"
            )


def _evicting(stages: Stages) -> Iterator[str]:
    """What eviction by a state beside the entries does not allow."""
    evict = stages.evict
    if evict is None:
        return
    if evict is not stages.score:
        scorer = stages.score.key if stages.score else "nothing"
        yield f"{evict.key} evicts while decoding by its own scores, but {scorer} scores here"
    keeping = stages.store or stages.retrieve
    if keeping is not None:
        yield (
            f"{evict.key} evicts single entries while decoding, which the store of {keeping.key} cannot; use "
            f"{evict.key} with decode=False"
        )
    if stages.select is not None:
        yield (
            f"{evict.key} evicts while decoding what {stages.select.key} has summed up with others; use {evict.key} "
            "with decode=False"
        )
    if evict.evicts_layerwise and stages.allocate and stages.allocate.head_adaptive:
        yield (
            f"{evict.key} evicts the same positions from all heads of a layer, to which {stages.allocate.key} gives "
            f"different lengths; use {evict.key} with decode=False"
        )


def _rescoring(stages: Stages) -> Iterator[str]:
    """Why what is held cannot be scored anew while decoding."""
    evict, scorer = stages.evict, stages.score
    assert evict is not None
    if scorer is None:
        yield f"{evict.key} scores what is held anew while decoding, but nothing here scores: add a method that does"
    elif not scorer.scores_by_layer and not evict.contributes("score"):
        yield (
            f"{evict.key} scores each layer anew while decoding, but {scorer.key} goes by the whole reading: use "
            "another scorer"
        )
    for other, does in (
        (stages.refine, "refines scores of the whole prompt"),
        (stages.place, "closes positions up"),
        (stages.retrieve, "moves entries to host memory"),
        (stages.select, "selects among them by their place"),
    ):
        if other is not None:
            yield f"{evict.key} scores entries by where they stand, but {other.key} {does}: leave one out"
