"""Attention methods: how scores are computed, and how far a layer looks back.

A method is given each layer's whole (q, k, v) while the prompt is read, what earlier layers left, and a count of the
score entries that were really computed, which the run reports. A method that says it decodes also attends in its own
way over what a store holds, by its true positions; what it holds beside the stores is on the timeline as "attention".
Stores that look for what a query needs, or move entries by what they got, attend themselves. Operators (`operators`)
are studied on a recording and never run in the model.
"""

from workbench.attention.base import AttentionMethod
from workbench.attention.methods.adalog import AdaLog
from workbench.attention.methods.block_sparse import BlockSparse
from workbench.attention.methods.cca import CoreContext
from workbench.attention.methods.deltallm import DeltaAttention
from workbench.attention.methods.dopq import DopQ
from workbench.attention.methods.l_mul import LMul
from workbench.attention.methods.lean import Lean
from workbench.attention.methods.masformer import MASFormer
from workbench.attention.methods.memory_efficient import MemoryEfficient
from workbench.attention.methods.streaming_window import StreamingWindow
from workbench.attention.methods.uncomp import UNCompReading
from workbench.attention.methods.uniattn import UniAttn

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
    "UNCompReading",
    "UniAttn",
]
