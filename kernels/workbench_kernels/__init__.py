"""Attention and packing over compressed caches: plain PyTorch references, and kernels with the same signatures beside
them.
"""

from workbench_kernels.attend import attend
from workbench_kernels.attention_statistics import Reading, RowStatistics
from workbench_kernels.packing import dequantise, pack, quantise, unpack
from workbench_kernels.reading import read_attention
from workbench_kernels.row_statistics import row_statistics
from workbench_kernels.scoring import Chosen, Scoring

__all__ = [
    "Chosen",
    "Reading",
    "RowStatistics",
    "Scoring",
    "attend",
    "dequantise",
    "pack",
    "quantise",
    "read_attention",
    "row_statistics",
    "unpack",
]
