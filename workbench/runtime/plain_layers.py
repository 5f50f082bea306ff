"""Models whose decoder layers are known operation by operation, so that a step may compute them by itself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # one decoder layer, with or without norms of heads and biases
# transformers leaves hooks behind that only note what passes, once all attentions or hidden states were asked for.
_LISTENERS = "transformers.utils.output_capturing"


def plain_layers(model: PreTrainedModel) -> bool:
    """Whether all modules around the matrix products are transformers' own and do nothing else."""
    family, at = type(model).__name__.removesuffix("ForCausalLM"), cast("Any", model)
    if family not in _FAMILIES or not type(model).__module__.startswith("transformers.models."):
        return False
    if getattr(at.config, "sliding_window", None) or at.config.hidden_act != "silu":
        return False
    home, inner = sys.modules[type(model).__module__], at.model
    dtype = device_weight(model).dtype
    passed: list[tuple[nn.Module, str]] = [(inner, "Model"), (inner.norm, "RMSNorm")]
    for layer in inner.layers:
        passed += [(layer, "DecoderLayer"), (layer.self_attn, "Attention"), (layer.mlp, "MLP")]
        passed += [(layer.input_layernorm, "RMSNorm"), (layer.post_attention_layernorm, "RMSNorm")]
        if family == "Qwen3":
            passed += [(layer.self_attn.q_norm, "RMSNorm"), (layer.self_attn.k_norm, "RMSNorm")]
    return all(
        type(module) is getattr(home, family + name)
        and only_listened_to(module)
        and (name != "RMSNorm" or cast("Tensor", module.weight).dtype == dtype)
        for module, name in passed
    )


def device_weight(model: PreTrainedModel) -> Tensor:
    """The embedding's weight, which says in what precision a model computes."""
    return cast("Tensor", model.get_input_embeddings().weight)


def only_listened_to(module: nn.Module) -> bool:
    """Whether no hook changes what goes into a module or comes out of it."""
    after, before = module._forward_hooks, module._forward_pre_hooks  # noqa: SLF001 (torch tells no other way)
    return not before and all(getattr(hook, "__module__", None) == _LISTENERS for hook in after.values())
