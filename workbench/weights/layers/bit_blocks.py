"""Linear layers as a sum of blocks of about one bit a weight: signs, and a low-rank matrix of magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from workbench.core.precision import half
from workbench.weights.layers.compact import CompactLinear, Description
from workbench_kernels.packing import pack, unpack


class BitBlock(NamedTuple):
    """What one step of a decomposition found in a weight [o, i]: sign times (up @ down).

    signs: uint8 [o, ceil(i / 8)], a set bit is a plus. up: float16 [o, r]. down: float16 [r, i].
    """

    signs: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, plus: Tensor, up: Tensor, down: Tensor) -> BitBlock:
        """plus: bool [o, i]."""
        signs = pack(plus.to(torch.uint8), 1).contiguous()
        return cls(signs, half(up, "its magnitudes"), half(down, "its magnitudes"))

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """What it adds to the outputs `first` to before `last`: [last - first, i]."""
        magnitudes = self.up[first:last].to(dtype) @ self.down.to(dtype)
        plus = unpack(self.signs[first:last], 1, self.down.shape[1])
        return magnitudes.mul_(plus.to(dtype).mul_(2).sub_(1))


class BitBlocksLinear(CompactLinear):
    """A linear layer whose weight is the sum of some blocks, which it shares with whoever else holds them."""

    def __init__(self, blocks: Sequence[BitBlock], bias: nn.Parameter | None = None) -> None:
        super().__init__(blocks[0].down.shape[1], blocks[0].up.shape[0], bias)
        self.count = len(blocks)
        for index, block in enumerate(blocks):
            for part, tensor in block._asdict().items():
                self.register_buffer(f"{part}{index}", tensor)

    @property
    def blocks(self) -> list[BitBlock]:
        return [
            BitBlock(*(getattr(self, f"{part}{index}") for part in BitBlock._fields)) for index in range(self.count)
        ]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        begun, *others = self.blocks
        weight = begun.rows(first, last, dtype)
        for block in others:
            weight += block.rows(first, last, dtype)
        return weight

    def describe(self) -> Description:
        return {**super().describe(), "blocks": self.count}


def bit_block_nbytes(out_features: int, in_features: int, rank: int) -> int:
    """Bytes of one block."""
    return out_features * -(-in_features // 8) + 2 * rank * (out_features + in_features)
