"""What exists: one query's attention over a full cache by several libraries, and over caches quantised by others.

Every case has 32 query heads, 8 KV heads and a head size of 128. Whatever a library cannot do, or is not installed,
is a row with the reason. KIVI's kernel is measured where WORKBENCH_KIVI names a built extension: a .so with its
function `gemv_forward_cuda_outer_dim`.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.measure import failures, peak_bytes, relative_error, run_poisoned, time_us

HEADS, KV_HEADS, WIDTH = 32, 8, 128
LENGTHS, BATCHES = (8 << 10, 32 << 10, 128 << 10), (1, 8)
PAGE = 16  # tokens in a page of a paged cache
GROUP = 64  # entries that share a scale, for transformers' caches
KIVI_GROUP = 32  # the same in KIVI's own configuration
ROOM = 16 << 30  # no transformers cache whose dequantised entries would need more bytes than this in all their copies

Work = Callable[[], Any]
Prepare = Callable[[Tensor, Tensor, Tensor], Work]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Every baseline at every length and batch; quick: the shortest cache alone. Slow to compile comes last."""
    shapes = [(batch, n) for n in LENGTHS for batch in BATCHES][: 1 if quick else None]
    for baselines in (SCALED_DOT_PRODUCT, LIBRARIES):
        for batch, n in shapes:
            yield from _over_full_cache(baselines, batch, n)
    for batch, n in shapes:
        yield from _kivi(batch, n)
    for batch, n in shapes:
        yield from _quantized_caches(batch, n)
    for batch, n in shapes:
        yield from _over_full_cache(COMPILED, batch, n)


# ---------------------------------------------------------------------------------------------- over a full cache


def _backend(name: str, grouped: bool, query: Tensor, keys: Tensor, values: Tensor) -> Work:
    """SDPA by one backend: with enable_gqa or, `grouped`, the query heads of a group as rows of one head."""

    def work() -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            if grouped:
                return sdpa(query.view(len(keys), keys.shape[1], -1, keys.shape[-1]), keys, values)
            return sdpa(query, keys, values, enable_gqa=True)

    return work


def _own_choice(query: Tensor, keys: Tensor, values: Tensor) -> Work:
    return partial(sdpa, query, keys, values, enable_gqa=True)


def _flex(query: Tensor, keys: Tensor, values: Tensor) -> Work:
    return partial(_compiled_flex(), query, keys, values, enable_gqa=True)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _xformers(query: Tensor, keys: Tensor, values: Tensor) -> Work:
    from xformers.ops import fmha

    batch, group = query.shape[0], HEADS // KV_HEADS
    asked = query.view(batch, 1, KV_HEADS, group, WIDTH)  # [b, q, k, g, d]
    seen = (x.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (keys, values))
    return partial(fmha.memory_efficient_attention_forward, asked, *seen, op=fmha.triton_splitk.FwOp)


def _flash_attn(query: Tensor, keys: Tensor, values: Tensor) -> Work:
    from flash_attn import flash_attn_with_kvcache

    return partial(flash_attn_with_kvcache, *(x.transpose(1, 2) for x in (query, keys, values)))


def _flashinfer(tensor_cores: bool, query: Tensor, keys: Tensor, values: Tensor) -> Work:
    import flashinfer

    batch, _, n, _ = keys.shape
    pages = n // PAGE
    paged = tuple(
        x.view(batch, KV_HEADS, pages, PAGE, WIDTH).transpose(1, 2).reshape(-1, KV_HEADS, PAGE, WIDTH)
        for x in (keys, values)
    )
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    counts = partial(torch.arange, dtype=torch.int32, device="cuda")
    last = torch.full((batch,), PAGE, dtype=torch.int32, device="cuda")
    wrapper.plan(
        counts(batch + 1) * pages, counts(batch * pages), last, HEADS, KV_HEADS, WIDTH, PAGE,
        q_data_type=query.dtype, kv_data_type=keys.dtype,
    )  # fmt: skip
    return partial(wrapper.run, query[:, :, 0], paged)


SCALED_DOT_PRODUCT: dict[str, Prepare] = {
    "SDPA, own choice": _own_choice,
    **{f"SDPA {name}, enable_gqa": partial(_backend, name, False) for name in BACKENDS},
    **{f"SDPA {name}, 4 rows a KV head": partial(_backend, name, True) for name in BACKENDS},
}
LIBRARIES: dict[str, Prepare] = {
    "xFormers triton_splitk": _xformers,
    "flash-attn": _flash_attn,
    "FlashInfer, pages, tensor cores": partial(_flashinfer, True),
    "FlashInfer, pages, CUDA cores": partial(_flashinfer, False),
}
COMPILED: dict[str, Prepare] = {"FlexAttention, compiled": _flex}


def fastest(query: Tensor, keys: Tensor, values: Tensor) -> tuple[str, float]:
    """Which way of SDPA takes the least time here, for query [b, h, 1, d] over keys [b, k, n, d], and its µs."""
    times: dict[str, float] = {}
    for what, prepare in SCALED_DOT_PRODUCT.items():
        with suppress(RuntimeError):  # not every backend takes every shape
            times[what] = time_us(prepare(query, keys, values), milliseconds=25)
    what = min(times, key=lambda each: times[each])
    return what, times[what]


def _over_full_cache(baselines: dict[str, Prepare], batch: int, n: int) -> Iterator[dict[str, Any]]:
    query, keys, values = entries(batch, n)
    exact = exact_attention(query, keys, values)
    nbytes = keys.nbytes + values.nbytes + 2 * query.nbytes
    for what, prepare in baselines.items():
        yield _measured(what, batch, n, nbytes, partial(prepare, query, keys, values), exact=exact)


def entries(batch: int, n: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Random query [b, 32, 1, 128], keys and values [b, 8, n, 128] on the device."""
    normal = partial(torch.randn, dtype=dtype, device="cuda")
    return normal(batch, HEADS, 1, WIDTH), normal(batch, KV_HEADS, n, WIDTH), normal(batch, KV_HEADS, n, WIDTH)


def exact_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of query [b, 32, 1, 128] in float64, one sequence of the batch at a time."""
    outs = []
    for asked, key, value in zip(query, keys, values, strict=True):
        grouped = asked.double().view(key.shape[0], -1, key.shape[-1])  # [k, g, d]
        scores = grouped @ key.double().mT / math.sqrt(key.shape[-1])
        outs.append((scores.softmax(dim=-1) @ value.double()).view(asked.shape))
    return torch.stack(outs)


def _measured(
    what: str, batch: int, n: int, nbytes: int, prepare: Callable[[], Work], *, exact: Tensor | None = None, **how: Any
) -> dict[str, Any]:
    """One row. how: for `time_us`. A failure becomes the row's `failed`, the first line of what it said."""
    row: dict[str, Any] = {"what": what, "batch": batch, "n": n, "bytes": nbytes}
    with failures(row):
        work = prepare()
        got = run_poisoned(work)
        if exact is not None:
            row["error"] = relative_error(got.reshape(exact.shape), exact)
        del got
        row["peak"] = peak_bytes(work)
        row["us"] = time_us(work, **how)
    gc.collect()
    torch.cuda.empty_cache()
    return row


# ------------------------------------------------------------------------------------- transformers' QuantizedCache


def packed_bytes(batch: int, n: int, bits: int, group: int) -> int:
    """Keys and values in codes of `bits`, with a 16-bit scale and zero for every `group` of them."""
    count = 2 * batch * KV_HEADS * n * WIDTH
    return count * bits // 8 + count // group * 4


def _quantized_caches(batch: int, n: int) -> Iterator[dict[str, Any]]:
    if 16 * batch * KV_HEADS * n * WIDTH > ROOM:
        return
    for backend in ("quanto", "HQQ"):
        for bits in (4, 2):
            yield _measured(
                f"transformers QuantizedCache, {backend}, {bits} bits", batch, n, packed_bytes(batch, n, bits, GROUP),
                partial(_quantized_step, backend, bits, batch, n), graph=False,
            )  # fmt: skip


def _quantized_step(backend: str, bits: int, batch: int, n: int) -> Work:
    """One layer's part of a decoding step as transformers does it: dequantise all, append, attend by SDPA.

    The residual holds one token at every repetition, so none of them quantises again (which it does every 128 steps).
    """
    from transformers import cache_utils

    axis = {"quanto": 0, "HQQ": 1}[backend]  # those that transformers' documentation recommends
    kind = {"quanto": cache_utils.QuantoQuantizedLayer, "HQQ": cache_utils.HQQQuantizedLayer}[backend]
    layer = kind(nbits=bits, axis_key=axis, axis_value=axis, q_group_size=GROUP, residual_length=128)
    query, keys, values = entries(batch, n)
    layer.update(keys, values)
    newest = keys[:, :, :1].clone(), values[:, :, :1].clone()
    layer.update(*newest)
    residual = layer.keys, layer.values

    def work() -> Tensor:
        layer.keys, layer.values = residual
        return sdpa(query, *layer.update(*newest), enable_gqa=True)

    return work


# ---------------------------------------------------------------------------------------------- KIVI's published kernel


def _kivi(batch: int, n: int) -> Iterator[dict[str, Any]]:
    """KIVI's products of a query with quantised keys, of probabilities with quantised values, and a step of both.

    The codes lie as its kernel reads them; the transpositions that its Python wrapper does before every call are not
    timed. It launches on the legacy stream, which cannot be captured: the host's time counts where it is the longer.
    """
    path = os.environ.get("WORKBENCH_KIVI")
    if path is None:
        yield {"what": "KIVI kernel", "batch": batch, "n": n, "failed": "WORKBENCH_KIVI names no built extension"}
        return
    for bits in (4, 2):
        for part, nbytes in kivi_bytes(batch, n, bits).items():
            yield _measured(
                f"KIVI kernel, {bits} bits, {part}", batch, n, nbytes, partial(_kivi_work, path, bits, batch, n, part),
                graph=False,
            )  # fmt: skip


def kivi_bytes(batch: int, n: int, bits: int) -> dict[str, int]:
    """What each part has to move: codes, scales and zeros, and the float16 scores that pass between its kernels."""
    half = packed_bytes(batch, n, bits, KIVI_GROUP) // 2
    scores = 2 * batch * HEADS * n
    return {"keys": half + scores, "values": half + scores, "step": 2 * half}


@cache
def _kivi_kernel(path: str) -> Callable[..., Tensor]:
    name = Path(path).name.split(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"WORKBENCH_KIVI: {path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel: Callable[..., Tensor] = module.gemv_forward_cuda_outer_dim
    return kernel


def _kivi_work(path: str, bits: int, batch: int, n: int, part: str) -> Work:
    kernel, per_word = _kivi_kernel(path), 32 // bits
    product = partial(_product, kernel, bits)

    def quantised(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random codes, scales and zeros of a matrix [outputs, inputs] for each KV head, packed along the outputs."""
        heads = batch * KV_HEADS
        codes = torch.randint(-(2**31), 2**31 - 1, (heads, outputs // per_word, inputs), device="cuda").int()
        scales = torch.rand(heads, outputs // KIVI_GROUP, inputs, device="cuda").half() / 2**bits
        return codes, scales, -scales * (2**bits - 1) / 2

    asked = torch.randn(batch * HEADS, 1, WIDTH, device="cuda").half()
    weights = torch.randn(batch * HEADS, 1, n, device="cuda").softmax(dim=-1).half()
    keys, values = quantised(n, WIDTH), quantised(WIDTH, n)
    if n == min(LENGTHS):
        for given, matrix in ((asked, keys), (weights, values)):
            error = relative_error(product(given, matrix), _dequantised_product(given, matrix, bits))
            if error > 1e-2:
                raise ArithmeticError(f"KIVI's kernel is off by {error:.1e}: its layout is not what was expected")

    def step() -> Tensor:
        scores = product(asked, keys) / math.sqrt(WIDTH)
        return product(scores.float().softmax(dim=-1).half(), values)

    works: dict[str, Work] = {
        "keys": partial(product, asked, keys),
        "values": partial(product, weights, values),
        "step": step,
    }
    return works[part]


def _product(kernel: Callable[..., Tensor], bits: int, given: Tensor, matrix: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return kernel(given, *matrix, bits, KIVI_GROUP, HEADS, KV_HEADS)


def _dequantised_product(given: Tensor, matrix: tuple[Tensor, Tensor, Tensor], bits: int) -> Tensor:
    """given [b * h, 1, inputs] times the matrices that codes, scales and zeros stand for, in float64."""
    packed, scales, zeros = matrix
    shifts = torch.arange(0, 32, bits, device=packed.device)[None, None, :, None]
    mask: int = 2**bits - 1
    codes = (packed[:, :, None] >> shifts & mask).flatten(1, 2).double()  # [b * k, outputs, inputs]
    exact = codes * scales.double().repeat_interleave(KIVI_GROUP, dim=1)
    exact += zeros.double().repeat_interleave(KIVI_GROUP, dim=1)
    grouped = given.double().view(exact.shape[0], -1, given.shape[-1])  # [b * k, g, inputs]
    product: Tensor = grouped @ exact.mT
    return product.view(given.shape[0], 1, -1)
