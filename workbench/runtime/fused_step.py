"""One token through a model of the Llama family on a GPU, with what stands between its products fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from workbench_kernels import Scoring
from workbench_kernels.step import add_rms_norm, rotate_append, silu_times

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Places(Protocol):
    """A layer's attention: where a new key and value go, and what its query gets."""

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where a new key goes, [t, d] and row numbers [k], and a new value."""

    def attend(self, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of query [h, 1, d] over everything held, the new token included: [h, 1, dv]."""


class FusedStep:
    """The forward pass of one token through a model of the Llama family, with what stands between products fused.

    Modules are read and linear layers called, so compressed ones and their hooks work; nothing is changed in the model.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Places]) -> None:
        self._model: Any = model
        self._layers = layers

    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits [v] behind token [1] at position [1]; each layer's key and value join its store's rows."""
        inner = self._model.model
        hidden = inner.embed_tokens(token)  # [1, w]
        cos, sin = (x[0, 0] for x in inner.rotary_emb(hidden, position_ids=position[None]))  # [d]
        blocks = list(inner.layers[: self._model.config.num_hidden_layers])
        norms = [*(block.input_layernorm for block in blocks[1:]), inner.norm]
        hidden, x = _normed(hidden, blocks[0].input_layernorm)
        for block, store, norm in zip(blocks, self._layers, norms, strict=True):
            attention, mlp = block.self_attn, block.mlp
            query, key, value = (
                product(x).view(-1, attention.head_dim)
                for product in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = _normed(query, attention.q_norm)[1], _normed(key, attention.k_norm)[1]
            turned = rotate_append(query, key, value, cos, sin, *store.rows)
            out = store.attend(turned[:, None], Scoring(attention.scaling)).reshape(1, -1)
            hidden, x = _normed(attention.o_proj(out), block.post_attention_layernorm, hidden)
            hidden, x = _normed(mlp.down_proj(silu_times(mlp.gate_proj(x), mlp.up_proj(x))), norm, hidden)
        logits: Tensor = self._model.lm_head(x)[0]
        return logits


def _normed(x: Tensor, norm: Any, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, norm.weight, norm.variance_epsilon, residual)
