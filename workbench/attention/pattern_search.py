"""Which sparse pattern holds most of a head's attention, judged by a few of a prompt's queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.attention.lines import Lines, line_attention
from workbench.attention.token_blocks import Blocks, block_attention
from workbench.core.attention_rows import row_blocks
from workbench.core.partial_softmax import weighted_sum
from workbench_kernels import Scoring

_JUDGES = 16


class Judged(NamedTuple):
    """What judging queries saw and say: their exact output [h, r, dv], and the number of the best pattern, [h]."""

    out: Tensor
    best: Tensor


def judge(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, seen: Sequence[Tensor], scoring: Scoring) -> Judged:
    """The pattern in which the queries at `rows` [r] keep most of their softmax weights, the first of equal ones.

    query [h, n, d], key [k, n, d], value [k, n, dv]; seen: what each pattern lets them see, bool [h, r, m].
    """
    outs, held = [], torch.zeros(len(seen), len(query), device=query.device)
    for block in row_blocks(query[:, rows], key, scoring, query_positions=rows):
        outs.append(weighted_sum(block.probs, value[:, block.keys]).to(query.dtype))
        for number, each in enumerate(seen):
            held[number] += (block.probs * each[:, block.rows, block.keys]).sum(dim=(1, 2))
    return Judged(torch.cat(outs, dim=1), held.argmax(dim=0))


def judges(rows: int, allowed: int) -> list[int]:
    """Up to 16 of the first `rows` queries, evenly spread and the last among them, that take half of the entries
    allowed, which leaves as much for what patterns have to guess.
    """
    for count in range(min(_JUDGES, rows), 0, -1):
        at = sorted(rows - 1 - step * rows // count for step in range(count))
        if judging_entries(at) <= allowed:
            return at
    return []


def judging_entries(rows: Sequence[int]) -> int:
    """The entries of a head that judging by these queries takes at most."""
    return 2 * sum(row + 1 for row in rows)


def fill_heads(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    best: Sequence[int],
    lines: Sequence[Lines],
    plan: Blocks,
    scoring: Scoring,
    *,
    sinks: bool,
) -> int:
    """Fill in `out` [h, r, dv] the attention of the first r queries, each head's in its own pattern; how many entries
    that computes.

    query [h, n, d], key [k, n, d], value [k, n, dv]. best: each head's pattern, by its number in `lines`, or the number
    after the last of them for blocks.
    """
    first, computed = out.shape[1], 0
    for head, choice in enumerate(best):
        group = head * len(key) // len(query)
        rotated, keys, values = query[head, :first], key[group, :first], value[group, :first]
        if choice == len(lines):
            computed += plan.entries
            blocks = block_attention(rotated[None], keys[None], values[None], plan, scoring.of(head), sinks=sinks)
            out[head] = blocks[0]
        else:
            columns, diagonals = (x[head] for x in lines[choice])
            computed += int(lines[choice].entries()[head])
            out[head] = line_attention(rotated, keys, values, columns, diagonals, scoring.of(head))
    return computed
