"""KeyDiff block by block, against plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.kv.support import TOKENS, trace_of
from workbench.kv import KeyDiff
from workbench.runtime.planning import make_plan


def kept_plainly(keys: torch.Tensor, block: int, room: int) -> list[int]:
    """The positions of one head's keys [n, d] that are held at the end."""
    held: list[int] = []
    for start in range(0, len(keys), block):
        held += range(start, min(start + block, len(keys)))
        units = [keys[p] / keys[p].norm() for p in held]
        anchor = torch.stack(units).mean(dim=0)
        alike = {p: float(unit @ anchor) for p, unit in zip(held, units, strict=True)}
        held = sorted(sorted(held, key=lambda p: alike[p])[:room])
    return held


@pytest.mark.parametrize("block", [1, 16, 30, TOKENS])
@pytest.mark.parametrize("room", [5, 12, 40, TOKENS])
def test_after_each_block_the_most_different_keys_stay(block: int, room: int) -> None:
    trace = trace_of()
    plan = make_plan(trace, [KeyDiff(block=block, budget=f"{room} tokens")], torch.float32)
    for layer in trace.layers:
        for head in range(layer.kv_heads):
            assert plan.kept(layer.index, head).tolist() == kept_plainly(layer.keys[head], block, room)


def test_a_block_of_the_whole_prompt_is_scoring_at_once() -> None:
    trace = trace_of()
    plans = [make_plan(trace, [KeyDiff(block=block, budget=0.4)], torch.bfloat16) for block in (0, TOKENS)]
    assert torch.equal(plans[0].tiers, plans[1].tiers)
    assert plans[1].nbytes <= 0.4 * plans[1].full_nbytes
