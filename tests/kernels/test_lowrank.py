"""Attention and feed-forward modules from low-rank coefficients: references, and kernels under the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench.measure.memory import LiveBytes
from workbench_kernels.lowrank import (
    ACTIVATIONS,
    attend_factors,
    mlp_factors,
)
from workbench_kernels.scoring import Scoring

# On a GPU the matrix units take float32 as tf32.
TOLERANCE = {torch.float32: 4e-3 if torch.cuda.is_available() else 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
COUNT = 37


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Attention:
    """Random coefficients and bases of one attention layer, and its output in float64 by way of whole queries, keys and
    values.
    """

    def __init__(self, heads: int, groups: int, width: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(width + sum(ranks))
        counts = (heads * groups, heads, heads)
        self.coefficients = [torch.randn(COUNT, r, generator=draw).to(dtype) for r in ranks]
        # Stored as a layer's weight is: [h * d, r].
        weights = [torch.randn(k * width, r, generator=draw) / r**0.5 for k, r in zip(counts, ranks, strict=True)]
        self.bases = [
            w.to(dtype).view(k, width, r).transpose(1, 2) for w, k, r in zip(weights, counts, ranks, strict=True)
        ]
        self.biases = [torch.randn(k, width, generator=draw).to(dtype) for k in counts]
        angles = torch.arange(COUNT)[:, None] * 100.0 ** -(torch.arange(width // 2) / (width // 2))
        self.cos, self.sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()

    def options(self, rotary: bool, biased: bool) -> dict[str, Tensor]:
        names = ("query_bias", "key_bias", "value_bias")
        biases = dict(zip(names, self.biases, strict=True)) if biased else {}
        return ({"cos": self.cos, "sin": self.sin} if rotary else {}) | biases

    def truth(
        self, rotary: bool, biased: bool, scale: float, causal: bool, window: int | None, cap: float | None
    ) -> Tensor:
        rows = [x.double() @ u.double() for x, u in zip(self.coefficients, self.bases, strict=True)]
        if biased:
            rows = [x + b.double()[:, None] for x, b in zip(rows, self.biases, strict=True)]
        if rotary:
            for i in (0, 1):
                low, high = rows[i].chunk(2, dim=-1)
                rows[i] = rows[i] * self.cos.double() + torch.cat([-high, low], -1) * self.sin.double()
        query, key, value = rows
        key, value = (x.repeat_interleave(len(query) // len(x), 0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * scale
        if cap:
            scores = (scores / cap).tanh() * cap
        back = torch.arange(COUNT)[:, None] - torch.arange(COUNT)
        if causal:
            scores = scores.masked_fill((back < 0) | (back >= (window or COUNT)), float("-inf"))
        return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


CASES = [
    # heads, groups, width, ranks, dtype, rotary, biased, causal, window, softcap
    (1, 1, 64, (16, 16, 16), torch.float32, True, False, True, None, None),
    (2, 3, 96, (21, 7, 13), torch.float32, True, True, True, None, None),
    (1, 4, 128, (40, 33, 50), torch.bfloat16, True, False, True, None, 5.0),
    (1, 2, 256, (20, 18, 35), torch.float16, True, True, True, 9, None),
    (2, 1, 64, (5, 70, 9), torch.float16, False, False, False, None, None),
    (1, 3, 96, (17, 16, 33), torch.bfloat16, False, True, True, 20, 3.0),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [8, 17, 128])
def test_the_reference_is_attention_over_whole_rows(case: tuple[Any, ...], tile: int) -> None:
    heads, groups, width, ranks, dtype, rotary, biased, causal, window, cap = case
    layer = Attention(heads, groups, width, ranks, dtype)
    found = attend_factors(
        *layer.coefficients, *layer.bases, Scoring(width**-0.5, window, cap), **layer.options(rotary, biased),
        causal=causal, tile=tile,
    )  # fmt: skip
    assert found.dtype == dtype
    assert error(found, layer.truth(rotary, biased, width**-0.5, causal, window, cap)) < TOLERANCE[dtype]


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scratch", [0, COUNT * 96 * 4 * 2, 1 << 30])
def test_the_kernel_is_attention_over_whole_rows(case: tuple[Any, ...], scratch: int) -> None:
    from workbench_kernels.gpu import lowrank

    heads, groups, width, ranks, dtype, rotary, biased, causal, window, cap = case
    layer = Attention(heads, groups, width, ranks, dtype)
    config = lowrank.AttentionConfig(16, 16, 16, 4, 2)
    found = lowrank.attend_factors(
        *layer.coefficients, *layer.bases, Scoring(width**-0.5, window, cap), **layer.options(rotary, biased),
        causal=causal, scratch=scratch, config=config,
    )  # fmt: skip
    assert found.dtype == dtype
    assert error(found, layer.truth(rotary, biased, width**-0.5, causal, window, cap)) < TOLERANCE[dtype]


class MLP:
    """Random coefficients and factors of one feed-forward module, and its result in float64 by way of whole neurons."""

    def __init__(self, count: int, neurons: int, ranks: tuple[int, int, int], dtype: torch.dtype, gated: bool) -> None:
        draw = torch.Generator().manual_seed(neurons + sum(ranks))
        first, second, third = ranks
        self.gate, self.up = (torch.randn(count, r, generator=draw).to(dtype) for r in (first, second))
        # Stored as a layer's weights are: [f, r] and [r3, f].
        self.gate_basis, self.up_basis = (
            (torch.randn(neurons, r, generator=draw) / r**0.5).to(dtype).T for r in (first, second)
        )
        self.down = (torch.randn(third, neurons, generator=draw) / neurons**0.5).to(dtype).T
        self.biases = [torch.randn(neurons, generator=draw).to(dtype) for _ in range(2)]
        self.gated = gated

    def inputs(self, biased: bool) -> tuple[Any, ...]:
        up = (self.up, self.up_basis) if self.gated else (None, None)
        return (self.gate, up[0], self.gate_basis, up[1], self.down, *(self.biases if biased else (None, None)))

    def truth(self, biased: bool, act: str) -> Tensor:
        gate, up = self.gate.double() @ self.gate_basis.double(), self.up.double() @ self.up_basis.double()
        if biased:
            gate, up = gate + self.biases[0].double(), up + self.biases[1].double()
        wide = ACTIVATIONS[act](gate) * up if self.gated else ACTIVATIONS[act](gate)
        return wide @ self.down.double()


MLPS = [
    # tokens, neurons, ranks, dtype, gated, biased, act
    (1, 48, (16, 16, 16), torch.float32, True, False, "silu"),
    (37, 75, (21, 7, 13), torch.float32, True, True, "gelu_tanh"),
    (37, 100, (40, 33, 50), torch.bfloat16, True, False, "silu"),
    (50, 130, (20, 18, 300), torch.float16, True, True, "gelu"),
    (33, 65, (17, 16, 270), torch.bfloat16, False, True, "gelu_tanh"),
    (19, 64, (5, 70, 9), torch.float16, False, False, "relu"),
]


@pytest.mark.parametrize("case", MLPS)
@pytest.mark.parametrize("tile", [8, 33, 4096])
def test_the_reference_is_the_whole_module(case: tuple[Any, ...], tile: int) -> None:
    count, neurons, ranks, dtype, gated, biased, act = case
    module = MLP(count, neurons, ranks, dtype, gated)
    *given, gate_bias, up_bias = module.inputs(biased)
    found = mlp_factors(*given, act=act, gate_bias=gate_bias, up_bias=up_bias, tile=tile)
    assert found.dtype == dtype
    assert error(found, module.truth(biased, act)) < TOLERANCE[dtype]


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", MLPS)
@pytest.mark.parametrize("scratch", [0, 20 * 130 * 2, 1 << 30])
def test_the_kernel_is_the_whole_module(case: tuple[Any, ...], scratch: int) -> None:
    from workbench_kernels.gpu import lowrank

    count, neurons, ranks, dtype, gated, biased, act = case
    module = MLP(count, neurons, ranks, dtype, gated)
    config = lowrank.MLPConfig(16, 32, 64, 16, 4, 2)
    *given, gate_bias, up_bias = module.inputs(biased)
    found = lowrank.mlp_factors(*given, act=act, gate_bias=gate_bias, up_bias=up_bias, scratch=scratch, config=config)
    assert found.dtype == dtype
    assert error(found, module.truth(biased, act)) < TOLERANCE[dtype]


def test_the_references_never_hold_what_is_wide() -> None:
    draw = torch.Generator().manual_seed(0)
    thin, wide = torch.randn(1024, 8, generator=draw), torch.randn(8, 4096, generator=draw)
    with torch.no_grad(), LiveBytes() as live:
        mlp_factors.reference(thin, thin, wide, wide, wide.T, act="silu", tile=128)
    assert live.peak < 1024 * 4096 * 4 / 8
    basis = wide.view(8, 64, 64).transpose(0, 1)
    with torch.no_grad(), LiveBytes() as live:
        attend_factors.reference(*(thin,) * 3, *(basis,) * 3, Scoring(1.0), tile=64)
    output, queries_keys_and_values = 1024 * 64 * 64 * 4, 3 * 1024 * 64 * 64 * 4
    assert live.peak - output < queries_keys_and_values / 8


def test_shapes_that_do_not_fit_are_refused() -> None:
    layer, module = Attention(2, 2, 64, (4, 5, 6), torch.float32), MLP(3, 20, (4, 5, 6), torch.float32, True)
    queries, keys, values = layer.coefficients
    given = (queries, keys, values, *layer.bases)
    with pytest.raises(ValueError, match="keys: coefficients"):
        attend_factors(queries, keys[:, :3], values, *layer.bases, Scoring(1.0))
    with pytest.raises(ValueError, match="one dtype"):
        attend_factors(queries.half(), keys, values, *layer.bases, Scoring(1.0))
    with pytest.raises(ValueError, match="rotary"):
        attend_factors(*given, Scoring(1.0), cos=layer.cos)
    with pytest.raises(ValueError, match="no groups"):
        attend_factors(queries, keys, values, layer.bases[0][:3], *layer.bases[1:], Scoring(1.0))
    with pytest.raises(ValueError, match="window"):
        attend_factors(*given, Scoring(1.0, window=3), causal=False)
    with pytest.raises(ValueError, match="'swish'"):
        mlp_factors(module.gate, module.up, module.gate_basis, module.up_basis, module.down, act="swish")
    with pytest.raises(ValueError, match="neither"):
        mlp_factors(module.gate, module.up, module.gate_basis, None, module.down, act="silu")
    with pytest.raises(ValueError, match="up: coefficients"):
        mlp_factors(module.gate, module.up[:2], module.gate_basis, module.up_basis, module.down, act="silu")
