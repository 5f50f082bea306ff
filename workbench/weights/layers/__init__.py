"""Linear layers whose weights really are small, each holding exactly the bytes that it counts."""

from workbench.weights.layers.bit_blocks import BitBlock, BitBlocksLinear, bit_block_nbytes
from workbench.weights.layers.codebook import CodebookLinear, codebook_nbytes
from workbench.weights.layers.compact import CompactLinear
from workbench.weights.layers.dense import DenseLinear
from workbench.weights.layers.dictionary import DictionaryLinear, dictionary_nbytes
from workbench.weights.layers.integer import IntegerLinear
from workbench.weights.layers.outliers import OutliersLinear, outliers_nbytes
from workbench.weights.layers.packed import PackedLinear, packed_nbytes
from workbench.weights.layers.parts import Parts
from workbench.weights.layers.shift import ShiftLinear
from workbench.weights.layers.sparse import SparseLinear, sparse_nbytes
from workbench.weights.layers.vector import VectorLinear, vector_nbytes

__all__ = [
    "BitBlock",
    "BitBlocksLinear",
    "CodebookLinear",
    "CompactLinear",
    "DenseLinear",
    "DictionaryLinear",
    "IntegerLinear",
    "OutliersLinear",
    "PackedLinear",
    "Parts",
    "ShiftLinear",
    "SparseLinear",
    "VectorLinear",
    "bit_block_nbytes",
    "codebook_nbytes",
    "dictionary_nbytes",
    "outliers_nbytes",
    "packed_nbytes",
    "sparse_nbytes",
    "vector_nbytes",
]
