"""Another format in every layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from torch import Tensor

from workbench.kv.stores.format import Format, Shape
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace


@dataclass(frozen=True)
class LayeredFormat(Format):
    """What stays of each layer in a format of its own, `formats` by the layer's index; each has one tier."""

    formats: tuple[tuple[int, Format], ...]

    @classmethod
    def of(cls, formats: Mapping[int, Format]) -> LayeredFormat:
        return cls(tuple(formats.items()))

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The format that most layers have, and of how many there are."""
        names = [form.tiers[0] for _, form in self.formats]
        kinds = set(names)
        most = max(sorted(kinds), key=names.count)
        return (most if len(kinds) == 1 else f"{most} and {len(kinds) - 1} more by layer",)

    def of_layer(self, layer: int) -> Format:
        """The format of a layer."""
        return dict(self.formats)[layer]

    def kind(self, shape: Shape) -> Hashable:
        return self.of_layer(shape.layer)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        return self.of_layer(shape.layer).nbytes(shape, selected)

    def of_everything(self) -> LayeredFormat:
        return LayeredFormat(tuple((layer, form.of_everything()) for layer, form in self.formats))

    def droppable(self) -> LayeredFormat | None:
        made = [(layer, form.droppable()) for layer, form in self.formats]
        whole = tuple((layer, form) for layer, form in made if form is not None)
        return LayeredFormat(whole) if len(whole) == len(made) else None

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        return self.of_layer(layer.index).build(layer, tiers, state)
