"""Asymmetric quantisation to 1, 2, 4 or 8 bits, packed into bytes along the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups to `bits` bits between their own minimum and maximum.

    x [..., g]: each last dimension is one group. Returns codes (uint8 [..., g], not yet packed), scale and zero
    (float16 [...]): x is about codes * scale + zero. Scale and zero are rounded to 16 bits before the codes are
    chosen, so the codes fit what is stored.
    """
    x = x.float()
    low, high = x.amin(dim=-1), x.amax(dim=-1)
    steps = 2**bits - 1
    zero = low.to(torch.float16)
    scale = ((high - zero.float()) / steps).to(torch.float16)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    codes = ((x - zero.float()[..., None]) / divisor[..., None]).round_().clamp_(0, steps)
    return codes.to(torch.uint8), scale, zero


def dequantise(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that codes [..., g] stand for, with scale and zero [...], as `dtype`."""
    return torch.addcmul(zero.float()[..., None], codes.float(), scale.float()[..., None]).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., c] into bytes [..., b], b = ceil(c * bits / 8): byte j holds the codes j, j + b, j + 2 b
    and so on, the first in its lowest bits.

    So the same bits of neighbouring bytes are neighbouring codes, and a kernel unpacks whole words without moving
    anything between them.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    fields: Tensor = codes.unflatten(-1, (per_byte, -1))
    packed = fields[..., 0, :].clone()
    for field in range(1, per_byte):
        packed |= fields[..., field, :] << (field * bits)
    return packed


def unpack(packed: Tensor, bits: int, channels: int) -> Tensor:
    """Undo `pack`: bytes [..., b] to uint8 codes [..., channels]."""
    per_byte, last = 8 // bits, packed.shape[-1]
    if per_byte == 1:
        return packed
    if per_byte == 2:  # each half where it belongs, in one pass over the bytes: several times as fast
        codes = packed.new_empty(*packed.shape[:-1], 2 * last)
        torch.bitwise_and(packed, 15, out=codes[..., :last])
        torch.bitwise_right_shift(packed, 4, out=codes[..., last:])
        return codes[..., :channels]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    fields: Tensor = (packed[..., None, :] >> shifts) & (2**bits - 1)
    return fields.flatten(-2)[..., :channels]
