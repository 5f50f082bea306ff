"""Distant context in blocks in host memory: each pass fetches the blocks that match it, all at one distance."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor

from workbench.core.rope import Rotation
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.tiered import TieredStore
from workbench_kernels import Scoring
from workbench_kernels.softmax import attention_weights

_TOGETHER = 128  # queries that look up blocks together: bounds what scores take for a long question


class BlockStore(TieredStore):
    """The first `sinks` tokens and a window on the device; what leaves the window goes to host memory in whole blocks.

    What stands `window` tokens or more behind a query is attended to as if it stood exactly `window` behind it, so no
    text is too long for the model's positions. Of each block the device holds the mean key of the `representatives`
    that its own window attended to most, as it would be at position 0; a pass fetches the `blocks` blocks that match
    the mean of its queries best over all heads. All heads hold the same positions.

    room: entries a head that may be on the device; a pass of more tokens than fit takes what it needs.
    """

    def __init__(
        self,
        near: DenseStore,
        far: HostRows,
        means: Rows,
        rotation: Rotation,
        *,
        room: int,
        sinks: int,
        window: int,
        block: int,
        representatives: int,
        blocks: int,
    ) -> None:
        """near: its state is the attention that each entry received from its window. means [k, far blocks, d].

        rotation: the layer's.
        """
        self.near, self.far, self.means, self.rotation = near, far, means, rotation
        self.room, self.sinks, self.window = room, sinks, window
        self.block, self.representatives, self.blocks = block, representatives, blocks

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, rotation: Rotation, **sizes: int) -> BlockStore:
        """A store without entries, for such keys [k, 0, d] and values [k, 0, dv]."""
        positions, received = (keys.new_empty(keys.shape[0], 0, 1, dtype=kind) for kind in (torch.int32, torch.float32))
        near = DenseStore(Rows.of(keys), Rows.of(values), Rows.of(positions), Rows.of(received))
        far = HostRows.where(keys, values, torch.ones(keys.shape[:2], dtype=torch.bool), keys.dtype)
        return cls(near, far, Rows.of(keys.clone()), rotation, **sizes)

    @property
    def reach(self) -> int:
        return self.window

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        excess = self.near.longest + keys.shape[1] - self.room
        movable = max(self.near.longest - self.sinks, 0) // self.block
        if excess > 0 and movable:
            self._move_out(min(-(-excess // self.block), movable))
        self.near.append(keys, values, positions)

    def _move_out(self, count: int) -> None:
        """Move the oldest `count` blocks behind the sinks to host memory."""
        near, received = self.near.contents(self.means.data.dtype), self.near.eviction_state
        assert received is not None
        positions = near.positions[0].long()
        slots = positions.argsort()[self.sinks : self.sinks + count * self.block]  # [e], oldest first
        keys, where, heads = near.keys[:, slots], positions[slots], near.keys.shape[0]
        self.far.append(keys, near.values[:, slots], where.expand(heads, -1))
        flat = self.rotation.turned_back(keys, where).unflatten(1, (count, self.block))  # [k, c, block, d]
        most = received[:, slots].unflatten(1, (count, self.block)).topk(self.representatives, dim=2).indices
        means = flat.gather(2, most[..., None].expand(*most.shape, flat.shape[-1])).mean(dim=2)
        self.means.append(means.to(self.means.data.dtype), block=count)
        self.near.evict(slots.expand(heads, -1))

    def reserve(self, tokens: int) -> None:
        self.near.reserve(max(min(tokens, self.room - self.near.longest), 0))

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        parts = zip(query.split(_TOGETHER, dim=1), query_positions.split(_TOGETHER), strict=True)
        return torch.cat([self._pass(part, at, scoring) for part, at in parts], dim=1), None

    def _pass(self, query: Tensor, at: Tensor, scoring: Scoring) -> Tensor:
        near = self.near.contents(torch.float32)
        kv_heads = near.keys.shape[0]
        keys, values, positions = near.keys, near.values, near.positions[0].long()
        grouped = query.float().unflatten(0, (kv_heads, -1))  # [k, g, q, d]
        at = at.to(positions.device)
        # As queries would be at position `window`, where all that is distant is at position 0.
        distant = self.rotation.turned_back(grouped, (at - self.window).clamp_min(0))
        slots = self.find(distant)
        if slots.numel():
            far_keys, far_values, far_positions = self.far.fetch(slots.expand(kv_heads, -1))()
            keys = torch.cat([keys, far_keys.float()], dim=1)
            values = torch.cat([values, far_values.float()], dim=1)
            positions = torch.cat([positions, far_positions[0]])
        behind = at[:, None] - positions  # [q, m]
        products = grouped @ keys[:, None].transpose(2, 3)  # [k, g, q, m]
        clipped = (behind[-1] >= self.window).nonzero()[:, 0]
        if clipped.numel():
            flat = self.rotation.turned_back(keys[:, clipped], positions[clipped])
            products[..., clipped] = torch.where(
                behind[:, clipped] >= self.window, distant @ flat[:, None].transpose(2, 3), products[..., clipped]
            )
        rows = attention_weights(products, scoring, behind >= 0, scoring.offsets(at, positions))
        received, count = self.near.eviction_state, near.keys.shape[1]
        assert received is not None
        inside = (behind[:, :count] < self.window).float()
        self.near.replace_state(received + (rows[..., :count] * inside).sum(dim=(1, 2)))
        return (rows @ values[:, None]).flatten(0, 1).to(query.dtype)

    def find(self, distant: Tensor) -> Tensor:
        """The slots in host memory of the blocks for queries [k, g, q, d] at position `window`, int64 [e]."""
        count = self.means.longest
        query = distant.mean(dim=2).sum(dim=1)  # [k, d]
        relevance = torch.einsum("kd,kbd->b", query, self.means.view().float())
        best = relevance.topk(min(self.blocks, count)).indices.sort().values
        return (best[:, None] * self.block + torch.arange(self.block, device=best.device)).flatten()

    def index(self) -> list[Tensor]:
        return self.means.tensors()

    def clone(self) -> Self:
        twin = copy(self)
        twin.near, twin.far, twin.means = self.near.clone(), self.far.clone(), self.means.clone()
        return twin
