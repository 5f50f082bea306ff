"""What compressed weights do on a GPU. Skipped where there is none, in CI too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.weights.support import drawn
from workbench.errors import BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.registry import method, registered
from workbench.weights.base import WeightMethod
from workbench.weights.compress import compressed
from workbench.weights.layers import (
    BitBlock,
    BitBlocksLinear,
    CodebookLinear,
    CompactLinear,
    DenseLinear,
    DictionaryLinear,
    IntegerLinear,
    OutliersLinear,
    PackedLinear,
    Parts,
    ShiftLinear,
    SparseLinear,
    VectorLinear,
    compact,
)
from workbench.weights.layers.low_rank import LowRankLinear
from workbench_kernels.integer import input_codes, input_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SHORT: dict[str, dict[str, Any]] = {  # parameters that make slow methods quick
    "evopress": {"of": "rtn", "generations": 1, "offspring": 2, "texts": 2, "tokens": 16, "slopes": 0},
    "foldgpt": {"steps": 2},
    "ziplm": {"starts": 2, "patience": 1, "texts": 2, "tokens": 16},
    "evopress-depth": {"generations": 1, "offspring": 2, "beginnings": 2, "texts": 2, "tokens": 16},
    "bitstack": {"blocks": 3},
    "vptq": {"index_bits": 6, "rounds": 3},
}
OUTPUTS, INPUTS = 600, 512  # more than two marks, but no multiple; runs of 64 bytes also at one bit


def ids(count: int) -> Tensor:
    return torch.randint(3, 250, (1, count), generator=torch.Generator().manual_seed(count))


def off(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over that of what was wanted."""
    assert got.shape == want.shape and bool(got.isfinite().all())
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm())


# --- Methods


def made(key: str, model: Any) -> Any:
    parameters = SHORT.get(key, {})
    try:
        return compressed(model, [method(key, **parameters)])
    except BudgetTooSmall as refusal:
        return compressed(model, [method(key, budget=refusal.smallest, **parameters)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key", [cls.key for cls in registered("weights")])
def test_a_model_compressed_on_the_gpu_says_the_same_in_host_memory(key: str, dtype: torch.dtype) -> None:
    if key == "hqq" and find_spec("hqq") is None:
        pytest.skip("needs the extra `weights`")
    model: Any = tiny("llama").to(CUDA, dtype)
    assert issubclass(type(method(key)), WeightMethod)
    twin = made(key, model)
    assert all(tensor.is_cuda for tensor in (*twin.parameters(), *twin.buffers()))
    layers = {name: layer for name, layer in twin.named_modules() if isinstance(layer, CompactLinear)}
    sizes = {name: layer.nbytes for name, layer in layers.items()}
    with torch.no_grad():
        got = [twin(input_ids=ids(count).to(CUDA), use_cache=False).logits for count in (1, 57)]
        twin.to(CPU)
        assert {name: layer.nbytes for name, layer in layers.items()} == sizes
        assert all(tensor.device == CPU for tensor in (*twin.parameters(), *twin.buffers()))
        want = [twin(input_ids=ids(count), use_cache=False).logits for count in (1, 57)]
    # Inputs that are rounded may fall on either side of a half; 16 bits round in every layer, each device its own way.
    rounded = any(isinstance(layer, IntegerLinear) for layer in layers.values())
    bound = 0.05 if dtype == torch.bfloat16 else 0.02 if rounded else 1e-3
    for here, there in zip(got, want, strict=True):
        assert off(here, there) < bound


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "phi3", "mixtral"])
def test_other_architectures_are_compressed_on_the_gpu_too(architecture: str) -> None:
    for key in ("rtn", "gptq", "wanda", "svd", "absmax"):
        twin = made(key, tiny(architecture).to(CUDA))
        with torch.no_grad():
            got = twin(input_ids=ids(40).to(CUDA), use_cache=False).logits
            want = twin.to(CPU)(input_ids=ids(40), use_cache=False).logits
        assert off(got, want) < 0.02, key


# --- Layers


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high))


def packed(bits: int, group: int, zeros: str, bias: nn.Parameter) -> PackedLinear:
    groups = -(-INPUTS // group)
    zero = {
        "none": None,
        "uint8": whole(2**bits, OUTPUTS, groups).to(torch.uint8),
        "float16": drawn(OUTPUTS, groups, seed=3).abs().mul(2 ** (bits - 1)).half(),
    }[zeros]
    codes, scale = whole(2**bits, OUTPUTS, INPUTS).to(torch.uint8), drawn(OUTPUTS, groups, seed=4).abs() / 2**bits
    return PackedLinear(codes, scale, zero, bits, bias, group=group, columns=drawn(INPUTS, seed=5).abs() + 0.5)


def integer(bits: int, bias: nn.Parameter, **options: Any) -> IntegerLinear:
    codes, scale = whole(2**bits, OUTPUTS, INPUTS).to(torch.uint8), drawn(OUTPUTS, 1, seed=4).abs() / 2**bits
    return IntegerLinear(codes, scale, None, bits, bias, group=INPUTS, **options)


def places(share: float) -> Tensor:
    return torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(7)) < share


def two_of_four() -> Tensor:
    scores = drawn(OUTPUTS, INPUTS // 4, 4, seed=8)
    return (scores >= scores.topk(2, dim=-1).values[..., -1:]).flatten(1)


def vector(bias: nn.Parameter) -> VectorLinear:
    indices = [whole(4096, OUTPUTS // 8, INPUTS), whole(16, OUTPUTS // 8, INPUTS)]
    return VectorLinear(indices, [drawn(4096, 8), drawn(16, 8)], drawn(OUTPUTS, seed=2), [12, 4], bias)


def dictionary(bias: nn.Parameter) -> DictionaryLinear:
    chosen = drawn(OUTPUTS, 96).argsort(dim=1) < 12
    return DictionaryLinear(drawn(96, INPUTS), chosen, drawn(OUTPUTS, 12, seed=2), bias)


def parts(bias: nn.Parameter) -> Parts:
    some = torch.arange(0, INPUTS, 3)
    return Parts(
        [SparseLinear(drawn(OUTPUTS, INPUTS), places(0.3)), DenseLinear(drawn(OUTPUTS, some.numel()))],
        [None, some],
        INPUTS,
        bias,
    )


def shift(bias: nn.Parameter) -> ShiftLinear:
    return ShiftLinear(whole(8, OUTPUTS, INPUTS).to(torch.uint8), drawn(OUTPUTS, 8).abs(), 3, bias, group=64)


def bit_blocks(bias: nn.Parameter) -> BitBlocksLinear:
    blocks = [BitBlock.of(places(0.5), drawn(OUTPUTS, 4, seed=s), drawn(4, INPUTS, seed=s + 1)) for s in (1, 3)]
    return BitBlocksLinear(blocks, bias)


LAYERS: dict[str, Callable[[nn.Parameter], CompactLinear]] = {
    **{f"packed {bits} {zeros}": lambda bias, bits=bits, zeros=zeros: packed(bits, 64, zeros, bias)  # type: ignore[misc]
       for bits in (1, 2, 3, 4, 5, 6, 8) for zeros in ("none", "uint8", "float16")},
    "packed, uneven groups": lambda bias: packed(4, 80, "uint8", bias),
    "sparse, uneven rows": lambda bias: SparseLinear(drawn(OUTPUTS, INPUTS), places(0.5), bias),
    "sparse 2:4": lambda bias: SparseLinear(drawn(OUTPUTS, INPUTS), two_of_four(), bias),
    "outliers by place": lambda bias: OutliersLinear(drawn(OUTPUTS, INPUTS), places(0.01), bias),
    "outliers by map": lambda bias: OutliersLinear(drawn(OUTPUTS, INPUTS), places(0.2), bias),
    "outliers of 8 bits": lambda bias: OutliersLinear(
        drawn(OUTPUTS, INPUTS), places(0.01), bias, scale=torch.full((OUTPUTS,), 0.03)
    ),
    "codebook": lambda bias: CodebookLinear(drawn(40, INPUTS), whole(40, OUTPUTS), bias),
    "low rank": lambda bias: LowRankLinear(drawn(24, INPUTS), drawn(OUTPUTS, 24), bias),
    "dense": lambda bias: DenseLinear(drawn(OUTPUTS, INPUTS), bias),
    "dictionary": dictionary,
    "vector": vector,
    "shift": shift,
    "bit blocks": bit_blocks,
    "parts": parts,
}  # fmt: skip
INTEGERS: dict[str, Callable[[nn.Parameter], IntegerLinear]] = {
    "W8A8": lambda bias: integer(8, bias),
    "W4A8": lambda bias: integer(4, bias),
    "W4A4": lambda bias: integer(4, bias, input_bits=4),
    "by column": lambda bias: integer(8, bias, profile=drawn(INPUTS, seed=6).abs() + 0.1),
    "crossed": lambda bias: integer(8, bias, alpha=0.15),
}


def on(device: torch.device, dtype: torch.dtype, name: str, of: Any = LAYERS) -> Any:
    layer = of[name](nn.Parameter(drawn(OUTPUTS, seed=1), requires_grad=False))
    layer.bias.data = layer.bias.data.to(dtype)
    return layer.to(device)


@pytest.mark.parametrize("tokens", [1, 8, 512])  # twice as many are multiplied: by each kernel of packed layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bf16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_with_the_weight_that_it_stands_for(name: str, dtype: torch.dtype, tokens: int) -> None:
    layer, twin = on(CUDA, dtype, name), on(CPU, dtype, name)
    assert layer.nbytes == twin.nbytes == tensor_bytes(twin.buffers())
    x = drawn(2, tokens, INPUTS, seed=9).to(dtype)
    with torch.no_grad():
        want = linear(x.double(), twin.dequantised(torch.float64), twin.bias.double())
        bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert off(layer.dequantised(), twin.dequantised()) < 1e-5
        assert off(layer(x.to(CUDA)), want) < bound


@pytest.mark.parametrize("tokens", [1, 16, 17, 509, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_multiplied_as_in_host_memory(name: str, dtype: torch.dtype, tokens: int) -> None:
    layer, twin = on(CUDA, dtype, name, INTEGERS), on(CPU, dtype, name, INTEGERS)
    assert layer.nbytes == twin.nbytes
    x = drawn(tokens, INPUTS, seed=9).to(dtype)
    with torch.no_grad():
        got, want = layer(x.to(CUDA)), twin(x)
    assert off(got, want) < (1e-5 if twin.by_token and dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bf16", "float16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_are_rounded_to_the_same_integers_as_in_host_memory(bits: int, dtype: torch.dtype) -> None:
    x = drawn(300, INPUTS, seed=9).to(dtype)  # in 16 bits, many of them halfway between two integers
    there = x.to(CUDA)
    want, got = input_codes(x, input_step(x, bits), bits), input_codes(there, input_step(there, bits), bits)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("name", LAYERS)
def test_tiles_give_what_the_whole_weight_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = on(CUDA, torch.float32, name), drawn(3, INPUTS, seed=9).to(CUDA)
    with torch.no_grad():
        want = layer(x)
        for rows in (256, 100):  # at marks, and between them
            monkeypatch.setattr(compact, "_TILE", rows * INPUTS * 4)
            assert off(layer(x), want) < 1e-5


@contextmanager
def never_waiting() -> Iterator[None]:
    """An error where the host waits for the device: a number read back, a copy, a size that depends on values."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [*LAYERS, *INTEGERS])
def test_one_token_waits_for_nothing_and_can_be_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "_TILE", 256 * INPUTS * 2)  # several tiles, as large layers have
    layer = on(CUDA, torch.bfloat16, name, {**LAYERS, **INTEGERS})
    x, other = (drawn(1, INPUTS, seed=seed).to(CUDA, torch.bfloat16) for seed in (9, 10))
    with torch.no_grad():
        want = layer(x), layer(other)
        with never_waiting():
            layer(x)
        graph, held = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            out = layer(held)
        for given, wanted in zip((x, other), want, strict=True):
            held.copy_(given)
            graph.replay()
            assert off(out, wanted) < 5e-3


def test_a_layer_that_is_copied_and_moved_leaves_nothing_behind() -> None:
    layer = on(CPU, torch.bfloat16, "packed 4 uint8")
    before = torch.cuda.memory_allocated()
    moved = copy.deepcopy(layer).to(CUDA)
    with torch.no_grad():
        moved(drawn(1, INPUTS).to(CUDA, torch.bfloat16))
    held = torch.cuda.memory_allocated() - before
    tensors = len([*moved.parameters(), *moved.buffers()])
    assert held <= moved.nbytes + moved.bias.nbytes + 512 * tensors  # the allocator rounds up
