"""Whole decode steps of a model shaped like Llama 3.1 8B, batch 1, 131,072 tokens in the cache, as a CUDA graph.

Weights are random numbers, and so are the keys and values that the stores begin with: reading so many tokens takes
longer than all of this, and no time depends on what is held. What is kept of SnapKV is a random quarter of each head.
KIVI's groups are of 64, its residual of 128 tokens; entries are quantised between replays as in use. *Bytes* are all
weights and the cache. The peak is the allocator's, from when the stores have got their room until the last token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workbench.kv.stores import DenseStore, PackedStore, Store
from workbench.measure.memory import tensor_bytes
from workbench.runtime.cuda_graph import CapturedStep, predicted_nbytes
from workbench.runtime.decode import Decoder

TOKENS, FEW = 128 << 10, 8 << 10
LAYERS, KV_HEADS, WIDTH = 32, 8, 128
UNTIMED, TIMED = (
    136,
    160,
)  # tokens; after 128 and 256, KIVI's tails are quantised, the first time by kernels that are compiled then
GROUP, RESIDUAL = 64, 128
KIND = torch.bfloat16

Build = Callable[[Tensor, Tensor, Tensor], Store]
QUARTER = 0.25
RECIPES: dict[str, tuple[float, int | None]] = {  # the share of positions kept, and bits
    "full": (1.0, None),
    "SnapKV 25 %": (QUARTER, None),
    "KIVI 4 bit": (1.0, 4),
    "KIVI 2 bit": (1.0, 2),
    "SnapKV 25 % + KIVI 4 bit": (QUARTER, 4),
    "SnapKV 25 % + KIVI 2 bit": (QUARTER, 2),
}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second by every recipe; quick: a short cache."""
    model = eight_billion()
    for what, (kept, bits) in RECIPES.items():
        yield {"what": what, "n": FEW if quick else TOKENS, **measured(model, FEW if quick else TOKENS, kept, bits)}
        gc.collect()
        torch.cuda.empty_cache()


def eight_billion() -> PreTrainedModel:
    """The shapes of Llama 3.1 8B, random weights, made on the device."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=KV_HEADS, head_dim=WIDTH, vocab_size=128256, max_position_embeddings=TOKENS + 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False, dtype=KIND,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(KIND)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()
    return model


def measured(model: PreTrainedModel, tokens: int, kept: float, bits: int | None) -> dict[str, Any]:
    """One recipe's figures."""
    stores = [store_of(tokens, kept, bits) for _ in range(LAYERS)]
    nbytes = tensor_bytes([*model.parameters(), *model.buffers()]) + sum(store.nbytes for store in stores)
    decoder = Decoder(model, stores, tokens)
    predicted = predicted_nbytes(decoder, UNTIMED + TIMED)
    step = CapturedStep(decoder, 1, UNTIMED + TIMED)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    answer = step.answer(())
    for _ in range(UNTIMED):
        next(answer)
    began = perf_counter()
    counted = sum(1 for _ in answer)
    torch.cuda.synchronize()
    seconds = perf_counter() - began
    peak = torch.cuda.max_memory_allocated()
    return {
        "bytes": nbytes, "us": 1e6 * seconds / counted, "tokens/s": counted / seconds,
        "allocated": peak, "predicted": predicted, "off": peak / predicted - 1,
    }  # fmt: skip


def store_of(tokens: int, kept: float, bits: int | None) -> Store:
    """A layer's store with `kept` of so many random entries of each head."""
    draw = partial(torch.randn, KV_HEADS, tokens, WIDTH, dtype=KIND, device="cuda")
    keep = torch.ones(KV_HEADS, tokens, dtype=torch.bool, device="cuda")
    if kept < 1:
        chosen = torch.rand(KV_HEADS, tokens, device="cuda").topk(int(kept * tokens), dim=1).indices
        keep = torch.zeros_like(keep).scatter_(1, chosen, True)
    if bits is None:
        return DenseStore.where(draw(), draw(), keep, KIND)
    return PackedStore.where(draw(), draw(), keep, KIND, bits=bits, group=GROUP, residual=RESIDUAL)
