"""Where a token's rows go: what the kernel writes is what the reference does, and nothing beside it."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from workbench_kernels.placing import Beside, place


@interpreted
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("first", [None, 97])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_rows_are_placed_head_by_head(width: int, first: int | None, alike: bool) -> None:
    from workbench_kernels.gpu.placing import place as kernel

    slots = torch.randint(0, 9, (6, 1 if alike else 3), generator=torch.Generator().manual_seed(width))
    given = []
    for run in (place.reference, kernel):
        ends = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        states = torch.ones(30, width) if width else None
        beside = Beside(torch.full((27, 1), -1, dtype=torch.int32), states)
        run(slots, torch.tensor([100]), first, ends, (9, 12), beside)
        given.append([*ends, beside.positions, *([] if states is None else [states])])
    for mine, other in zip(*given, strict=True):
        assert torch.equal(mine, other)
    line = slots[0 if first is None else 3].expand(3)
    assert given[1][0].tolist() == (torch.arange(3) * 9 + line).tolist()
    assert (given[1][2] == 100).sum() == 3 and (not width or int((given[1][3] == 0).sum()) == 3 * width)
