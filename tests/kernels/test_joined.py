"""A few rows joined to attention over others: as attention over all of them."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from workbench_kernels import Scoring
from workbench_kernels.decode import decode_dense
from workbench_kernels.joined import joined
from workbench_kernels.rotary import Turn, rotate
from workbench_kernels.rows import Ragged


@interpreted
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("rows", "turned"), [(4, 24), (1, 16), (13, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_join_as_if_all_had_been_attended_to(
    dtype: torch.dtype, rows: int, turned: int, softcap: float | None
) -> None:
    from workbench_kernels.gpu.joined import joined as kernel

    draw = torch.Generator().manual_seed(rows)
    query = torch.randn(6, 1, 24, generator=draw).to(dtype)
    keys, values = (torch.randn(2, 40, width, generator=draw).to(dtype) for width in (24, 20))
    scoring = Scoring(0.3, softcap=softcap)
    rest = (Ragged.of(x[:, rows:]) for x in (keys, values))
    out, lse = decode_dense.reference(query, *rest, scoring, lse=True)
    assert lse is not None
    turn, asked = None, query
    if turned:
        angles = torch.randn(7, turned // 2, generator=draw).repeat(1, 2)
        turn = Turn(angles.cos(), angles.sin(), torch.tensor([3]))
        asked = rotate(query.float(), angles[3:4].cos(), angles[3:4].sin()).to(dtype)
    scores = [scoring.scores(query.float().view(2, 3, 24) @ keys[:, rows:].float().mT)]
    scores.append(scoring.scores(asked.float().view(2, 3, 24) @ keys[:, :rows].float().mT))
    weights = torch.softmax(torch.cat(scores, dim=2), dim=2)
    expected = weights @ torch.cat([values[:, rows:], values[:, :rows]], dim=1).float()
    for join in (joined.reference, kernel):
        found = join(out, lse, query, keys[:, :rows].contiguous(), values[:, :rows].contiguous(), scoring, turn)
        assert found.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 0.02
        assert (found.float() - expected.view(6, 1, 20)).norm() < bound * expected.norm()
