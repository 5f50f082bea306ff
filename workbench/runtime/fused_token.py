"""One token through a model on a CPU, without the model's modules: a decoder layer is four products and an attention.

What a step costs there is reading the weights. Where a copy in fewer bytes stands for the same numbers, it is read in
their place: 16 bits where a checkpoint had so many, 5 or 9 where its weights were rounded in blocks, as GGUF files are.
Sums are in float32, as the model's own are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from workbench.engine.attention_hook import Handler
from workbench.kv.stores import Store
from workbench.measure.memory import tensor_bytes
from workbench.runtime.plain_layers import device_weight, only_listened_to, plain_layers
from workbench_kernels import Scoring
from workbench_kernels.cpu.token import Rows, attend, attends, turn
from workbench_kernels.step import add_rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Layer:
    """A decoder layer's weights. fronts: of queries, keys and values; gates: of gate and up."""

    index: int
    heads: int
    head_dim: int
    scaling: float
    norms: tuple[Any, Any]
    head_norms: tuple[Any, Any] | None
    fronts: Rows
    out: Rows
    gates: Rows
    down: Rows


class FusedToken:
    """The forward pass of one token through a model that `plain_layers` knows, in float32 on the CPU.

    The parameters are the model's own. nbytes: of what is held beside them, the copies in fewer bytes.
    """

    def __init__(self, model: PreTrainedModel, compiled: ctypes.CDLL | None) -> None:
        inner: Any = model.model
        self._compiled = compiled
        self._embedding, self._rotary, self._norm = inner.embed_tokens.weight, inner.rotary_emb, inner.norm
        self._linears: list[tuple[Any, Tensor, Tensor | None]] = []
        self._versions: list[int] = []
        self._copies: list[Tensor] = []
        with torch.inference_mode():
            self._layers = [self._layer(block) for block in inner.layers[: model.config.num_hidden_layers]]
            self._head = self._rows([model.lm_head])
        self.nbytes = tensor_bytes(self._copies)

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the model can be computed so."""
        first = device_weight(model)
        if first.dtype != torch.float32 or first.device.type != "cpu" or not plain_layers(model):
            return False
        at: Any = model
        linears = [at.lm_head]
        for block in at.model.layers:
            attention, mlp = block.self_attn, block.mlp
            linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
            linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return (
            type(at.model.embed_tokens) is nn.Embedding
            and only_listened_to(at.model.embed_tokens)
            and only_listened_to(at.model.rotary_emb)
            and all(_plain(linear) for linear in linears)
        )

    @property
    def compiled(self) -> bool:
        """Whether compiled code computes, where there is a compiler, or PyTorch."""
        return self._compiled is not None

    @property
    def current(self) -> bool:
        """Whether the weights are still those that were taken: the same tensors, and not written into since."""
        return self._versions == [weight._version for _, weight, _ in self._linears] and all(  # noqa: SLF001
            linear.weight is weight and linear.bias is bias for linear, weight, bias in self._linears
        )

    def __call__(self, handler: Handler, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits [1, v] behind token ids [1] at positions [1]."""
        with torch.inference_mode():
            hidden = embedding(ids, self._embedding)
            cos, sin = (x[0, 0].contiguous() for x in self._rotary(hidden, position_ids=positions[None]))
            hidden = hidden[0]
            for layer in self._layers:
                hidden = self._through(layer, hidden, cos, sin, handler)
            return self._head(hidden, norm=self._norm.weight, eps=self._norm.variance_epsilon)[None]

    def attend(self, store: Store, query: Tensor, scoring: Scoring) -> Tensor | None:
        """Attention of the newest token's query [h, 1, d] over all that a store holds, where it is read in place."""
        if self._compiled is None or scoring.window is not None:
            return None
        held = store.in_place
        if held is None or not attends(*held):
            return None
        out = attend(query, *held, scoring, self._compiled)
        store.attended(self._compiled)
        return out

    def _through(self, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor, handler: Handler) -> Tensor:
        before, after = layer.norms
        made = layer.fronts(hidden, norm=before.weight, eps=before.variance_epsilon).view(-1, layer.head_dim)
        kv_heads = (made.shape[0] - layer.heads) // 2
        turned, value = made[: layer.heads + kv_heads], made[layer.heads + kv_heads :]
        query, key = turned[: layer.heads], turned[layer.heads :]
        if layer.head_norms is not None:
            norms = zip((query, key), layer.head_norms, strict=True)
            turned = torch.cat([add_rms_norm(x, norm.weight, norm.variance_epsilon)[1] for x, norm in norms])
        turned = turn(turned, cos, sin, self._compiled)
        query, key = turned[: layer.heads], turned[layer.heads :]
        out = handler.attend(layer.index, query[:, None], key[:, None], value[:, None], Scoring(layer.scaling))
        hidden = layer.out(out.reshape(-1), plus=hidden)
        gates = layer.gates(hidden, norm=after.weight, eps=after.variance_epsilon)
        return layer.down(gates, gated=True, plus=hidden)

    def _layer(self, block: Any) -> _Layer:
        attention, mlp = block.self_attn, block.mlp
        return _Layer(
            attention.layer_idx,
            attention.q_proj.out_features // attention.head_dim,
            attention.head_dim,
            attention.scaling,
            (block.input_layernorm, block.post_attention_layernorm),
            (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
            self._rows([attention.q_proj, attention.k_proj, attention.v_proj]),
            self._rows([attention.o_proj]),
            self._rows([mlp.gate_proj, mlp.up_proj]),
            self._rows([mlp.down_proj]),
        )

    def _rows(self, linears: Sequence[Any]) -> Rows:
        weights = [linear.weight for linear in linears]
        for linear in linears:
            self._linears.append((linear, linear.weight, linear.bias))
            self._versions.append(linear.weight._version)  # noqa: SLF001  (torch has no other name for it)
        rows = Rows(weights, [linear.bias for linear in linears], self._compiled)
        self._copies += rows.copies
        return rows


def _plain(linear: nn.Module) -> bool:
    """Whether this is a linear layer of float32 numbers and nothing else."""
    if type(linear) is not nn.Linear or not only_listened_to(linear):
        return False
    held = [linear.weight, *(() if linear.bias is None else (linear.bias,))]
    return all(
        x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() and not x.is_inference() for x in held
    )
