"""The sizes that kernels are written for: dispatch asks by them whether a kernel fits, and kernels count by them."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""what kernels read and write as floating point"""

FEW = 4
"""tokens that a linear layer's kernels multiply number by number, in float32"""
SOME = 16
"""tokens of 16 bits, which the matrix units multiply"""
RUN = 64
"""bytes in a row of packed weights whose codes share a scale"""
SCRATCH = 32 << 20
"""bytes that modules of low rank may hold beside their inputs and output, unless told otherwise"""
WIDEST_SPARSE = 2**18
"""columns of a sparse row of weights that one program takes"""
WIDEST_ROUNDED = 2**15
"""columns of a token that one program rounds"""
LEAST_STEP = 1e-12
"""the step of a token whose inputs are all zero"""
WIDEST_ROW = 4096
"""channels of a cached row that one program takes together"""
WIDEST_GROUP = 256
"""cached rows that one program quantises together"""
WIDEST_DELTAS = 2**14
"""numbers of a block of deltas that one program restores"""
