"""Linear layers whose weights really are small, each holding exactly the bytes that it counts.

A layer is buffers that count themselves, `rows` that says what they stand for, and a product that makes them float
tile by tile. On a GPU a kernel writes such a tile in one pass, and a few tokens are multiplied with packed, sparse and
integer weights as they lie. These are kernels of our own because those of libraries want layouts of their own: a layer
would hold its weight twice, or be other bytes on a GPU than those it counts (`kernels/bench/weights.py` measures them
side by side).
"""

from workbench.weights.layers.bit_blocks import BitBlock, BitBlocksLinear, bit_block_nbytes
from workbench.weights.layers.codebook import CodebookLinear, codebook_nbytes
from workbench.weights.layers.compact import CompactLinear
from workbench.weights.layers.dense import DenseLinear
from workbench.weights.layers.dictionary import DictionaryLinear, dictionary_nbytes
from workbench.weights.layers.factored import FactoredLinear
from workbench.weights.layers.integer import IntegerLinear
from workbench.weights.layers.outliers import OutliersLinear, outliers_nbytes
from workbench.weights.layers.packed import PackedLinear, packed_nbytes
from workbench.weights.layers.parts import Parts
from workbench.weights.layers.shift import ShiftLinear
from workbench.weights.layers.sparse import SparseLinear, sparse_nbytes
from workbench.weights.layers.sparse_packed import SparsePackedLinear, sparse_packed_nbytes
from workbench.weights.layers.vector import VectorLinear, vector_nbytes

__all__ = [
    "BitBlock",
    "BitBlocksLinear",
    "CodebookLinear",
    "CompactLinear",
    "DenseLinear",
    "DictionaryLinear",
    "FactoredLinear",
    "IntegerLinear",
    "OutliersLinear",
    "PackedLinear",
    "Parts",
    "ShiftLinear",
    "SparseLinear",
    "SparsePackedLinear",
    "VectorLinear",
    "bit_block_nbytes",
    "codebook_nbytes",
    "dictionary_nbytes",
    "outliers_nbytes",
    "packed_nbytes",
    "sparse_nbytes",
    "sparse_packed_nbytes",
    "vector_nbytes",
]
