"""The small fused operations of a decode step, under the interpreter or compiled, against their references."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from workbench_kernels.step import add_rms_norm, rotate_append, silu_times

pytestmark = interpreted


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (9, 64), (3, 100)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_norms_are_those_of_separate_operations(rows: int, width: int, dtype: torch.dtype) -> None:
    from workbench_kernels.gpu.step import add_rms_norm as kernel

    x, residual, weight = (
        normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(rows, width)] * 2 + [(width,)])
    )
    for before in (None, residual):
        found, wanted = (norm(x, weight, 1e-5, before) for norm in (kernel, add_rms_norm.reference))
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], atol=0, rtol=2e-3 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"), [(32, 8, 128, 128), (9, 3, 64, 64), (4, 1, 24, 40)]
)
def test_heads_are_turned_and_appended_where_the_rows_end(heads, kv_heads, width, value_width) -> None:
    from workbench_kernels.gpu.step import rotate_append as kernel

    query, key, value = normal(heads, width), normal(kv_heads, width, seed=1), normal(kv_heads, value_width, seed=2)
    angles = normal(width // 2, seed=3, dtype=torch.float32).repeat(2)
    cos, sin = angles.cos().half(), angles.sin().half()
    ends, value_ends = (torch.arange(kv_heads) * 7 + first for first in (3, 5))
    held = []
    for rotate in (kernel, rotate_append.reference):
        keys, values = normal(7 * kv_heads + 5, width, seed=4), normal(7 * kv_heads + 5, value_width, seed=5)
        held.append((rotate(query, key, value, cos, sin, keys, ends, values, value_ends), keys, values))
    for found, wanted in zip(*held, strict=True):
        assert torch.equal(found, wanted)


def test_gates_are_those_of_separate_operations() -> None:
    from workbench_kernels.gpu.step import silu_times as kernel

    gate, up = normal(2, 700), normal(2, 700, seed=1)
    torch.testing.assert_close(kernel(gate, up), silu_times.reference(gate, up), atol=1e-6, rtol=2e-3)
