"""Softmax rows from a known log-sum-exp: those of attention itself, by the reference and by the kernel."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from workbench_kernels import Scoring, attend
from workbench_kernels.decode import decode_dense
from workbench_kernels.rows import Ragged
from workbench_kernels.shares import shares


@interpreted
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_attention(dtype: torch.dtype, width: int, softcap: float | None) -> None:
    from workbench_kernels.gpu.shares import shares as kernel

    draw = torch.Generator().manual_seed(width)
    lengths = [131, 70]
    keys = torch.randn(sum(lengths) + 9, width, generator=draw).to(dtype)
    query = torch.randn(6, 1, width, generator=draw).to(dtype)
    rows = Ragged(keys, torch.tensor([0, 140 - 9], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), 150)
    scoring = Scoring(0.3, softcap=softcap)
    _, lse = decode_dense.reference(query, rows, rows, scoring, lse=True)
    assert lse is not None
    for found in (shares.reference(query, rows, lse, scoring), kernel(query, rows, lse, scoring)):
        assert found.shape == (2, 3, 1, 150)
        for head, length in enumerate(lengths):
            start = int(rows.starts[head])
            own = keys[None, start : start + length].float()
            _, want = attend(query[3 * head : 3 * head + 3].float(), own, own, scoring, weights=True)
            assert want is not None and not found[head, ..., length:].any()
            assert torch.allclose(found[head, ..., :length], want[0], atol=1e-5)
