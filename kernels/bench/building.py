"""Building a compressed cache: kept sets listed, rows gathered, quantised and packed, made sparse, and read back.

One layer of 8 KV heads and a head size of 128 in bfloat16, all of it kept or a random quarter. Beside every kernel is
what PyTorch does on the same device: the reference, with boolean indexing where the kernel has a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from bench.measure import run_poisoned, time_us
from workbench_kernels import building, unpack
from workbench_kernels.kept import Kept
from workbench_kernels.rows import Axis

HEADS, WIDTH, GROUP = 8, 128, 64
TOKENS, FEW, CHECKED = 131072, 8192, 2048
SHARES = (0.25, 1.0)
BITS = (2, 4, 8)
COUNT = 39  # numbers of a row that stay where 70 % are pruned
BASELINE_MS = 30.0  # how long a baseline of several milliseconds is repeated

Row = dict[str, Any]


def rows(quick: bool) -> Iterator[Row]:
    """What differs from the reference, then times; quick: a short cache."""
    yield from errors()
    tokens = FEW if quick else TOKENS
    yield from selection(tokens)
    for share in SHARES:
        yield from times(tokens, share)


def tensors(tokens: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a layer and which tokens it keeps."""
    keys, values = (torch.randn(HEADS, tokens, WIDTH, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return keys, values, torch.rand(HEADS, tokens, device="cuda") < share


def on_host(chosen: Kept) -> Kept:
    """The same list in host memory."""
    places, starts, begins, lengths = (part.cpu() for part in chosen[:4])
    return Kept(places, starts, begins, lengths, chosen.counts, chosen.tokens)


def errors() -> Iterator[Row]:
    """How many numbers differ from the reference on a CPU, where float32 division is that of IEEE 754; 0 is wanted."""
    keys, values, keep = tensors(CHECKED, 0.6)
    chosen = building.kept(keep)
    here = building.kept.reference(keep.cpu())
    wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(chosen[:5], here[:5], strict=True))
    yield {"what": "check: kept", "different": wrong}
    rows = run_poisoned(partial(building.gather, (keys, values), chosen, torch.float16))
    wanted = building.gather.reference((keys.cpu(), values.cpu()), here, torch.float16)
    yield {"what": "check: gather", "different": _different(rows, wanted)}
    balance = (torch.rand(HEADS, WIDTH, device="cuda") + 0.5).half()
    for axis in get_args(Axis):
        rows_of = chosen.first(chosen.counts // GROUP * GROUP)
        for bits in (1, *BITS):
            for factors in (None, balance):
                work = partial(building.quantise_rows, keys, bits, GROUP, axis, chosen=rows_of, balance=factors)
                codes, scale, zero = run_poisoned(work)
                cpu = None if factors is None else factors.cpu()
                wanted = building.quantise_rows.reference(
                    keys.cpu(), bits, GROUP, axis, chosen=on_host(rows_of), balance=cpu
                )
                torch_here = building.quantise_rows.reference(keys, bits, GROUP, axis, chosen=rows_of, balance=factors)
                owners = rows_of.entries()[0]
                read = (bits, GROUP, axis, WIDTH, torch.bfloat16)
                back = run_poisoned(
                    partial(building.dequantise_rows, codes, scale, zero, *read, balance=factors, owners=owners)
                )
                plain = building.dequantise_rows.reference(
                    codes.cpu(), scale.cpu(), zero.cpu(), *read, balance=cpu, owners=owners.cpu()
                )
                yield {
                    "what": f"check: {bits} bits per {axis}" + ("" if factors is None else ", balanced"),
                    "different": _different((codes, scale, zero), wanted),
                    "codes of PyTorch on this GPU that differ": int((torch_here[0].cpu() != wanted[0]).sum()),
                    "different when read back": _different((back,), (plain,)),
                }
    for dtype in (torch.bfloat16, torch.float32):
        numbers, bitmap = run_poisoned(partial(building.sparse_rows, keys.to(dtype), COUNT, dtype, chosen=chosen))
        back = run_poisoned(partial(building.expand_rows, numbers, bitmap, WIDTH, dtype))
        exact = keys.to(dtype)[keep]
        bits_set = unpack(bitmap, 1, WIDTH)
        largest = exact.abs().sort(dim=1, descending=True).values[:, :COUNT]
        wrong = int((bits_set.sum(dim=1) != COUNT).sum()) + _different((back,), (exact * bits_set,))
        yield {
            "what": f"check: bitmap, {str(dtype).removeprefix('torch.')}",
            "different": wrong + _different((numbers.abs().sort(dim=1, descending=True).values,), (largest,)),
        }


def _different(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> int:
    """How many numbers differ; all of them where shapes do."""
    return sum(
        int((a.cpu() != b.cpu()).sum()) if a.shape == b.shape else max(a.numel(), b.numel())
        for a, b in zip(got, wanted, strict=True)
    )


def selection(tokens: int) -> Iterator[Row]:
    """Kept sets from scores: the ranking that a plan makes once for every budget, and what one budget would need."""
    scores = torch.rand(HEADS, tokens, device="cuda")
    count = tokens // 4
    # What workbench.kv.ranking does: a stable sort, its inverse, and a comparison for each budget.
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    steps = torch.arange(tokens, dtype=torch.int32, device="cuda").expand_as(order)
    place = torch.empty_like(steps.contiguous()).scatter_(-1, order, steps)

    def ranked() -> Tensor:
        sort = torch.argsort(scores, dim=-1, descending=True, stable=True)
        return torch.empty_like(place).scatter_(-1, sort, steps)

    def largest() -> Tensor:
        return scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values

    works: dict[str, Callable[[], Any]] = {
        "select: ranking, once for all budgets": ranked,
        "select: mask of one budget from the ranking": lambda: place < count,
        "select: torch.topk and sort, one budget": largest,
    }
    for what, work in works.items():
        yield {"what": what, "shape": list(scores.shape), "us": time_us(work, graph=False, milliseconds=BASELINE_MS)}


def times(tokens: int, share: float) -> Iterator[Row]:
    """Kernels beside PyTorch, each with the bytes it has to move."""
    keys, values, keep = tensors(tokens, share)
    if share == 1:
        keep = torch.ones_like(keep)
    chosen = building.kept(keep)
    full = chosen.first(chosen.counts // GROUP * GROUP)  # keys are quantised by whole groups
    listed = None if chosen.complete else full
    total, read = full.total, full.total * WIDTH * 2
    shape = {"shape": [HEADS, tokens, WIDTH], "kept": share}
    # What boolean indexing would be given.
    front = keep & (keep.cumsum(dim=1) <= full.counts.to("cuda")[:, None])

    def pair(
        what: str, nbytes: int, kernel: Callable[[], Any], plain: Callable[[], Any], graph: bool = True
    ) -> Iterator[Row]:
        row = {**shape, "bytes": nbytes}
        yield {"what": what, **row, "us": time_us(kernel, graph=graph)}
        torch.cuda.empty_cache()
        yield {"what": f"{what}, PyTorch", **row, "us": time_us(plain, graph=False, milliseconds=BASELINE_MS)}
        torch.cuda.empty_cache()

    def indexed_then_quantised(bits: int, group: int, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
        return building.quantise_rows.reference(keys[front][None], bits, group, axis)

    places = 0 if listed is None else 4 * total
    yield from pair(
        "kept",
        2 * keep.numel() + 4 * chosen.total,
        partial(building.kept, keep),
        partial(building.kept.reference, keep),
        graph=False,
    )
    yield from pair(
        "gather keys and values",
        8 * chosen.total * WIDTH + 4 * chosen.total,
        partial(building.gather, (keys, values), chosen, torch.bfloat16),
        lambda: (keys[keep], values[keep]),
    )
    for bits in BITS:
        for axis in get_args(Axis):
            scales = (total // GROUP * WIDTH if axis == "channel" else total * (WIDTH // GROUP)) * 4
            packed = total * WIDTH * bits // 8 + scales
            how = (bits, GROUP, axis)
            yield from pair(
                f"quantise, {bits} bits per {axis}",
                read + packed + places,
                partial(building.quantise_rows, keys, *how, chosen=listed),
                partial(indexed_then_quantised, *how),
            )
            stored = building.quantise_rows(keys, *how, chosen=listed)
            yield from pair(
                f"dequantise, {bits} bits per {axis}",
                read + packed,
                partial(building.dequantise_rows, *stored, *how, WIDTH, torch.bfloat16),
                partial(building.dequantise_rows.reference, *stored, *how, WIDTH, torch.bfloat16),
            )
    sparse = total * (2 * COUNT + WIDTH // 8)
    yield from pair(
        "bitmap, 70 % pruned",
        read + sparse + places,
        partial(building.sparse_rows, keys, COUNT, torch.bfloat16, chosen=listed),
        lambda: building.sparse_rows.reference(keys[front][None], COUNT, torch.bfloat16),
    )
    numbers, bitmap = building.sparse_rows(keys, COUNT, torch.bfloat16, chosen=listed)
    yield from pair(
        "expand, 70 % pruned",
        read + sparse,
        partial(building.expand_rows, numbers, bitmap, WIDTH, torch.bfloat16),
        partial(building.expand_rows.reference, numbers, bitmap, WIDTH, torch.bfloat16),
    )
