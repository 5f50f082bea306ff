"""How wide the modules of each block become where blocks lose unequally much."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workbench.core.bisection import boundary
from workbench.weights.surgery.prunable import PrunableMLP, PrunableModule


def by_block(modules: Sequence[PrunableModule], blocks: Sequence[str]) -> dict[str, list[PrunableModule]]:
    """Which of these modules stand in each block, attention first."""
    ordered = sorted(modules, key=lambda module: isinstance(module, PrunableMLP))
    return {block: [module for module in ordered if module.name.startswith(f"{block}.")] for block in blocks}


def shares(importance: Tensor, temperature: float) -> Tensor:
    """How much each block loses, relative to the average, for its importance [l]: L softmax(-s / ε)."""
    return importance.numel() * (-importance.double() / temperature).softmax(dim=0)


def allocate(modules: Sequence[Sequence[PrunableModule]], losses: Sequence[float], limit: int) -> list[list[int]]:
    """How wide the modules of each block become, within `limit` bytes together.

    Blocks lose in proportion to `losses` as far as they can: at least one width of each module stays. Within a block,
    heads lose that share, and neurons what the bytes ask for besides.
    """

    def widths(factor: float) -> list[list[int]]:
        return [_within(parts, 1 - min(factor * loss, 1.0)) for parts, loss in zip(modules, losses, strict=True)]

    def nbytes(widths: Sequence[Sequence[int]]) -> int:
        pairs = [
            pair for parts, counts in zip(modules, widths, strict=True) for pair in zip(parts, counts, strict=True)
        ]
        return sum(module.dimension_nbytes * width for module, width in pairs)

    narrowest = 1 / max(min(losses), 1e-12)  # nothing but the smallest widths stays
    return widths(boundary(lambda factor: nbytes(widths(factor)) <= limit, narrowest, 0.0))


def _within(modules: Sequence[PrunableModule], share: float) -> list[int]:
    """The widths of a block's modules at this share of its bytes; the last module takes what is left of them."""
    room = share * sum(module.width * module.dimension_nbytes for module in modules)
    widths = []
    for number, module in enumerate(modules, 1):
        part = share * module.width if number < len(modules) else room / module.dimension_nbytes
        widths.append(min(max(int(part + 1e-9), 1), module.width))
        room -= widths[-1] * module.dimension_nbytes
    return widths
