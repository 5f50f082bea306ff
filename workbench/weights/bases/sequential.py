"""What methods have in common that calibrate each block on what the compressed blocks before it make of the texts."""

from __future__ import annotations

from workbench.registry import param
from workbench.weights.base import WeightMethod


class Sequential(WeightMethod):
    """Base of methods that look at one block after another, as GPTQ, SparseGPT and Wanda do.

    Otherwise all blocks are shown what the uncompressed model makes of the texts: then statistics are gathered once for
    every method and budget.
    """

    sequential: bool = param(
        True, help="calibrate each block on the outputs of the compressed ones before it; else on the plain model's"
    )

    @property
    def recalibrates(self) -> bool:
        return self.sequential and (self.needs_inputs or self.needs_hessian)
