"""What the indexer of sparse attention (DeepSeek's DSA) keeps of a run: its own key of every token so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

_KIND = "indexer keys"  # under (_KIND, layer) in what a run remembers


class IndexerCache(DynamicCache):
    """The cache of one pass: indexers find their keys of earlier passes in `memory`, and attention goes by its own.

    memory: what the run remembers, where each indexer's keys [1, n, d] are replaced as tokens come, never written into.
    """

    def __init__(self, config: PretrainedConfig, memory: dict[Any, Any]) -> None:
        super().__init__(config=config)
        self._memory = memory
        self.seen: int = next((keys.shape[1] for name, keys in memory.items() if _is_keys(name)), 0)

    def update(self, key_states: Tensor, value_states: Tensor, *_where: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        before = self._memory.get((_KIND, layer_idx))
        whole = indexer_key_states if before is None else torch.cat([before, indexer_key_states], dim=1)
        self._memory[_KIND, layer_idx] = whole
        return whole

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  (every layer has seen the same tokens)
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return self.seen + query_length, 0


def _is_keys(name: Any) -> bool:
    return isinstance(name, tuple) and name[0] == _KIND
