"""Triton kernels that read a layer's attention: column sums and maxima, pooled maps, log-sum-exps and entropies.

`_columns` is the fast one. A program owns a block of columns of one head, keeps their keys in shared memory and walks
down the rows that see them, so that nothing it sums is shared with another program: no atomics, the same result every
time. Column sums stay in registers, folded only within a thread; cells of the map are finished where their rows end.
`_rows` owns a block of rows instead, and finds their log-sum-exp, their entropy, or both in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workbench_kernels.attention_statistics import Pooling, Reading, cell_edges, check_reading
from workbench_kernels.gpu.scores import LOG2E, aligned, exp2, interpreted, scores
from workbench_kernels.scoring import Scoring

_PART_BYTES = 16 << 20  # parts of cells, where several programs share one, are made for so many heads at a time
_COUNTS = ["n", "m", "first", "last", "window", "heads", "group", "map_rows", "map_cols"]
_COUNTS += ["tall", "parts"]
_NEVER = 1 << 30  # a window that hides nothing


@dataclass(frozen=True)
class Config:
    """How `_columns` is cut: rows and columns of a tile, warps, stages, how many of four exponentials are polynomials
    on the multiply-add units instead of the special function units, and the most registers of a thread.
    """

    rows: int = 64
    cols: int = 256
    warps: int = 4
    stages: int = 3
    polynomial: int = 0
    registers: int | None = None


CONFIGS = [
    Config(64, 256, 4, 3),
    Config(64, 256, 8, 2, registers=128),
    Config(128, 128, 8, 2, registers=128),
    Config(64, 256, 4, 3, polynomial=1),
    Config(64, 256, 8, 2, polynomial=1, registers=128),
    Config(128, 128, 8, 2, polynomial=1, registers=128),
    Config(128, 128, 4, 2),
    Config(64, 128, 4, 2, registers=168),
    Config(64, 128, 4, 2, polynomial=1, registers=168),
    Config(64, 256, 4, 2),
    Config(64, 256, 4, 3, polynomial=2),
    Config(128, 256, 8, 3),
    Config(64, 128, 4, 3),
]
"""Worth trying on a Hopper GPU with 16 bit inputs and d = 128: all leave room for two programs or more on a
multiprocessor, whose products and exponentials then take turns, but for the tallest."""


# Few tiles are masked. Were there nothing in their branch that has to stay there, the assembler would mask every tile,
# under a predicate, which costs as much as all the rest.
_STAY = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")


@triton.jit
def _edge(i, size, cells, each, EVEN: tl.constexpr):
    """Where cell i begins, of `cells` over `size` positions; EVEN: all of them have `each`."""
    if EVEN:
        return i * each
    return (tl.cast(i, tl.int64) * size // cells).to(tl.int32)


@triton.jit
def _cell(at, size, cells):
    """The cell that position `at` lies in."""
    return ((tl.cast(at + 1, tl.int64) * cells - 1) // size).to(tl.int32)


@triton.jit
def _fold(p, WARPS: tl.constexpr, MOST: tl.constexpr):
    """Reduce rows of a tile that one thread holds: [rows, cols] to [warps, 8, cols]."""
    ROWS: tl.constexpr = p.shape[0]
    COLS: tl.constexpr = p.shape[1]
    if ROWS < 16 * WARPS:  # tiles of the interpreter's tests and of float32
        return tl.reshape(p, (1, ROWS, COLS))
    parts = tl.reshape(p, (ROWS // (16 * WARPS), WARPS, 2, 8, COLS))
    if MOST:
        return tl.max(tl.max(parts, 2), 0)
    return tl.sum(tl.sum(parts, 2), 0)


@triton.jit
def _store_cells(at, strip, rows, cell, n, map_rows, map_cols, tall, in_map, POOL: tl.constexpr, EVEN: tl.constexpr):
    """Store one row of cells of which `strip` holds all rows, [rows, across]."""
    top = _edge(cell, n, map_rows, tall, EVEN)
    inside = (rows >= top) & (rows < _edge(cell + 1, n, map_rows, tall, EVEN))
    mine = tl.where(inside[:, None], strip, 0.0)
    value = tl.sum(mine, 0) if POOL == 1 else tl.max(mine, 0)
    exists = tl.full((1,), 0, tl.int32) + cell < map_rows
    tl.store(at + tl.cast(cell, tl.int64) * map_cols, value, mask=in_map & exists)


@triton.jit(do_not_specialize=_COUNTS)
def _columns(
    queries,
    k_ptr,
    lse_ptr,
    sums_ptr,
    most_ptr,
    map_ptr,
    n,
    m,
    first,
    last,
    window,
    heads,
    group,
    k_head,
    k_row,
    factor,
    cap,
    map_rows,
    map_cols,
    tall,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    SUMS: tl.constexpr,
    MOST: tl.constexpr,
    POOL: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLS: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One block of columns of one head, and all rows that see it. The first columns have the longest way: they start.

    POOL: 0 no map, 1 sums, 2 maxima; parts: programs a cell of the map. CELL_COLS: columns that a cell takes of the
    tile, at most COLS. CELL_ROWS: cells that a tile has of rows, 0 where every cell has at least ROWS of them; EVEN:
    all have `tall` rows, and those of at least ROWS a multiple of it. RAGGED: some columns of the tile are not there.
    """
    pid = tl.program_id(0)
    head = pid % heads
    block = pid // heads
    offset = m - n  # query i stands at position offset + i
    ACROSS: tl.constexpr = COLS // CELL_COLS  # cells of the map, from left to right
    slot = tl.arange(0, COLS)
    if POOL == 0:
        cell_left = 0
        left = block * COLS
        cols = left + slot
        right = tl.minimum(left + COLS, m)
        there = cols < m
    else:
        cell_left = block // parts * ACROSS
        begin = block % parts * COLS
        left = _edge(cell_left, m, map_cols, 0, False) + begin
        right = tl.minimum(_edge(tl.minimum(cell_left + ACROSS, map_cols), m, map_cols, 0, False), left + COLS)
        if ACROSS > 1 and RAGGED:  # each cell in its place, with gaps
            cells = cell_left + slot // CELL_COLS
            cols = _edge(cells, m, map_cols, 0, False) + slot % CELL_COLS
            there = (cols < _edge(cells + 1, m, map_cols, 0, False)) & (cells < map_cols)
        else:
            cols = left + slot
            there = cols < right

    d = tl.arange(0, BLOCK_D)
    at = k_ptr + tl.cast(head // group, tl.int64) * k_head + tl.cast(cols, tl.int64)[None, :] * k_row + d[:, None]
    k_t = tl.load(at, mask=there[None, :] & (d[:, None] < D), other=0.0)  # [d, cols]

    # Rows first_row .. last_row - 1 see some of these columns; those from `whole` on, before `leaving`, see all.
    first_row = tl.maximum(tl.maximum(left - offset, 0), first)
    last_row = tl.minimum(last, right - 1 + window - offset)
    whole = tl.maximum(right - 1 - offset, 0)
    leaving = left + window - offset
    row = tl.arange(0, ROWS)
    if CELL_ROWS > 0:  # tiles of whole cells
        start = _cell(first_row, n, map_rows) // CELL_ROWS
        stop = _cell(tl.maximum(last_row - 1, 0), n, map_rows) // CELL_ROWS + 1
    else:
        start = first_row // ROWS
        stop = (last_row + ROWS - 1) // ROWS
    if last_row <= first_row or right <= left:
        stop = start

    FOLDED_BY: tl.constexpr = WARPS if ROWS >= 16 * WARPS else 1
    FOLDED: tl.constexpr = 8 if ROWS >= 16 * WARPS else ROWS
    sums = tl.zeros((FOLDED_BY, FOLDED, COLS), tl.float32)
    most = tl.zeros((FOLDED_BY, FOLDED, COLS), tl.float32)
    running = tl.zeros((ROWS, ACROSS), tl.float32)  # of the cell whose rows have begun, from its columns
    lse_base = lse_ptr + tl.cast(head, tl.int64) * n
    across = tl.arange(0, ACROSS)
    in_map = (cell_left + across) < map_cols
    map_base = lse_ptr
    if POOL > 0:
        map_stride = tl.cast(map_rows, tl.int64) * map_cols
        map_base = map_ptr + (tl.cast(head, tl.int64) * parts + block % parts) * map_stride + cell_left + across
    cell = 0
    end = 0
    if CELL_ROWS == 0 and POOL > 0:  # the cell of `running`, and where it ends
        cell = _cell(start * ROWS, n, map_rows)
        end = _edge(cell + 1, n, map_rows, tall, EVEN)

    for tile in tl.range(start, stop, num_stages=STAGES):
        if CELL_ROWS > 0:
            top = _edge(tile * CELL_ROWS, n, map_rows, tall, EVEN)
            bottom = _edge(tl.minimum(tile * CELL_ROWS + CELL_ROWS, map_rows), n, map_rows, tall, EVEN)
        else:
            top = tile * ROWS
            bottom = tl.minimum(top + ROWS, n)
        q = tl.reshape(queries.load([head, top, 0]), (ROWS, BLOCK_D))
        rows = top + row
        # A row that does not count has an infinite log-sum-exp: all its weights are zero, without a mask.
        counted = (rows >= first) & (rows < tl.minimum(last, bottom))
        lse = tl.load(lse_base + rows, mask=counted, other=float("inf")) * 1.4426950408889634
        s = scores(q, k_t, factor, cap, SOFTCAP, PRECISION, INTERPRET)
        x = s - lse[:, None]
        if (top < whole) | (bottom > leaving):
            base = offset
            if not INTERPRET:
                base = tl.inline_asm_elementwise(_STAY, "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)
            place = (base + rows)[:, None]
            x = tl.where(cols[None, :] <= place, x, float("-inf"))
            if WINDOW:
                x = tl.where(cols[None, :] > place - window, x, float("-inf"))
        if RAGGED:
            x = tl.where(there[None, :], x, float("-inf"))
        p = exp2(x, POLYNOMIAL, INTERPRET)
        if SUMS:
            sums += _fold(p, WARPS, False)
        if MOST:
            most = tl.maximum(most, _fold(p, WARPS, True))
        if POOL > 0:
            by_cell = tl.reshape(p, (ROWS, ACROSS, CELL_COLS))
            strip = tl.sum(by_cell, 2) if POOL == 1 else tl.max(by_cell, 2)  # [rows, across]
            if CELL_ROWS > 0:
                if CELL_ROWS <= 4:
                    for i in tl.static_range(CELL_ROWS):
                        _store_cells(
                            map_base, strip, rows, tile * CELL_ROWS + i, n, map_rows, map_cols, tall, in_map, POOL, EVEN
                        )
                else:  # many: such maps are of short prompts
                    for i in range(CELL_ROWS):
                        _store_cells(
                            map_base, strip, rows, tile * CELL_ROWS + i, n, map_rows, map_cols, tall, in_map, POOL, EVEN
                        )
            else:
                mine = strip
                if not EVEN:
                    mine = tl.where((rows < end)[:, None], strip, 0.0)
                running = running + mine if POOL == 1 else tl.maximum(running, mine)
                if end <= top + ROWS:
                    value = tl.sum(running, 0) if POOL == 1 else tl.max(running, 0)
                    tl.store(map_base + tl.cast(cell, tl.int64) * map_cols, value, mask=in_map)
                    running = tl.zeros((ROWS, ACROSS), tl.float32)
                    if not EVEN:
                        running = tl.where((rows < end)[:, None], 0.0, strip)
                    cell += 1
                    end = _edge(cell + 1, n, map_rows, tall, EVEN)
    if POOL > 0 and CELL_ROWS == 0:  # a constant, apart from the next, which is not
        if cell < map_rows:  # a window may end before the cell does
            value = tl.sum(running, 0) if POOL == 1 else tl.max(running, 0)
            tl.store(map_base + tl.cast(cell, tl.int64) * map_cols, value, mask=in_map)
    out = tl.cast(head, tl.int64) * m + cols
    if SUMS:
        tl.store(sums_ptr + out, tl.sum(tl.sum(sums, 1), 0), mask=there)
    if MOST:
        tl.store(most_ptr + out, tl.max(tl.max(most, 1), 0), mask=there)


@triton.jit(do_not_specialize=_COUNTS)
def _rows(
    q_ptr,
    keys,
    lse_ptr,
    entropy_ptr,
    n,
    m,
    window,
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
    GIVEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One block of rows of one head, and all columns they see: the log-sum-exp unless GIVEN, and the entropy if asked.

    The last rows have the longest way: they start.
    """
    pid = tl.program_id(0)
    head = pid % heads
    top = (tl.num_programs(0) // heads - 1 - pid // heads) * ROWS
    offset = m - n
    rows = top + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    at = q_ptr + tl.cast(head, tl.int64) * q_head + tl.cast(rows, tl.int64)[:, None] * q_row + d[None, :]
    q = tl.load(at, mask=(rows < n)[:, None] & (d < D)[None, :], other=0.0)
    out = tl.cast(head, tl.int64) * n + rows
    kv = head // group
    start = tl.maximum(offset + top - window + 1, 0) // COLS
    bottom = tl.minimum(top + ROWS, n)
    stop = (offset + bottom + COLS - 1) // COLS

    # Hidden scores are finite: zero weight times an infinite logarithm would not be a number.
    high = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    spread = tl.zeros((ROWS,), tl.float32)  # sum of weight * log2(weight), in the units of the moment
    if GIVEN:
        high = tl.load(lse_ptr + out, mask=rows < n, other=0.0) * 1.4426950408889634
    for tile in tl.range(start, stop, num_stages=STAGES):
        left = tile * COLS
        k = tl.reshape(keys.load([kv, left, 0]), (COLS, BLOCK_D))
        x = scores(q, tl.trans(k), factor, cap, SOFTCAP, PRECISION, INTERPRET)
        if (left + COLS > offset + top + 1) | (left <= offset + bottom - 1 - window):
            behind = (offset + rows)[:, None] - (left + tl.arange(0, COLS))[None, :]
            x = tl.where((behind >= 0) & (behind < window), x, -1.0e30)
        if GIVEN:
            x -= high[:, None]
            p = exp2(x, 0, INTERPRET)
            spread += tl.sum(p * x, 1)
        else:
            higher = tl.maximum(high, tl.max(x, 1))
            x -= higher[:, None]
            p = exp2(x, 0, INTERPRET)
            moved = high - higher
            shrink = tl.exp2(moved)
            if ENTROPY:
                spread = (spread + moved * total) * shrink + tl.sum(p * x, 1)
            total = total * shrink + tl.sum(p, 1)
            high = higher
    if GIVEN:
        tl.store(entropy_ptr + out, tl.maximum(-spread * 0.6931471805599453, 0.0), mask=rows < n)
    else:
        tl.store(lse_ptr + out, (high + tl.log2(total)) * 0.6931471805599453, mask=rows < n)
        if ENTROPY:
            value = (tl.log2(total) - spread / total) * 0.6931471805599453
            tl.store(entropy_ptr + out, tl.maximum(value, 0.0), mask=rows < n)


def read_attention(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    *,
    lse: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    sums: bool = True,
    most: bool = False,
    entropy: bool = False,
    pooling: Pooling | None = None,
    pixels: int = 512,
    config: Config | None = None,
) -> Reading:
    """As `workbench_kernels.reading.read_attention`; config: how the work is cut, chosen by default."""
    first, last = check_reading(query, key, scoring, lse, rows, pooling, pixels)
    scale, window, softcap = scoring.scale, scoring.window, scoring.softcap
    query, key = aligned(query), aligned(key)
    (h, n, d), (k, m, _) = query.shape, key.shape
    group = h // k
    spread = None
    reach = _NEVER if window is None else min(window, _NEVER)
    factor, cap = (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E)
    shared: dict[str, Any] = {
        "D": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "SOFTCAP": softcap is not None,
        # One TF32 product would lose half of the digits; three keep nearly all.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "INTERPRET": interpreted(),
    }
    if lse is None or entropy:
        given = lse is not None
        lse = query.new_empty((h, n), dtype=torch.float32) if lse is None else lse.contiguous()
        spread = query.new_empty((h, n), dtype=torch.float32) if entropy else None
        tall, wide, warps, stages = _row_tiles(query, shared["BLOCK_D"])
        keys = TensorDescriptor.from_tensor(key, [1, wide, shared["BLOCK_D"]])
        _rows[(triton.cdiv(n, tall) * h,)](
            query,
            keys,
            lse,
            spread,
            n,
            m,
            reach,
            h,
            group,
            query.stride(0),
            query.stride(1),
            factor,
            cap,
            ROWS=tall,
            COLS=wide,
            STAGES=stages,
            GIVEN=given,
            ENTROPY=entropy,
            num_warps=warps,
            **shared,
        )
    lse = lse.contiguous()
    if not (sums or most or pooling):
        return Reading(lse, None, None, spread, None)

    wanted = config or _tiles(query, shared["BLOCK_D"], most, m, pixels if pooling else None)
    height, width = (min(pixels, n), min(pixels, m)) if pooling else (1, 1)
    tall, wide = -(-n // height), -(-m // width)  # of the largest cells
    cell_cols = min(wanted.cols, triton.next_power_of_2(wide)) if pooling else wanted.cols
    parts = -(-wide // wanted.cols) if pooling else 1
    blocks = parts * -(-width // (wanted.cols // cell_cols)) if pooling else -(-m // wanted.cols)
    small = pooling is not None and n // height < wanted.rows
    even = n % height == 0 and (small or tall % wanted.rows == 0)
    ragged = pooling is not None and (m % width > 0 or wide % cell_cols > 0 or width % (wanted.cols // cell_cols) > 0)

    received = query.new_empty((h, m), dtype=torch.float32) if sums else None
    largest = query.new_empty((h, m), dtype=torch.float32) if most else None
    cells = query.new_zeros((h, height, width), dtype=torch.float32) if pooling else None
    each = h  # heads at a time
    if parts > 1:
        each = min(h, max(1, _PART_BYTES // (4 * parts * height * width * group)) * group)
    for head in range(0, h, each):
        some = slice(head, min(h, head + each))
        count = some.stop - some.start
        mine = None if cells is None else cells[some]
        if parts > 1:
            mine = query.new_zeros((count, parts, height, width), dtype=torch.float32)
        _columns[(blocks * count,)](
            TensorDescriptor.from_tensor(query[some], [1, wanted.rows, shared["BLOCK_D"]]),
            key[head // group :],
            lse[some],
            None if received is None else received[some],
            None if largest is None else largest[some],
            mine,
            n,
            m,
            first,
            last,
            reach,
            count,
            group,
            key.stride(0),
            key.stride(1),
            factor,
            cap,
            height,
            width,
            n // height,
            parts,
            ROWS=wanted.rows,
            COLS=wanted.cols,
            WARPS=min(wanted.warps, max(4, wanted.rows // 16)),
            STAGES=wanted.stages,
            SUMS=sums,
            MOST=most,
            POOL=0 if pooling is None else 2 if pooling == "max" else 1,
            CELL_ROWS=max(1, wanted.rows // tall) if small else 0,
            CELL_COLS=cell_cols,
            EVEN=even,
            RAGGED=ragged,
            WINDOW=window is not None,
            POLYNOMIAL=wanted.polynomial,
            num_warps=wanted.warps,
            maxnreg=wanted.registers,
            **shared,
        )
        if parts > 1 and cells is not None and mine is not None:
            if pooling == "max":
                torch.amax(mine, dim=1, out=cells[some])
            else:
                torch.sum(mine, dim=1, out=cells[some])
    mine = None
    if pooling == "mean" and cells is not None:
        tops, lefts = (cell_edges(size, pixels, query.device).diff() for size in (n, m))
        cells /= tops[:, None] * lefts
    return Reading(lse, received, largest, spread, cells)


def _tiles(query: Tensor, width: int, most: bool, m: int, pixels: int | None) -> Config:
    """The tiles of `_columns` that fit into registers and shared memory, and waste little at the edges of cells."""
    if interpreted():
        return Config(16, 32, 4, 1)
    if query.dtype == torch.float32:
        return Config(64, 64, 4, 2) if width <= 128 else Config(64, 32, 4, 2)
    if width > 128:
        return Config(64, 128, 4, 2)
    cols = 128 if most else 256
    if pixels is not None and not most and -(-m // min(pixels, m)) >= 256:
        return Config(64, 128, 4, 2, registers=168)  # the map's cells need registers, which wider tiles have not left
    if pixels is not None and cols == 256:
        wide = -(-m // min(pixels, m))
        if wide > 128 and -(-wide // 128) * 128 <= 0.8 * (-(-wide // 256) * 256):
            cols = 128
    return Config(64, 256, 4, 3) if cols == 256 else Config(128, 128, 8, 2, registers=None if most else 128)


def _row_tiles(query: Tensor, width: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile of `_rows`, its warps and stages."""
    if interpreted():
        return 16, 32, 4, 1
    if query.dtype == torch.float32:
        return 64, 64 if width <= 128 else 32, 4, 2
    return (128, 128, 8, 2) if width <= 128 else (64, 64, 4, 2)
