"""Attention methods: how scores are computed, and how far a layer looks back."""

from workbench.attention.adalog import AdaLog
from workbench.attention.base import AttentionMethod
from workbench.attention.block_sparse import BlockSparse
from workbench.attention.cca import CoreContext
from workbench.attention.deltallm import DeltaAttention
from workbench.attention.dopq import DopQ
from workbench.attention.l_mul import LMul
from workbench.attention.lean import Lean
from workbench.attention.masformer import MASFormer
from workbench.attention.memory_efficient import MemoryEfficient
from workbench.attention.streaming_window import StreamingWindow
from workbench.attention.uniattn import UniAttn

__all__ = [
    "AdaLog",
    "AttentionMethod",
    "BlockSparse",
    "CoreContext",
    "DeltaAttention",
    "DopQ",
    "LMul",
    "Lean",
    "MASFormer",
    "MemoryEfficient",
    "StreamingWindow",
    "UniAttn",
]
