"""The maps that the Attention tab shows, each computed once while it is remembered."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from workbench.attention.operators import Operator, Study
from workbench.measure.attention import PooledMap, Pooling, Span
from workbench.measure.grid import GridOfMaps
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.session import Session
from workbench_widgets.app.panels.map_subject import MapSubject
from workbench_widgets.app.work.lru_cache import LRUCache

_PIXELS = 512
_SMALL = 32  # pixels of a map in the grid


@dataclass(frozen=True)
class CachedMaps:
    """Maps of one layer and head of what a session read; rows, cols: only of these queries and keys."""

    session: Session
    cache: LRUCache
    layer: int
    head: int
    pooling: Pooling
    rows: Span | None
    cols: Span | None

    def of(self, subject: MapSubject, progress: Progress) -> PooledMap:
        """The map of a subject, or the difference that it names."""
        if subject.operator is not None:
            study = self._operator(subject.operator, progress)
            return study.implied.minus(study.exact) if subject.difference else study.implied
        pooled = self._attention(subject.recipe, progress)
        return pooled.minus(self._attention(subject.base, progress)) if subject.difference else pooled

    def operator_errors(self, operator: Operator, progress: Progress) -> Study:
        """How far an operator's output is from the model's own, over all heads of the layer."""
        return self.cache.once(
            ("errors", self.layer, operator),
            lambda: self.session.operator(operator, self.layer, self.head, pixels=1, progress=progress),
        )

    def received(self, recipe: Recipe | None, progress: Progress) -> Tensor:
        """What each token receives [n]."""
        return self.cache.once(
            ("received", self.layer, self.head, recipe),
            lambda: self.session.received(self.layer, self.head, recipe, progress=progress),
        )

    def _attention(self, recipe: Recipe | None, progress: Progress) -> PooledMap:
        return self.cache.once(
            ("map", self.layer, self.head, recipe, self.rows, self.cols, self.pooling),
            lambda: self.session.attention(
                self.layer,
                self.head,
                recipe,
                pixels=_PIXELS,
                pooling=self.pooling,
                rows=self.rows,
                cols=self.cols,
                progress=progress,
            ),
        )

    def _operator(self, operator: Operator, progress: Progress) -> Study:
        return self.cache.once(
            ("operator", self.layer, self.head, operator, self.rows, self.cols, self.pooling),
            lambda: self.session.operator(
                operator,
                self.layer,
                self.head,
                heads=(),
                pixels=_PIXELS,
                pooling=self.pooling,
                rows=self.rows,
                cols=self.cols,
                progress=progress,
            ),
        )


def grid_key(recipe: Recipe | None) -> Hashable:
    """The key of the small maps of all heads in the cache."""
    return ("grid", recipe)


def grid_of(
    session: Session, cache: LRUCache, recipe: Recipe | None, progress: Progress
) -> tuple[GridOfMaps, pd.DataFrame]:
    """The small maps of all layers and heads, and what each head does."""
    return cache.once(
        grid_key(recipe),
        lambda: (
            session.attention_grid(recipe, pixels=_SMALL, progress=progress),
            session.heads(recipe, progress=progress),
        ),
    )
