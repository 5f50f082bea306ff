"""What tells one model from another: a hash of its config, every number in its weights, and its tokenizer."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from workbench.results.schema import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK = 1 << 26  # numbers that are copied off a GPU at a time


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """32 hexadecimal digits, the same wherever the model lies and whatever it is called."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict()
    named = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest.update(canonical(named).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in tensor.detach().reshape(-1).split(_CHUNK):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = canonical(tokenizer.get_vocab()) if backend is None else str(backend.to_str())
        digest.update(f"{words} {tokenizer.chat_template} {tokenizer.special_tokens_map}".encode())
    return digest.hexdigest()
