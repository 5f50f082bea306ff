"""Linear layers with small weights, beside nn.Linear and the kernels of libraries for weights of the same kind.

The four shapes of Llama 3.1 8B's linear layers, bfloat16 inputs of 1, 16 and 512 tokens, random weights. *MB* are those
of the held weight, the input and the output; *times as fast* is over nn.Linear of that shape. Errors are against a
product in float64 with the weight that a layer stands for, so they say what computing loses, not what rounding the
weight lost. Whatever a library cannot do, or is not installed, is a row with the reason; GemLite chooses among its
kernels' configurations while it warms up, as long as `GEMLITE_SECONDS` are not over.
WORKBENCH_SWEEP=1 first tries several sizes of the tiles in which weights are made float, and the configurations of the
kernel that packed layers use for a few tokens ("tiles": the same layer without it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from math import sqrt
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure import failures, peak_bytes, relative_error, run_poisoned, time_us
from workbench.measure.memory import tensor_bytes
from workbench.weights.layers import CodebookLinear, CompactLinear, IntegerLinear, PackedLinear, SparseLinear, compact
from workbench.weights.layers.low_rank import LowRankLinear
from workbench_kernels.packing import pack

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # [o, i]
TOKENS = (1, 16, 512)
KIND, DEVICE = torch.bfloat16, "cuda"
CODEWORDS = 8  # of this many outputs each, one codeword
MILLISECONDS = 8.0  # of each time
TILES = (8, 16, 32, 64, 128)  # MiB
GEMLITE_SECONDS = 15.0


class Candidate(NamedTuple):
    """What multiplies x [n, i], its bytes, and the weight [o, i] that it stands for, in float64; None: not known."""

    work: Callable[[Tensor], Tensor]
    nbytes: int
    weight: Callable[[], Tensor] | None = None


Make = Callable[[int, int], Candidate]  # of o, i


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Every layer in every shape; quick: the smallest shape alone."""
    if os.environ.get("WORKBENCH_SWEEP"):
        yield from sweep()
    plain: dict[tuple[int, int, int], float] = {}
    shapes = sorted(SHAPES)[:1] if quick else SHAPES
    for ways in (OURS, LIBRARIES):
        for outputs, inputs in shapes:
            for (what, way), make in ways.items():
                yield from measured(what, way, make, outputs, inputs, plain)
    began = perf_counter()
    for tokens in TOKENS:  # slow to warm up: the most important first
        for outputs, inputs in shapes:
            for (what, way), make in GEMLITE.items():
                if perf_counter() - began > GEMLITE_SECONDS:
                    yield {**case(what, way, outputs, inputs, (tokens,)), "failed": "the time was over"}
                else:
                    yield from measured(what, way, make, outputs, inputs, plain, (tokens,))


def case(what: str, way: str, outputs: int, inputs: int, several: tuple[int, ...]) -> dict[str, Any]:
    """What a row is about, for one number of tokens, or for several that failed in the same way."""
    n = several[0] if len(several) == 1 else ", ".join(map(str, several))
    return {"what": what, "way": way, "shape": [outputs, inputs], "n": n}


def measured(
    what: str,
    way: str,
    make: Make,
    outputs: int,
    inputs: int,
    plain: dict[tuple[int, int, int], float],
    several: tuple[int, ...] = TOKENS,
) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens. plain: times of nn.Linear, by shape and tokens, which this fills itself."""
    row = case(what, way, outputs, inputs, several)
    with failures(row):  # it may not be installed, or not be for this device
        candidate = make(outputs, inputs)
        exact = candidate.weight().double() if candidate.weight is not None else None
    if "failed" in row:
        yield row
        return
    failed: dict[str, list[int]] = {}
    graph = True  # until a capture fails: then for the others neither
    for tokens in several:
        key = (outputs, inputs, tokens)
        x = drawn(tokens, inputs)
        row = {}
        with failures(row), torch.inference_mode():
            out = run_poisoned(partial(candidate.work, x))
            error = None if exact is None else relative_error(out, x.double() @ exact.T)
            us, graph = timed(partial(candidate.work, x), graph)
            peak = peak_bytes(partial(candidate.work, x))
        if "failed" in row:
            failed.setdefault(row["failed"], []).append(tokens)
            continue
        if what == DENSE:
            plain[key] = us
        yield {
            **case(what, way, outputs, inputs, (tokens,)),
            "us": us, "bytes": candidate.nbytes + x.nbytes + out.nbytes, "flops": 2 * tokens * outputs * inputs,
            "speedup": plain[key] / us if key in plain else None, "peak": peak, "error": error,
            **({} if graph else {"launched": "one by one"}),
        }  # fmt: skip
    for said, those in failed.items():
        yield {**case(what, way, outputs, inputs, tuple(those)), "failed": said}


def timed(work: Callable[[], Any], graph: bool = True) -> tuple[float, bool]:
    """Microseconds, and whether by a graph; work that cannot be captured is launched kernel by kernel."""
    if graph:
        try:
            return time_us(work, milliseconds=MILLISECONDS), True
        except RuntimeError:
            torch.cuda.synchronize()
    return time_us(work, graph=False, milliseconds=MILLISECONDS), False


def sweep() -> Iterator[dict[str, Any]]:
    """Tiles of other sizes for one token and 512, and the packed kernel's configurations for one."""
    usual = compact._TILE  # noqa: SLF001  what is swept is nobody else's business
    try:
        for outputs, inputs in ((14336, 4096), (4096, 14336)):
            for what in (("packed 4 bit, group 64", "tiles"), ("sparse, half, uneven rows", "ours")):
                candidate = OURS[what](outputs, inputs)
                for tile in TILES:
                    compact._TILE = tile << 20  # noqa: SLF001  see above
                    for tokens in (1, 512):
                        yield tried(candidate.work, what[0], f"tiles of {tile} MiB", outputs, inputs, tokens)
    finally:
        compact._TILE = usual  # noqa: SLF001  see above
    from workbench_kernels.gpu import packed_linear as gpu

    for outputs, inputs in ((4096, 4096), (14336, 4096)):
        codes, scale, zero = grid(4, 64, outputs, inputs)
        plane = pack(codes, 4).contiguous()
        for config in gpu.CONFIGS:

            def work(x: Tensor, given: Any = (plane, scale, zero, None, 4, 64, 0.0, config)) -> Tensor:
                return gpu.packed_linear(x, *given)

            yield tried(work, "packed 4 bit, group 64", str(tuple(config)), outputs, inputs, 1)


def tried(
    work: Callable[[Tensor], Tensor], what: str, way: str, outputs: int, inputs: int, tokens: int
) -> dict[str, Any]:
    """A row of a sweep."""
    row = case(f"sweep: {what}", way, outputs, inputs, (tokens,))
    with failures(row), torch.inference_mode():  # it may not fit into the device
        row["us"], graph = timed(partial(work, drawn(tokens, inputs)))
        row |= {} if graph else {"launched": "one by one"}
    return row


# ---------------------------------------------------------------------------------------------------------------- ours


def dense(outputs: int, inputs: int) -> Candidate:
    layer = whole(outputs, inputs)
    return Candidate(layer, layer.weight.nbytes, lambda: layer.weight)


def whole(outputs: int, inputs: int) -> nn.Linear:
    """A plain layer."""
    layer = nn.Linear(inputs, outputs, bias=False, dtype=KIND, device="meta").to_empty(device=DEVICE)
    layer.requires_grad_(False).weight.copy_(_normal(outputs, inputs))
    return layer


def ours(layer: CompactLinear) -> Candidate:
    return Candidate(layer.to(DEVICE), layer.nbytes, lambda: layer.dequantised(torch.float64))


def packed(bits: int, group: int, outputs: int, inputs: int) -> Candidate:
    codes, scale, zero = grid(bits, group, outputs, inputs)
    return ours(PackedLinear(codes, scale, zero, bits, group=group))


def packed_tiles(outputs: int, inputs: int) -> Candidate:
    """The same without the kernel: for one token, too, weights are made float."""
    codes, scale, zero = grid(4, 64, outputs, inputs)
    layer = PackedLinear(codes, scale, zero, 4, group=64)
    return ours(layer)._replace(work=partial(CompactLinear.forward, layer))


def integer(bits: int, outputs: int, inputs: int) -> Candidate:
    """Errors, too, are beside the inputs as they are: what rounding them loses counts."""
    codes, scale, _ = grid(bits, inputs, outputs, inputs)
    return ours(IntegerLinear(codes, scale, None, bits, group=inputs))


def sparse(even: bool, outputs: int, inputs: int) -> Candidate:
    weight = _normal(outputs, inputs)
    return ours(SparseLinear(weight, two_of_four(weight) if even else weight.abs() > weight.abs().float().median()))


def codebook(outputs: int, inputs: int) -> Candidate:
    words = outputs // CODEWORDS
    index = torch.randint(words, (outputs,), generator=_drawing(DEVICE), device=DEVICE)
    return ours(CodebookLinear(_normal(words, inputs), index))


def low_rank(outputs: int, inputs: int) -> Candidate:
    """Half the parameters."""
    rank = outputs * inputs // (outputs + inputs) // 2 // 16 * 16
    return ours(LowRankLinear(_normal(rank, inputs), _normal(outputs, rank)))


DENSE = "nn.Linear"
OURS: dict[tuple[str, str], Make] = {
    (DENSE, "torch"): dense,
    **{
        (f"packed {bits} bit, group {group}", "ours"): partial(packed, bits, group)
        for bits in (8, 4, 2) for group in (64, 128)
    },
    ("packed 4 bit, group 64", "tiles"): packed_tiles,
    ("sparse, half, uneven rows", "ours"): partial(sparse, False),
    ("sparse, 2:4", "ours"): partial(sparse, True),
    ("codebook, an eighth", "ours"): codebook,
    ("integers, W4A8", "ours"): partial(integer, 4),
    ("integers, W8A8", "ours"): partial(integer, 8),
    ("low rank, half", "ours"): low_rank,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- libraries


def int4pack(group: int, outputs: int, inputs: int) -> Candidate:
    """torch's own 4-bit product (tinygemm), which torchao's tiled layout uses as well: (code - 8) * scale + zero."""
    codes, scale, _ = grid(4, group, outputs, inputs)
    scale, zero = scale.to(KIND), _normal(*scale.shape) / 64
    # torch offers its own 4-bit product by no other name.
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)  # noqa: SLF001  see above
    pairs = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()  # [g, o, 2]

    def weight() -> Tensor:
        groups = codes.double().unflatten(1, (-1, group)) - 8
        return torch.addcmul(zero.double()[..., None], groups, scale.double()[..., None]).flatten(1)

    def work(x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, packed, group, pairs)  # noqa: SLF001  see above

    return Candidate(work, tensor_bytes([packed, pairs]), weight)


def semi_structured(name: str, outputs: int, inputs: int) -> Candidate:
    """torch's 2:4 weights, by the library that `name` stands for."""
    from torch.sparse import semi_structured as library

    weight = _normal(outputs, inputs)
    weight = weight * two_of_four(weight)
    kind: Any = getattr(library, f"SparseSemiStructuredTensor{name}")
    pruned = kind.from_dense(weight)
    inner = [getattr(pruned, part) for part in pruned.__tensor_flatten__()[0]]
    return Candidate(lambda x: nn.functional.linear(x, pruned), tensor_bytes(inner), lambda: weight)


def torchao(config: str, options: dict[str, Any], outputs: int, inputs: int) -> Candidate:
    """A plain layer that torchao quantised. What it stands for is read off its product with the identity."""
    from torchao import quantization

    layer: Any = whole(outputs, inputs)
    quantization.quantize_(layer, getattr(quantization, config)(**options))
    inner = [getattr(layer.weight, part) for part in layer.weight.__tensor_flatten__()[0]]
    nbytes = tensor_bytes(tensor for tensor in inner if isinstance(tensor, Tensor))
    if "Activation" in config:
        return Candidate(layer, nbytes, layer.weight.dequantize)
    return Candidate(layer, nbytes, lambda: layer(torch.eye(inputs, dtype=KIND, device=DEVICE)).T)


def gemlite(bits: int, group: int, outputs: int, inputs: int) -> Candidate:
    """GemLite's Triton kernels over the same codes, scales and zeros as ours, in its own layout."""
    if find_spec("gemlite") is None:
        raise ModuleNotFoundError("no module named gemlite", name="gemlite")
    from gemlite import DType, GemLiteLinearTriton

    codes, scale, zero = grid(bits, group, outputs, inputs)
    layer = GemLiteLinearTriton(
        bits, group_size=group, in_features=inputs, out_features=outputs, input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )  # fmt: skip
    layer.pack(codes, scale, zero, None, fma_mode=False)
    weight = PackedLinear(codes, scale, zero, bits, group=group)
    return Candidate(
        layer, tensor_bytes([layer.W_q, layer.scales, layer.zeros]), lambda: weight.dequantised(torch.float64)
    )


LIBRARIES: dict[tuple[str, str], Make] = {
    **{(f"packed 4 bit, group {group}", "torch int4pack"): partial(int4pack, group) for group in (64, 128)},
    **{("sparse, 2:4", f"torch {name}"): partial(semi_structured, name) for name in ("CUSPARSELT", "CUTLASS")},
    ("packed 4 bit, group 128", "torchao"): partial(
        torchao, "Int4WeightOnlyConfig", {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
    ),
    ("packed 8 bit, a row", "torchao"): partial(torchao, "Int8WeightOnlyConfig", {"version": 2}),
    ("integers, W8A8", "torchao"): partial(torchao, "Int8DynamicActivationInt8WeightConfig", {"version": 2}),
}  # fmt: skip
GEMLITE: dict[tuple[str, str], Make] = {
    (f"packed {bits} bit, group {group}", "GemLite"): partial(gemlite, bits, group)
    for bits, group in ((4, 64), (8, 128), (2, 64))
}


# -------------------------------------------------------------------------------------------------------------- weights


def grid(bits: int, group: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [o, i], scales and zeros float16 [o, g]; the weights have a variance of about 1 / i."""
    groups = inputs // group
    draw = _drawing(DEVICE)
    codes = torch.randint(2**bits, (outputs, inputs), generator=draw, dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(outputs, groups, generator=draw, device=DEVICE) + 0.5) * 3.5 / 2**bits / inputs**0.5
    zero = 2 ** (bits - 1) + torch.rand(outputs, groups, generator=draw, device=DEVICE) - 0.5
    return codes, scale.half(), zero.half()


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest of every four neighbours, bool [o, i]."""
    groups = weight.float().abs().unflatten(1, (-1, 4))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, dim=-1).indices, True).flatten(1)


def drawn(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=_drawing(DEVICE), dtype=KIND, device=DEVICE)


def _normal(*shape: int) -> Tensor:
    return drawn(*shape) / sqrt(shape[1])


@cache
def _drawing(device: str) -> torch.Generator:
    """A generator of one's own: a capture that failed leaves torch's own unable to draw."""
    return torch.Generator(device=device).manual_seed(0)
