"""Values of attention replaced by fewer mixtures of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.core.precision import checked
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers.narrow_attention import NarrowAttention
from workbench.weights.solvers.module_decompositions import mixtures, value_moment
from workbench.weights.surgery.narrow import linear_like
from workbench.weights.surgery.prunable import PrunableAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mix_values(twin: PreTrainedModel, module: PrunableAttention, width: int, inputs: Mapping[str, InputStats]) -> None:
    """Replace each KV head's values by `width` mixtures of them, and the layer behind them by what makes of these what
    its query heads made of the values.
    """
    attention: Any = twin.get_submodule(module.name)
    value, out = attention.v_proj, attention.o_proj
    stats = inputs[f"{module.name}.v_proj"]
    rows = value.weight.detach().float().unflatten(0, (module.heads, -1))  # [k, d, i]
    bias = torch.zeros_like(rows[..., 0]) if value.bias is None else value.bias.detach().float().view_as(rows[..., 0])
    columns = out.weight.detach().float().unflatten(1, (module.heads, -1, module.width))  # [o, k, g, d]
    new_rows, new_bias, new_columns = [], [], []
    for head in range(module.heads):
        mixing, outputs = mixtures(
            columns[:, head].transpose(0, 1).flatten(0, 1), value_moment(rows[head], bias[head], stats), width
        )
        new_rows.append(mixing @ rows[head])
        new_bias.append(mixing @ bias[head])
        new_columns.append(outputs.unflatten(0, (-1, out.out_features)).permute(1, 0, 2))  # [o, g, r]
    v_bias = None if value.bias is None else nn.Parameter(torch.cat(new_bias).to(value.bias.dtype), False)
    v_proj = _like(value, torch.cat(new_rows), v_bias)
    o_proj = _like(out, torch.stack(new_columns, dim=1).flatten(1), out.bias)
    channels = torch.arange(width).expand(module.heads, -1)
    twin.set_submodule(module.name, NarrowAttention(attention, v_proj, o_proj, channels))


def _like(layer: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A plain layer with this weight [o, i], in the precision of another."""
    return linear_like(layer, checked(weight, layer.weight.dtype, "its weights").contiguous(), bias)
