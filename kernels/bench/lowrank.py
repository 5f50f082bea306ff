"""Attention and feed-forward modules from low-rank coefficients, beside plain low-rank layers and dense ones.

A layer of Llama 3.1 8B (hidden 4096, 32 query heads, 8 KV heads, a head size of 128, 14,336 neurons), bfloat16, from
its input to the output of attention before the last projection, or of the whole feed-forward module. Ranks hold a share
of the parameters, rounded down to a multiple of 16. "tiles": nothing wide is ever in memory (scratch=0); "scratch":
with 32 MiB; "plain": low-rank layers one after another and PyTorch's attention; "dense": the layers they stand for.
WORKBENCH_SWEEP=1 tries the configurations first, and goes on with the fastest of each kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.measure import failures, peak_bytes, relative_error, run_poisoned, time_us
from workbench_kernels.gpu import lowrank as gpu
from workbench_kernels.limits import SCRATCH
from workbench_kernels.lowrank import attend_factors, mlp_factors
from workbench_kernels.scoring import Scoring

HIDDEN, HEADS, KV_HEADS, WIDTH, NEURONS = 4096, 32, 8, 128, 14336
LENGTHS, SHARES = (2048, 8192), (0.5, 0.08)
CHECKED = 509  # tokens
SWEEP_SECONDS = 40.0
WAYS = {"tiles": 0, "scratch": SCRATCH}

Config = gpu.AttentionConfig | gpu.MLPConfig
Chosen = dict[tuple[str, str], Config]


@dataclass(frozen=True)
class Factors:
    """A low-rank layer: down [r, i], up [o, r]."""

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, inputs: int, outputs: int, share: float) -> Factors:
        rank = int(share * inputs * outputs / (inputs + outputs)) // 16 * 16
        return cls(_normal(rank, inputs) / inputs**0.5, _normal(outputs, rank) / rank**0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up)

    @property
    def rank(self) -> int:
        return len(self.down)

    def bases(self, heads: int) -> Tensor:
        """[h, r, d], a view."""
        return self.up.view(heads, -1, self.rank).transpose(1, 2)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Errors against float64, then times; quick: the shorter prompt and the larger ranks alone."""
    yield from attention_errors()
    yield from mlp_errors()
    chosen: Chosen = {}
    if os.environ.get("WORKBENCH_SWEEP"):
        yield from sweep(chosen)
    for share in SHARES[: 1 if quick else None]:
        attention, mlp = attention_layers(share), mlp_layers(share)
        for n in LENGTHS[: 1 if quick else None]:
            x = _normal(n, HIDDEN)
            yield from times("attention", attention_works(x, attention, chosen), n, share, attention_flops(n))
            yield from times("feed-forward", mlp_works(x, mlp, chosen), n, share, 6 * n * HIDDEN * NEURONS)


# ----------------------------------------------------------------------------------------------------- the layers


def attention_layers(share: float) -> list[Factors]:
    """Of queries, keys, values."""
    return [Factors.of(HIDDEN, heads * WIDTH, share) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def mlp_layers(share: float) -> list[Factors]:
    """Gate, up, down."""
    return [Factors.of(HIDDEN, NEURONS, share) for _ in range(2)] + [Factors.of(NEURONS, HIDDEN, share)]


def attention_works(x: Tensor, layers: list[Factors], chosen: Chosen) -> dict[str, Callable[[], Tensor]]:
    """From x [n, i] to [n, h * d], by every way."""
    cos, sin = rotary(len(x), WIDTH)
    dense = [_normal(len(layer.up), HIDDEN) / HIDDEN**0.5 for layer in layers]

    def ours(scratch: int, config: Any) -> Tensor:
        query, key, value = layers
        return gpu.attend_factors(
            linear(x, query.down), linear(x, key.down), linear(x, value.down), query.bases(HEADS), key.bases(KV_HEADS),
            value.bases(KV_HEADS), Scoring(WIDTH**-0.5), cos=cos, sin=sin, scratch=scratch, config=config,
        )  # fmt: skip

    def whole(project: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        query, key, value = (wide(x).view(len(x), -1, WIDTH).transpose(0, 1) for wide in project)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        out: Tensor = sdpa(query[None], key[None], value[None], is_causal=True, enable_gqa=True)[0]
        return out.transpose(0, 1).flatten(1)

    return {
        **{way: partial(ours, scratch, chosen.get(("attention", way))) for way, scratch in WAYS.items()},
        "plain": partial(whole, layers),
        "dense": partial(whole, [partial(linear, weight=weight) for weight in dense]),
    }


def mlp_works(x: Tensor, layers: list[Factors], chosen: Chosen) -> dict[str, Callable[[], Tensor]]:
    """From x [n, i] to [n, i], by every way."""
    gate, up, down = layers
    weights = [_normal(NEURONS, HIDDEN) / HIDDEN**0.5 for _ in range(2)] + [_normal(HIDDEN, NEURONS) / NEURONS**0.5]

    def ours(scratch: int, config: Any) -> Tensor:
        thin = (linear(x, gate.down), linear(x, up.down))
        mixed = gpu.mlp_factors(*thin, gate.up.T, up.up.T, down.down.T, act="silu", scratch=scratch, config=config)
        return linear(mixed, down.up)

    def whole(project: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        return project[2](silu(project[0](x)) * project[1](x))

    kind = {way: mlp_kind(scratch, down.rank) for way, scratch in WAYS.items()}
    return {
        **{way: partial(ours, scratch, chosen.get(("feed-forward", kind[way]))) for way, scratch in WAYS.items()},
        "plain": partial(whole, layers),
        "dense": partial(whole, [partial(linear, weight=weight) for weight in weights]),
    }


def mlp_kind(scratch: int, rank: int) -> str:
    """Which kernel computes."""
    return "scratch" if scratch and rank > 256 else "tiles"


def rotary(n: int, width: int) -> tuple[Tensor, Tensor]:
    """cos, sin [n, d], float32."""
    turns = 5e5 ** -(torch.arange(0, width, 2, device="cuda") / width)
    angles = torch.arange(n, device="cuda")[:, None] * turns.repeat(2)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers does, in x's dtype."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], dim=-1) * sin.to(x.dtype)


# -------------------------------------------------------------------------------------------------------- errors


def attention_errors() -> Iterator[dict[str, Any]]:
    """Against the reference in float64, outputs poisoned; odd ranks, widths and length of the prompt."""
    for dtype, width, ranks in (
        (torch.bfloat16, 128, (200, 409, 400)),
        (torch.float16, 256, (64, 72, 33)),
        (torch.float32, 96, (45, 64, 27)),
    ):
        heads = (8, 2, 2)
        thin = [_normal(CHECKED, rank).to(dtype) for rank in ranks]
        bases = [
            (_normal(k * width, r) / r**0.5).to(dtype).view(k, width, r).transpose(1, 2)
            for k, r in zip(heads, ranks, strict=True)
        ]
        cos, sin = rotary(CHECKED, width)
        scoring = Scoring(width**-0.5)
        exact = [x.double() for x in (*thin, *bases)]
        reference: Callable[..., Tensor] = attend_factors.reference
        kernel: Callable[..., Tensor] = gpu.attend_factors
        truth = reference(*exact, scoring, cos=cos.double(), sin=sin.double())
        for way, scratch in WAYS.items():
            out = run_poisoned(partial(kernel, *thin, *bases, scoring, cos=cos, sin=sin, scratch=scratch))
            yield checked("attention", way, dtype, f"n {CHECKED}, d {width}, ranks {ranks}", relative_error(out, truth))


def mlp_errors() -> Iterator[dict[str, Any]]:
    """Against the reference in float64, outputs poisoned."""
    for dtype, neurons, ranks in ((torch.bfloat16, 3001, (200, 409, 400)), (torch.float32, 1001, (45, 64, 270))):
        gate, up = (_normal(CHECKED, rank).to(dtype) for rank in ranks[:2])
        bases = [(_normal(neurons, rank) / rank**0.5).to(dtype).T for rank in ranks[:2]]
        down = (_normal(ranks[2], neurons) / neurons**0.5).to(dtype).T
        given = (gate, up, *bases, down)
        reference: Callable[..., Tensor] = mlp_factors.reference
        kernel: Callable[..., Tensor] = gpu.mlp_factors
        truth = reference(*(x.double() for x in given), act="silu", tile=512)
        for way, scratch in WAYS.items():
            out = run_poisoned(partial(kernel, *given, act="silu", scratch=scratch))
            shape = f"n {CHECKED}, f {neurons}, ranks {ranks}"
            yield checked("feed-forward", way, dtype, shape, relative_error(out, truth))


def checked(what: str, way: str, dtype: torch.dtype, shape: str, error: float) -> dict[str, Any]:
    return {"what": what, "way": way, "dtype": str(dtype)[6:], "shape": shape, "error": error}


# --------------------------------------------------------------------------------------------------------- times


def attention_flops(n: int) -> int:
    """Of the dense layer: projections and causal attention."""
    return 2 * n * HIDDEN * (HEADS + 2 * KV_HEADS) * WIDTH + 2 * n * n * HEADS * WIDTH


def times(
    what: str, works: dict[str, Callable[[], Tensor]], n: int, share: float, dense_flops: int
) -> Iterator[dict[str, Any]]:
    """Median time and peak memory of every way; flops only where it computes as much as the dense layer."""
    for way, work in works.items():
        yield {
            "what": what, "way": way, "dtype": "bfloat16", "shape": f"n {n}, {share:.0%} of the parameters",
            "us": time_us(work), "peak": peak_bytes(work), "flops": dense_flops if way == "dense" else None,
        }  # fmt: skip


def sweep(chosen: Chosen) -> Iterator[dict[str, Any]]:
    """Every configuration at the shorter prompt, in turns over the kinds, until the time is over; fills `chosen`."""
    began = perf_counter()
    x = _normal(LENGTHS[0], HIDDEN)
    large, small = (attention_layers(SHARES[0]), mlp_layers(SHARES[0])), mlp_layers(SHARES[1])
    kinds: list[tuple[tuple[str, str], tuple[Config, ...], Callable[[Chosen], dict[str, Callable[[], Tensor]]]]] = [
        (("attention", "tiles"), gpu.TILED_CONFIGS, partial(attention_works, x, large[0])),
        (("attention", "scratch"), gpu.HELD_CONFIGS, partial(attention_works, x, large[0])),
        (("feed-forward", "scratch"), gpu.PANEL_CONFIGS, partial(mlp_works, x, large[1])),
        (("feed-forward", "tiles"), gpu.SUM_CONFIGS, partial(mlp_works, x, small)),
    ]
    best: dict[tuple[str, str], float] = {}
    for number in range(max(len(configs) for _, configs, _ in kinds)):
        for kind, configs, works in kinds:
            if number >= len(configs):
                continue
            row: dict[str, Any] = {"what": f"sweep: {kind[0]}", "way": kind[1], "shape": str(tuple(configs[number]))}
            if perf_counter() - began > SWEEP_SECONDS:
                yield {**row, "failed": "the time was over"}
                continue
            with failures(row):  # it may not fit into the device
                row["us"] = time_us(works({kind: configs[number]})[kind[1]], milliseconds=20)
            yield row
            if row.get("us", float("inf")) < best.get(kind, float("inf")):
                best[kind], chosen[kind] = row["us"], configs[number]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
