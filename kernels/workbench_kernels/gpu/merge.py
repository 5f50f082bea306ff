"""States of attention over disjoint sets of keys, merged in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power


@triton.jit
def _merge(
    first, second, third, fourth, first_lse, second_lse, third_lse, fourth_lse, out,
    COUNT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One query of one head."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    outs = (first, second, third, fourth)
    sums = (first_lse, second_lse, third_lse, fourth_lse)
    top = tl.load(first_lse + line)
    for part in tl.static_range(1, COUNT):
        top = tl.maximum(top, tl.load(sums[part] + line))
    whole = tl.zeros([], tl.float32)
    mixed = tl.zeros([DP], tl.float32)
    for part in tl.static_range(COUNT):
        share = tl.exp(tl.load(sums[part] + line) - top)
        whole += share
        mixed += share * tl.load(outs[part] + line * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + line * D + d, mixed / whole, mask=d < D)


def merge_states(states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """See `workbench_kernels.softmax.merge_states`; two to four states."""
    outs, sums = ([x.contiguous() for x in side] for side in zip(*states, strict=True))
    out, missing = torch.empty_like(outs[0]), 4 - len(states)
    _merge[(sums[0].numel(),)](
        *outs, *outs[:1] * missing, *sums, *sums[:1] * missing, out,
        COUNT=len(states), D=out.shape[-1], DP=power(out.shape[-1]), num_warps=1,
    )  # fmt: skip
    return out
