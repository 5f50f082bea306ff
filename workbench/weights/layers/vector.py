"""Linear layers whose weights are looked up in codebooks, several at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.precision import half
from workbench.weights.layers.compact import CompactLinear, Description
from workbench_kernels.packing import pack, unpack

_PLANES = {
    4: (4,),
    6: (4, 2),
    8: (8,),
    10: (8, 2),
    12: (8, 4),
    14: (8, 4, 2),
    16: (8, 8),
}  # how many bits of an index lie in which buffer


class VectorLinear(CompactLinear):
    """A linear layer whose weight [o, i] consists of vectors of v neighbouring outputs' weights of one input.

    books: float16 [k, v] each; a vector is the sum of one entry of every book (the first, and what the second adds).
    Their indices [o / v, i] lie in `plane` buffers, at 4, 6, 8, 10, 12, 14 or 16 bits, packed row by row; the last
    vectors are cut where v does not divide o. scale: float16 [o], by which each output's weights are multiplied.
    """

    scale: Tensor

    def __init__(
        self,
        indices: list[Tensor],
        books: list[Tensor],
        scale: Tensor,
        bits: list[int],
        bias: nn.Parameter | None = None,
    ) -> None:
        """indices: int64 [o / v, i] for each book, below 2 ** bits."""
        super().__init__(indices[0].shape[1], scale.shape[0], bias)
        self.bits = tuple(bits)
        self.length = books[0].shape[1]
        self.register_buffer("scale", half(scale, "its scales"))
        for number, (index, book, wide) in enumerate(zip(indices, books, bits, strict=True)):
            self.register_buffer(f"book{number}", half(book, "its codebooks"))
            below = 0
            for plane, width in enumerate(_PLANES[wide]):
                part = (index >> below & 2**width - 1).to(torch.uint8)
                self.register_buffer(f"plane{number}_{plane}", pack(part, width).contiguous().clone())
                below += width

    def indices(self, number: int, first: int, last: int) -> Tensor:
        """The indices into one book of some rows of vectors, int32 [last - first, i]."""
        index, below = None, 0
        for plane, width in enumerate(_PLANES[self.bits[number]]):
            part = unpack(getattr(self, f"plane{number}_{plane}")[first:last], width, self.in_features).int()
            index = part if index is None else index | part << below
            below += width
        assert index is not None
        return index

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        begin, end = first // self.length, -(-last // self.length)
        weight = self.scale.new_zeros(end - begin, self.length, self.in_features, dtype=dtype)
        for number in range(len(self.bits)):
            flat = self.indices(number, begin, end).flatten()
            book: Tensor = getattr(self, f"book{number}").T.to(dtype)
            for place, entries in enumerate(book.contiguous()):  # faster than all numbers of an entry at once
                weight[:, place] += entries.index_select(0, flat).view(end - begin, -1)
        cut = weight.flatten(0, 1)[first - begin * self.length : last - begin * self.length]
        return cut.mul_(self.scale[first:last, None].to(dtype))

    def describe(self) -> Description:
        return {**super().describe(), "vector": self.length, "index_bits": " + ".join(map(str, self.bits))}


def vector_nbytes(out_features: int, in_features: int, length: int, bits: list[int], entries: list[int]) -> int:
    """Bytes of a VectorLinear: indices, codebooks of so many entries, and a scale for each output."""
    vectors = -(-out_features // length)
    indices = sum(vectors * -(-in_features * width // 8) for wide in bits for width in _PLANES[wide])
    return indices + 2 * length * sum(entries) + 2 * out_features
