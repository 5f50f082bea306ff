"""What a model's weights take under weight methods."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.variants import Variants


def weight_nbytes(
    variants: Variants, methods: Sequence[Method] = (), *, progress: Progress | None = None
) -> tuple[int, int]:
    """Bytes of the model's weights under weight methods, and of its own weights.

    Both with plain weights at 16 bits, as budgets count them, in whatever precision they are computed here.
    """
    return variants.deployed_nbytes(methods, progress), variants.deployed_nbytes(())
