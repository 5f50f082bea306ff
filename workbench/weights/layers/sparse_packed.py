"""Linear layers of which most weights are zero, and the others are held at a few bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.precision import half
from workbench.weights.layers.compact import CompactLinear, Description
from workbench.weights.layers.marks import marks, starting
from workbench.weights.layers.packed import PLANES
from workbench_kernels.packing import pack, unpack
from workbench_kernels.weight import packed_codes

_CHUNK = 8  # codes that are packed together, so that those of any row can be read without all before it


class SparsePackedLinear(CompactLinear):
    """A linear layer with the codes of the weights [o, i] that are not left out, and one bit a weight that says which
    those are: weight = (code - zero) * scale.

    bitmap: uint8 [o, ceil(i / 8)]. plane0, plane1: uint8 [c, w], the codes row after row in chunks of 8, split into
    planes as `PackedLinear` does. scale, zero: [o, g] for each `group` neighbouring columns, those left out included;
    zero None: 2 ** (bits - 1) everywhere. offsets: int32 [o + 1], where each row's codes begin; None where all rows
    hold equally many, as by the patterns 2:4 and 4:8 (the places of what stays would take as many bits as the bitmap).
    """

    bitmap: Tensor
    scale: Tensor
    zero: Tensor | None
    offsets: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        kept: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        bias: nn.Parameter | None = None,
        *,
        group: int,
    ) -> None:
        """codes: uint8 [o, i], below 2 ** bits; kept: bool [o, i], the weights that are held."""
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.bits, self.group, self.count = bits, group, int(kept.sum())
        self.register_buffer("bitmap", pack(kept.to(torch.uint8), 1).contiguous())
        held = nn.functional.pad(codes[kept], (0, -self.count % _CHUNK)).view(-1, _CHUNK)
        below = 0
        for index, width in enumerate(PLANES[bits]):
            self.register_buffer(f"plane{index}", pack(held >> below & 2**width - 1, width).contiguous().clone())
            below += width
        self.register_buffer("scale", half(scale, "its scales"))
        self.register_buffer("zero", None if zero is None else zero.to(torch.uint8, copy=True).contiguous())
        counts = kept.sum(dim=1)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        self.register_buffer("offsets", None if bool((counts == counts[0]).all()) else ends)
        self.marks = marks(ends)

    @property
    def kept(self) -> Tensor:
        """Which weights are held, bool [o, i]."""
        return unpack(self.bitmap, 1, self.in_features).view(torch.bool)

    def codes(self, first: int, last: int) -> Tensor:
        """The codes of the weights that some outputs hold, uint8 [m]."""
        if self.offsets is None:
            each = self.count // self.out_features
            begin, end = first * each, last * each
        else:
            begin, end = (starting(self.offsets, self.marks, row) for row in (first, last))
        chunks = slice(begin // _CHUNK, -(-end // _CHUNK))
        widths = PLANES[self.bits]
        planes = [getattr(self, f"plane{index}")[chunks] for index in range(len(widths))]
        skipped = begin % _CHUNK
        return packed_codes(planes, widths, _CHUNK).flatten()[skipped : skipped + end - begin]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        kept = unpack(self.bitmap[first:last], 1, self.in_features).view(torch.bool)
        scale, zero = self._spread(self.scale[first:last]), self._zeros(first, last)
        exact = dtype if dtype.itemsize > 4 else torch.float32
        weight = torch.zeros(kept.shape, dtype=exact, device=kept.device)
        weight.masked_scatter_(kept, self.codes(first, last).to(exact))
        return weight.sub_(zero).mul_(scale).mul_(kept).to(dtype)

    def _zeros(self, first: int, last: int) -> Tensor | int:
        return 2 ** (self.bits - 1) if self.zero is None else self._spread(self.zero[first:last])

    def _spread(self, part: Tensor) -> Tensor:
        return part.float().repeat_interleave(self.group, dim=1)[:, : self.in_features]

    def describe(self) -> Description:
        density = self.count / (self.in_features * self.out_features)
        return {**super().describe(), "code_bits": self.bits, "group": self.group, "density": density}


def sparse_packed_nbytes(
    out_features: int, in_features: int, kept: int, bits: int, group: int, *, zero_bytes: int = 1, even: bool = False
) -> int:
    """Bytes of a SparsePackedLinear that holds `kept` weights; at most, unless `even`: equally many in every row."""
    codes = -(-kept // _CHUNK) * bits  # 8 codes take as many bytes as each takes bits
    map_and_scales = out_features * (-(-in_features // 8) + -(-in_features // group) * (2 + zero_bytes))
    return codes + map_and_scales + (0 if even else 4 * (out_features + 1))
