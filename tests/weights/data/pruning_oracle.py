"""Makes pruning_oracle.safetensors: what llm-compressor's Wanda and SparseGPT make of the layer in weight_oracle.

Needs llm-compressor 0.14.0.1, which wants another transformers than ours: an environment of its own. Run it from here
by `python pruning_oracle.py`. Both methods see nothing of their inputs but the second moment, so the inputs given to
them are as many tokens as there are columns, with exactly the moment of the file.
"""

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as sparsegpt
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify as wanda
from safetensors.torch import load_file, save_file

PATTERNS = {"unstructured": (0, 0), "2:4": (2, 4), "4:8": (4, 8)}  # 0: none

held = load_file("weight_oracle.safetensors")
values, vectors = torch.linalg.eigh(held["moment"].double())
root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
inputs = (len(root) ** 0.5 * root).float()  # [tokens, i]

found = {}
with torch.no_grad():
    for pattern, (pruned, of) in PATTERNS.items():
        layer = torch.nn.Linear(*reversed(held["weight"].shape), bias=False)
        layer.weight.copy_(held["weight"])
        norms, _ = wanda.accumulate_row_scalars(inputs, layer, wanda.make_empty_row_scalars(layer), 0)
        found[f"wanda {pattern}"] = wanda.sparsify_weight(layer, {layer: norms}, 0.5, pruned, of)
        hessian, _ = sparsegpt.accumulate_hessian(inputs, layer, sparsegpt.make_empty_hessian(layer), 0)
        found[f"sparsegpt {pattern}"] = sparsegpt.sparsify_weight(
            layer, {layer: hessian}, 0.5, pruned, of, block_size=128, dampening_frac=0.01, preserve_sparsity_mask=False
        )[1]
save_file({name: weight.contiguous() for name, weight in found.items()}, "pruning_oracle.safetensors")
