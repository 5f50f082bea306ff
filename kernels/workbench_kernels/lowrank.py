"""Attention and feed-forward modules computed from low-rank coefficients, tile by tile (FlashSVD).

A low-rank layer is x -> (x V) U: its coefficients x V [n, r] are thin, what U makes of them is wide. Here queries,
keys, values and the neurons of a feed-forward module are expanded for a tile at a time, so that they never lie in
memory as a whole (Shao et al. 2025, arXiv:2508.01506). Factors may be views of any strides: a layer's weight as it is,
transposed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.limits import SCRATCH
from workbench_kernels.rotary import rotate
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def _check_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_basis: Tensor,
    key_basis: Tensor,
    value_basis: Tensor,
    scoring: Scoring,
    cos: Tensor | None,
    sin: Tensor | None,
    causal: bool,
) -> None:
    count, (heads, _, width), kv_heads = len(queries), query_basis.shape, len(key_basis)
    for name, x, basis, number in (
        ("queries", queries, query_basis, heads),
        ("keys", keys, key_basis, kv_heads),
        ("values", values, value_basis, kv_heads),
    ):
        if x.shape != (count, basis.shape[1]) or basis.shape != (number, basis.shape[1], width):
            raise ValueError(
                f"{name}: coefficients {list(x.shape)} and basis {list(basis.shape)} are not "
                f"[{count}, r] and [{number}, r, {width}]"
            )
    if len({x.dtype for x in (queries, keys, values)}) > 1:
        raise ValueError(f"coefficients of {queries.dtype}, {keys.dtype} and {values.dtype}: give them one dtype")
    if heads % kv_heads or width % 2:
        raise ValueError(f"{heads} query heads of width {width} over {kv_heads} KV heads: no groups, or no halves")
    if (cos is None) != (sin is None) or any(x is not None and x.shape != (count, width) for x in (cos, sin)):
        raise ValueError(f"rotary factors: give both cos and sin [{count}, {width}], or neither")
    if scoring.window is not None and (scoring.window < 1 or not causal):
        raise ValueError(f"a window of {scoring.window}: at least 1, and only if causal")


def _takes_attention(
    queries: Tensor, keys: Tensor, values: Tensor, query_basis: Tensor, key_basis: Tensor, value_basis: Tensor,
    cos: Tensor | None, sin: Tensor | None, query_bias: Tensor | None, key_bias: Tensor | None,
    value_bias: Tensor | None, scoring: Scoring,
) -> bool:  # fmt: skip
    bases, biases = (query_basis, key_basis, value_basis), (query_bias, key_bias, value_bias)
    return scoring.plain and on_gpu(queries, keys, values, *bases, cos, sin, *biases)


@with_kernel("gpu.lowrank:attend_factors", when=_takes_attention, check=_check_attention)
def attend_factors(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_basis: Tensor,
    key_basis: Tensor,
    value_basis: Tensor,
    scoring: Scoring,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    causal: bool = True,
    scratch: int = SCRATCH,
    tile: int = 128,
) -> Tensor:
    """Softmax attention of a whole prompt with grouped queries, from coefficients: the output [n, h * d].

    queries [n, rq], keys [n, rk], values [n, rv]: coefficients, of one dtype, shared by all heads. query_basis
    [h, rq, d], key_basis and value_basis [k, rk or rv, d] with h = g * k; biases [h or k, d]. cos, sin [n, d]: rotary
    factors of queries and keys, in halves as Llama's; None: not rotated. A window only if causal.

    On a GPU, queries are expanded within the kernel, keys and values likewise, again for every tile of queries, if
    `scratch` bytes (default 32 MiB) do not hold those of one KV head; else those of as many KV heads as fit are
    expanded once. scratch=0: nothing beyond inputs and output is ever held. On a CPU, one KV head and `tile` queries at
    a time, in float32, or float64 where given that. Raises ValueError if shapes do not fit together.
    """
    del scratch  # the kernel's
    count, (heads, _, width) = len(queries), query_basis.shape
    groups = heads // len(key_basis)
    out = queries.new_empty(count, heads, width)
    for i in range(len(key_basis)):
        key = _rotated(_expanded(keys, key_basis[i], _of(key_bias, i)), cos, sin)  # [n, d]
        value = _expanded(values, value_basis[i], _of(value_bias, i))
        for first in range(0, count, tile):
            stop = min(first + tile, count)
            last = stop if causal else count
            start = max(0, first - scoring.window + 1) if scoring.window else 0
            here = slice(first, stop)
            place, rows = (torch.arange(*x, device=queries.device) for x in ((start, last), (first, stop)))
            visible = scoring.visible(rows, place) if causal else None
            offsets = scoring.offsets(rows, place)
            for j in range(i * groups, (i + 1) * groups):
                query = _expanded(queries[here], query_basis[j], _of(query_bias, j))
                query = _rotated(query, *(None if x is None else x[here] for x in (cos, sin)))
                weights = attention_weights(query @ key[start:last].T, scoring.of(j), visible, offsets)
                out[here, j] = (weights @ value[start:last]).to(out.dtype)
    return out.flatten(1)


def _check_mlp(
    gate: Tensor, up: Tensor | None, gate_basis: Tensor, up_basis: Tensor | None, down: Tensor, act: str
) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r}: one of {', '.join(ACTIVATIONS)}")
    if (up is None) != (up_basis is None):
        raise ValueError("give both up and up_basis, or neither")
    for name, x, basis in (("gate", gate, gate_basis), ("up", up, up_basis)):
        if x is None or basis is None:
            continue
        if x.shape != (len(gate), len(basis)) or basis.shape[1] != len(down) or x.dtype != gate.dtype:
            raise ValueError(
                f"{name}: coefficients {list(x.shape)} ({x.dtype}) and basis {list(basis.shape)} are not "
                f"[{len(gate)}, r] ({gate.dtype}) and [r, {len(down)}]"
            )


def _takes_mlp(
    gate: Tensor, up: Tensor | None, gate_basis: Tensor, up_basis: Tensor | None, down: Tensor,
    gate_bias: Tensor | None, up_bias: Tensor | None,
) -> bool:  # fmt: skip
    return on_gpu(gate, up, gate_basis, up_basis, down, gate_bias, up_bias)


@with_kernel("gpu.lowrank:mlp_factors", when=_takes_mlp, check=_check_mlp)
def mlp_factors(
    gate: Tensor,
    up: Tensor | None,
    gate_basis: Tensor,
    up_basis: Tensor | None,
    down: Tensor,
    *,
    act: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scratch: int = SCRATCH,
    tile: int = 128,
) -> Tensor:
    """(act(gate gate_basis + gate_bias) * (up up_basis + up_bias)) down: [n, r3], its neurons never held as a whole.

    gate [n, r1], up [n, r2]: coefficients; gate_basis [r1, f], up_basis [r2, f]; biases [f]; down [f, r3]: the first of
    the last layer's two factors. up and up_basis None: act(gate gate_basis + gate_bias) down. act: "silu", "gelu",
    "gelu_tanh" or "relu".

    On a GPU, one kernel sums the tiles of f in float32 where that takes no computing twice (r3 up to 256), or where
    scratch=0 asks for it; else the neurons of as many tokens as fit into `scratch` bytes (default 32 MiB) are held. On
    a CPU, `tile` tokens by `tile` neurons at a time; products in the coefficients' dtype, sums in float32 or better.
    Raises ValueError if shapes do not fit together.
    """
    del scratch  # the kernel's
    dtype = gate.dtype
    out = gate.new_empty(gate.shape[0], down.shape[1])
    for first in range(0, gate.shape[0], tile):
        rows = slice(first, first + tile)
        mixed = out.new_zeros(len(out[rows]), out.shape[1], dtype=torch.promote_types(dtype, torch.float32))
        for neuron in range(0, down.shape[0], tile):
            some = slice(neuron, neuron + tile)
            wide = ACTIVATIONS[act](_opened(gate[rows], gate_basis[:, some], _of(gate_bias, some)))
            if up is not None and up_basis is not None:
                wide = wide * _opened(up[rows], up_basis[:, some], _of(up_bias, some))
            mixed += wide @ down[some].to(dtype)
        out[rows] = mixed.to(dtype)
    return out


def _opened(coefficients: Tensor, basis: Tensor, bias: Tensor | None) -> Tensor:
    """What a tile of the basis makes of some tokens' coefficients, in their dtype."""
    return functional.linear(coefficients, basis.to(coefficients.dtype).T, bias)


def _expanded(coefficients: Tensor, basis: Tensor, bias: Tensor | None) -> Tensor:
    """One head's rows [n, d], in float32 or better."""
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    wide = coefficients.to(dtype) @ basis.to(dtype)
    return wide if bias is None else wide + bias.to(dtype)


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rows [n, d], turned in pairs of one entry from each half."""
    if cos is None or sin is None:
        return x
    return rotate(x, cos.to(x.dtype), sin.to(x.dtype))


def _of(x: Tensor | None, some: int | slice) -> Tensor | None:
    return None if x is None else x[some]
