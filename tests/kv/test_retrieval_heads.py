"""What a head is said to retrieve, by its attention on one task; how a model is measured stands with HeadKV."""

from __future__ import annotations

import pytest
import torch

from workbench.kv.needle_tasks import Task
from workbench.kv.retrieval_heads import copied, reasoned


def test_a_head_that_copies_scores_one_and_one_that_only_looks_scores_its_attention() -> None:
    task = Task(torch.tensor([9, 1, 2, 3, 8, 7, 1, 2]), 1, torch.tensor([1, 2, 3]))
    rows = torch.full((3, 3, 8), 0.01)
    for i in range(3):
        rows[0, i, 1 + i] = 0.9  # on the token that comes next
        rows[1, i, 1 + (i + 1) % 3] = 0.5  # on the needle, but another token
        rows[2, i, 4] = 0.9  # elsewhere
    assert copied(rows, task).tolist() == [1, 0, 0]
    assert reasoned(rows[:2, :, 1:4].new_zeros(1, 3, 8).index_fill(2, torch.tensor([4, 5, 6]), 0.3), task).tolist() == [
        0
    ]
    spread = rows.clone()
    spread[:, :, [1, 2, 3]] += 0.05  # the needle is each row's runner-up too
    assert reasoned(spread, task)[:2].tolist() == pytest.approx([3 * 1.07 / 3, 3 * 0.67 / 3], abs=1e-5)
