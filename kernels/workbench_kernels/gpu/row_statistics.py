"""The Triton kernel of `workbench_kernels.row_statistics`: a program owns a block of rows and walks over their keys.

Everything is summed online, as log-sum-exps are: sums are relative to the highest score so far, and scaled down where a
higher one comes. Keys come from the first to the row's own, so distances only shrink: where one passes a bound, what
was summed until then is all that lies beyond it, and is written down. Far from the diagonal a tile crosses at most one
power of two; only the tiles near it are looked at bound by bound. Nothing is shared among programs: no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workbench_kernels.attention_statistics import RowStatistics, before_each, check_statistics
from workbench_kernels.gpu.scores import LOG2E, aligned, exp2, interpreted, scores
from workbench_kernels.scoring import Scoring

_COUNTS = ["n", "m", "offset", "shared", "window", "near", "early", "recent", "bins", "heads", "group"]
_NEVER = 1 << 30  # a window that hides nothing


@dataclass(frozen=True)
class Config:
    """Rows and columns of a tile, warps, stages, and the most registers of a thread."""

    rows: int = 64
    cols: int = 128
    warps: int = 4
    stages: int = 2
    registers: int | None = None


CONFIGS = [
    Config(),
    Config(64, 128, 4, 2, 168),
    Config(64, 64, 4, 2, 168),
    Config(64, 64, 4, 2, None),
    Config(128, 128, 8, 2, None),
    Config(128, 64, 8, 2, 128),
    Config(64, 128, 4, 1, None),
]
"""Worth trying on a Hopper GPU with 16 bit inputs and d = 128: most leave room for two programs or three on a
multiprocessor, whose products and exponentials then take turns.
"""


@triton.jit
def _added(x, high, total, spread, moment, first, followed, match, left, held, at, early, INTERPRET: tl.constexpr):
    """The sums with the weights of one tile's scores x [rows, cols]; the tile's weights, and what was summed before it.

    match: which keys follow the row's own token. left: the position of the tile's first key; held: of all of them.
    """
    higher = tl.maximum(high, tl.max(x, 1))
    x -= higher[:, None]
    p = exp2(x, 0, INTERPRET)
    moved = high - higher
    shrink = tl.exp2(moved)
    mass = tl.sum(p, 1)
    spread = (spread + moved * total) * shrink + tl.sum(p * x, 1)
    # Relative to the tile distances are small numbers, exact in float32.
    inside = tl.sum(p * (held - left).to(tl.float32)[None, :], 1)
    moment = moment * shrink + ((at - left).to(tl.float32) * mass - inside)
    followed = followed * shrink + tl.sum(tl.where(match, p, 0.0), 1)
    first *= shrink
    if left < early:
        first += tl.sum(tl.where(held[None, :] < early, p, 0.0), 1)
    past = total * shrink
    return higher, past + mass, spread, moment, first, followed, p, past


@triton.jit
def _write_beyond(to, bound, p, past, high, at, held, left, there):
    """Write the logarithm of all weights `bound` or more positions back, for rows whose bound lies in this tile."""
    last = at - bound
    beyond = past + tl.sum(tl.where(held[None, :] <= last[:, None], p, 0.0), 1)
    tl.store(to, tl.log2(tl.maximum(beyond, 1e-38)) + high, mask=there & (last >= left))


@triton.jit(do_not_specialize=_COUNTS)
def _statistics(
    q_ptr,
    keys,
    own_ptr,
    before_ptr,
    held_ptr,
    starts_ptr,
    stops_ptr,
    sinks_ptr,
    lse_ptr,
    entropy_ptr,
    distance_ptr,
    first_ptr,
    follows_ptr,
    beyond_ptr,
    n,
    m,
    offset,
    shared,
    window,
    near,
    early,
    recent,
    bins,
    heads,
    group,
    q_head,
    q_row,
    factor,
    cap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
    HELD: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One block of rows of one head. The last rows have the longest way: they start.

    HELD: keys stand at the positions held [k or 1, m], and rows see tiles from starts to stops, [k or 1, blocks of
    rows]; shared: 0 where all KV heads hold the same, otherwise 1. Else they stand at 0 .. m - 1.
    """
    pid = tl.program_id(0)
    head = pid % heads
    blocks = tl.num_programs(0) // heads
    top = (blocks - 1 - pid // heads) * ROWS
    rows = top + tl.arange(0, ROWS)
    there = rows < n
    at = offset + rows
    slot = tl.arange(0, COLS)
    d = tl.arange(0, BLOCK_D)
    from_q = q_ptr + tl.cast(head, tl.int64) * q_head + tl.cast(rows, tl.int64)[:, None] * q_row + d[None, :]
    q = tl.load(from_q, mask=there[:, None] & (d < D)[None, :], other=0.0)
    own = tl.load(own_ptr + rows, mask=there, other=-2)
    out = tl.cast(head, tl.int64) * n + rows
    beyond_at = beyond_ptr + tl.cast(head, tl.int64) * (bins + 1) * n + rows
    kv = head // group
    bottom = tl.minimum(top + ROWS, n)
    of_kv = kv * shared
    before_at = before_ptr + tl.cast(of_kv, tl.int64) * m
    held_at = held_ptr
    if HELD:
        held_at = held_ptr + tl.cast(of_kv, tl.int64) * m
        start = tl.load(starts_ptr + of_kv * blocks + top // ROWS)
        stop = tl.load(stops_ptr + of_kv * blocks + top // ROWS)
        middle = start
    else:
        start = tl.maximum(offset + top - window + 1, 0) // COLS
        stop = (offset + bottom + COLS - 1) // COLS
        # All keys of the tiles before this one stand at least `near` positions behind all rows.
        middle = tl.minimum(tl.maximum(tl.maximum(offset + top - near + 1, 0) // COLS, start), stop)

    # Hidden scores are finite: zero weight times an infinite logarithm would not be a number.
    high = tl.full((ROWS,), -1.0e30, tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head) * 1.4426950408889634
        high = tl.zeros((ROWS,), tl.float32) + sink
    total = tl.zeros((ROWS,), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)  # sum of weight * log2(weight), in the units of the moment
    moment = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS,), tl.float32)
    followed = tl.zeros((ROWS,), tl.float32)
    bound = tl.full((), 1, tl.int32)  # the largest power of two that a key of the tile stands behind a row
    place = tl.full((), 0, tl.int32)  # its exponent
    if not HELD:
        while bound * 2 <= offset + bottom - 1 - start * COLS:
            bound *= 2
            place += 1

    for tile in tl.range(start, middle, num_stages=STAGES):
        left = tile * COLS
        cols = left + slot
        k = tl.reshape(keys.load([kv, left, 0]), (COLS, BLOCK_D))
        before = tl.load(before_at + cols)
        x = scores(q, tl.trans(k), factor, cap, SOFTCAP, PRECISION, INTERPRET)
        if WINDOW:
            x = tl.where(cols[None, :] > (at - window)[:, None], x, -1.0e30)
        match = own[:, None] == before[None, :]
        high, total, spread, moment, first, followed, p, past = _added(
            x, high, total, spread, moment, first, followed, match, left, cols, at, early, INTERPRET
        )
        if bound > offset + bottom - 1 - left:
            bound = bound // 2
            place -= 1
        if bound > offset + top - left - COLS:
            _write_beyond(beyond_at + tl.cast(place, tl.int64) * n, bound, p, past, high, at, cols, left, there)

    for tile in tl.range(middle, stop, num_stages=1):
        left = tile * COLS
        cols = left + slot
        k = tl.reshape(keys.load([kv, left, 0]), (COLS, BLOCK_D))
        before = tl.load(before_at + cols, mask=cols < m, other=-1)
        x = scores(q, tl.trans(k), factor, cap, SOFTCAP, PRECISION, INTERPRET)
        if HELD:
            held = tl.load(held_at + cols, mask=cols < m, other=1 << 30)
            nearest = tl.load(held_at + left)
            next_one = tl.load(held_at + left + COLS, mask=left + COLS < m, other=1 << 30)
        else:
            held = cols
            nearest = left
            next_one = left + COLS
        x = tl.where((held[None, :] <= at[:, None]) & (held[None, :] > (at - window)[:, None]), x, -1.0e30)
        match = (own[:, None] == before[None, :]) & (held[None, :] < at[:, None])
        high, total, spread, moment, first, followed, p, past = _added(
            x, high, total, spread, moment, first, followed, match, nearest, held, at, early, INTERPRET
        )
        # A row's bound lies in the last tile whose first key is beyond it: not in this one where all the next ones are.
        for index in range(bins + 1):
            limit = recent
            if index < bins:
                limit = 1 << index
            if (limit > offset + top - next_one) & (limit <= offset + bottom - 1 - nearest):
                to = beyond_at + tl.cast(index, tl.int64) * n
                _write_beyond(to, limit, p, past, high, at, held, nearest, there)

    whole = total
    if SINKS:
        whole += tl.exp2(sink - high)
    if HELD:  # a row may see nothing
        whole = tl.maximum(whole, 1e-38)
    tl.store(lse_ptr + out, (high + tl.log2(whole)) * 0.6931471805599453, mask=there)
    entropy = (tl.log2(whole) * total - spread) / whole * 0.6931471805599453
    tl.store(entropy_ptr + out, tl.maximum(entropy, 0.0), mask=there)
    tl.store(distance_ptr + out, tl.maximum(moment / whole, 0.0), mask=there)
    tl.store(first_ptr + out, first / whole, mask=there)
    tl.store(follows_ptr + out, followed / whole, mask=there)


def row_statistics(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    tokens: Tensor,
    *,
    early: int,
    recent: int,
    bins: int,
    held: Tensor | None = None,
    config: Config | None = None,
) -> RowStatistics:
    """As `workbench_kernels.row_statistics.row_statistics`; config: how the work is cut."""
    places = check_statistics(query, key, scoring, tokens, early, recent, bins, held)
    softcap, device = scoring.softcap, query.device
    sinks = None if scoring.sinks is None else scoring.sinks.to(device, torch.float32)
    query, key = aligned(query), aligned(key)
    (h, n, d), (k, m, _) = query.shape, key.shape
    factor, cap = (scoring.scale * LOG2E, 0.0) if softcap is None else (scoring.scale / softcap, softcap * LOG2E)
    width = max(16, triton.next_power_of_2(d))
    chosen = config or _tiles(query, width, evicted=places is not None)
    tokens = tokens.to(device, torch.int32)
    positions = torch.arange(m, device=device)[None] if places is None else places.to(device).contiguous()
    starts = stops = None
    if places is not None:
        starts, stops = _tiles_seen(positions, len(tokens) - n, len(tokens), scoring.window, chosen)
        positions = positions.int()
    lse, entropy, distance, first, follows = (query.new_empty((h, n), dtype=torch.float32) for _ in range(5))
    within = query.new_full((h, bins + 1, n), -torch.inf, dtype=torch.float32)  # nothing lies beyond
    _statistics[(triton.cdiv(n, chosen.rows) * h,)](
        query,
        TensorDescriptor.from_tensor(key, [1, chosen.cols, width]),
        tokens[len(tokens) - n :].contiguous(),
        before_each(tokens, positions).contiguous(),
        None if places is None else positions,
        starts,
        stops,
        sinks,
        lse,
        entropy,
        distance,
        first,
        follows,
        within,
        n,
        m,
        len(tokens) - n,
        int(len(positions) > 1),
        _NEVER if scoring.window is None else min(scoring.window, _NEVER),
        max(triton.next_power_of_2(chosen.rows + chosen.cols), recent + 1),
        early,
        recent,
        bins,
        h,
        h // k,
        query.stride(0),
        query.stride(1),
        factor,
        cap,
        D=d,
        BLOCK_D=width,
        ROWS=chosen.rows,
        COLS=chosen.cols,
        STAGES=chosen.stages,
        HELD=places is not None,
        WINDOW=scoring.window is not None,
        SINKS=sinks is not None,
        SOFTCAP=softcap is not None,
        # One TF32 product would lose half of the digits; three keep nearly all.
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        INTERPRET=interpreted(),
        num_warps=chosen.warps,
        maxnreg=chosen.registers,
    )
    # What the keys get of a row, less what lies beyond each bound.
    within.sub_(lse[:, None], alpha=LOG2E).exp2_().neg_()
    within += 1 if sinks is None else 1 - torch.exp(sinks[:, None] - lse)[:, None]
    found = RowStatistics(lse, entropy, distance, first, follows, within.clamp_(min=0.0))
    return found if places is None else _without_blind(found, positions, scoring, len(tokens) - n)


def _tiles_seen(positions: Tensor, begin: int, end: int, window: int | None, config: Config) -> tuple[Tensor, Tensor]:
    """The range of tiles of keys at positions [k or 1, m] that each block of the rows at begin .. end - 1 sees."""
    tops = torch.arange(begin, end, config.rows, device=positions.device).expand(len(positions), -1)
    first = tops - (end if window is None else window - 1)
    last = (tops + config.rows - 1).clamp(max=end - 1)
    starts = torch.searchsorted(positions, first.contiguous()) // config.cols
    stops = -(-torch.searchsorted(positions, last.contiguous(), right=True) // config.cols)
    return starts.int().contiguous(), stops.int().contiguous()


def _without_blind(found: RowStatistics, positions: Tensor, scoring: Scoring, begin: int) -> RowStatistics:
    """The same with nothing in rows from position `begin` on that see no key."""
    (h, n), window = found.lse.shape, scoring.window
    at = torch.arange(begin, begin + n, device=positions.device).expand(len(positions), -1).contiguous()
    stops = torch.searchsorted(positions.long(), at, right=True)
    starts = torch.zeros_like(stops) if window is None else torch.searchsorted(positions.long(), at - (window - 1))
    blind = (starts >= stops).repeat_interleave(h // len(positions), dim=0)  # [h, n]
    lse, *shares = found
    alone = lse.new_full((h, 1), -torch.inf) if scoring.sinks is None else scoring.sinks.to(lse)[:, None]
    hidden = (x.masked_fill_(blind if x.ndim == 2 else blind[:, None], 0.0) for x in shares)
    return RowStatistics(torch.where(blind, alone, lse), *hidden)


def _tiles(query: Tensor, width: int, *, evicted: bool) -> Config:
    """The tiles that fit into registers and shared memory."""
    if interpreted():
        return Config(16, 32, 4, 1, None)
    if query.dtype == torch.float32:
        return Config(64, 64 if width <= 128 else 32, 4, 2, None)
    if width > 128:
        return Config(64, 64, 4, 2, None)
    return Config(64, 64, 4, 2, 168) if evicted else CONFIGS[0]
