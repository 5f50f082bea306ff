"""Bart's kin: positions are counted from what the model's own cache holds. XGLM, MVP and TrOCR have Bart's attention
too, as it was before transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend, Positions


def _forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    source = hidden_states if key_value_states is None else key_value_states
    query, key, value = (
        projection(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projection, x in ((module.q_proj, hidden_states), (module.k_proj, source), (module.v_proj, source))
    )
    out, weights = attend(module, query, key, value, attention_mask, scaling=module.scaling)
    return module.out_proj(out.flatten(2)), weights


def _embedded(
    module: Any,
    positions: Positions,
    *given: Any,  # ids or their shape, and the length again
    past_key_values_length: int = 0,  # noqa: ARG001  (0: there is no such cache)
    position_ids: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    at = positions().to(module.weight.device)
    embedded: Tensor = type(module).forward(module, given[0], position_ids=at)
    return embedded


POSITIONS = Adapter("forward", ("weight",), _embedded, positions=True)
ATTENTION = Adapter("forward", ("q_proj", "k_proj", "v_proj", "out_proj", "head_dim", "scaling", "layer_idx"), _forward)
