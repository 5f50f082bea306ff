"""L-Mul."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.core.partial_softmax import between, by_query_head
from workbench.registry import Fidelity, Paper, param, register
from workbench_kernels import Scoring
from workbench_kernels.softmax import normalised

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised

_ONE = 0x3F800000  # the bits of 1.0: exponent bias and no mantissa
_MANTISSA = 23
_SMALLEST, _LARGEST = 2.0**-62, 2.0**62  # products of numbers between them neither vanish nor overflow
_AT_ONCE = 2**18  # products emulated together: they stay in a CPU's caches
_ROWS = 32


@register
class LMul(AttentionMethod):
    """Multiply by adding: exponents and mantissas of both numbers as integers, in place of every product.

    (1 + a)(1 + b) is taken as 1 + a + b + 2^-l for mantissas a and b of m bits, with l = m up to 3, 3 for m = 4 and 4
    beyond (section 2.2). On the bits of floating-point numbers that is one integer addition less a constant; a carry
    out of the mantissas goes on into the exponent, and the sign comes out right. Both products of attention, queries
    with keys and weights with values, are made so, while reading and while decoding; sums and softmax are exact.

    All entries are computed, so there is no budget. This shows what it does to a model's answers; the energy that it
    saves needs a processor made for it, and here it takes several times longer. Inputs are rounded to `mantissa` bits
    (bfloat16 has 7, float32 has 23). Numbers below 2^-62, zero included, count as 2^-62.
    """

    key = "l-mul"
    title = "L-Mul"
    paper = Paper("Addition is All You Need for Energy-efficient Language Models", "Luo and Sun 2024", "2410.00907")
    claim = "80 % less energy for dot products, almost without loss in attention"
    fidelity = Fidelity("as published", "its numbers; the energy needs a processor made for it")
    decodes: ClassVar[bool] = True
    all_scores: ClassVar[str] = "only more cheaply"

    mantissa: Literal[2, 3, 4, 5, 6, 7, 10, 23] = param(
        7,
        unit="bits",
        help="of each number, the leading one apart",
        own="that of bfloat16, in which models compute; the abstract compares 3 and 4 bits with FP8",
    )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        tokens, window = query.shape[1], scoring.window
        context.count(query.shape[0] * visible_entries(tokens, window))
        out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
        keys, values = (number_bits(x, self.mantissa) for x in (key, value))
        for start in range(0, tokens, _ROWS):
            stop = min(start + _ROWS, tokens)
            low = 0 if window is None else max(0, start - window + 1)
            at_row = torch.arange(start, stop, device=query.device)[:, None]
            at_key = torch.arange(low, stop, device=query.device)
            seen = at_key <= at_row
            if window is not None:
                seen &= at_key > at_row - window
            rows = query[:, start:stop].float() * scoring.scale
            out[:, start:stop] = self._attend(
                rows,
                keys[:, low:stop],
                values[:, low:stop],
                seen,
                scoring,
                between(scoring, stop, low, stop, key.device),
            )
        return out

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        context.count_seen(len(query), visible)
        keys, values = (number_bits(x, self.mantissa) for x in (contents.keys, contents.values))
        seen = visible.repeat_interleave(query.shape[0] // len(keys), dim=0)  # [h, q, m]
        offsets = scoring.offsets(context.positions, contents.positions)
        return self._attend(query.float() * scoring.scale, keys, values, seen, scoring, offsets).to(query.dtype)

    def _attend(
        self, rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scoring: Scoring, offsets: Tensor | None
    ) -> Tensor:
        """The output [h, r, dv] of scaled float32 rows [h, r, d] over bits of keys [k, c, d] and values [k, c, dv]."""
        groups = rows.shape[0] // keys.shape[0]
        bits = number_bits(rows, self.mantissa).unflatten(0, (-1, groups)).flatten(1, 2)  # [k, g * r, d]
        scores = dots(bits, keys, self.mantissa).unflatten(1, (groups, -1)).flatten(0, 1)  # [h, r, c]
        scores = scoring.bent(scores, by_query_head(offsets, len(rows)))
        weights = normalised(scores.masked_fill_(~seen, -torch.inf), scoring)
        bits = number_bits(weights, self.mantissa).unflatten(0, (-1, groups)).flatten(1, 2)  # [k, g * r, c]
        mixed = dots(bits, values.transpose(1, 2).contiguous(), self.mantissa)
        return cast("Tensor", mixed.unflatten(1, (groups, -1))).flatten(0, 1)


def offset_bits(mantissa: int) -> int:
    """l(m): 2^-l stands for the product of two mantissas of m bits."""
    return mantissa if mantissa <= 3 else 3 if mantissa == 4 else 4


def number_bits(x: Tensor, mantissa: int) -> Tensor:
    """The bits of x as float32, int32, its mantissa rounded to so many bits and its size kept between the limits."""
    x = x.float()
    bits = torch.copysign(x.abs().clamp(_SMALLEST, _LARGEST), x).view(torch.int32)
    dropped = _MANTISSA - mantissa
    if dropped:
        bits = ((bits + (1 << (dropped - 1))) >> dropped) << dropped  # halves away from zero, carries into the exponent
    return bits


def l_mul(x: Tensor, y: Tensor, mantissa: int) -> Tensor:
    """The float32 products of numbers given as bits: one integer addition each, and one for all of y."""
    return (x + (y - (_ONE - (1 << (_MANTISSA - offset_bits(mantissa)))))).view(torch.float32)


def dots(x: Tensor, y: Tensor, mantissa: int) -> Tensor:
    """Sums of such products of bits x [k, r, d] and y [k, c, d] over d: float32 [k, r, c], in bounded memory."""
    (number, rows, width), columns = x.shape, y.shape[1]
    out = torch.empty(number, rows, columns, device=x.device)
    wide = max(1, min(columns, _AT_ONCE // width))
    high = max(1, _AT_ONCE // (width * wide))
    for block, (one, other) in enumerate(zip(x, y, strict=True)):
        for top in range(0, rows, high):
            for left in range(0, columns, wide):
                products = l_mul(one[top : top + high, None], other[left : left + wide], mantissa)
                out[block, top : top + high, left : left + wide] = products.sum(dim=-1)
    return out
