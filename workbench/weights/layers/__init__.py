"""Linear layers whose weights really are small, each holding exactly the bytes that it counts."""

from workbench.weights.layers.compact import CompactLinear
from workbench.weights.layers.packed import PackedLinear, packed_nbytes
from workbench.weights.layers.parts import Parts

__all__ = ["CompactLinear", "PackedLinear", "Parts", "packed_nbytes"]
