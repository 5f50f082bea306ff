"""The newest row of each head as what low-rank spaces will hold of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import Ragged


class Turns(NamedTuple):
    """Rotary embedding at some positions: channel c of a head turned is x[c] * cos[c] + x[partner[c]] * sin[c].

    cos, sin float32 [p, d]: those of the first of a pair negated; partner int32 [d]. Lengths other than 1 are in both.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, channels: int, unhalved: Callable[[Tensor], Tensor]) -> Turns:
        """cos, sin [p, r] of channels in the order of halves; unhalved: to the order of the model's heads."""
        width = cos.shape[1]
        whole = cos.new_ones(len(cos), channels)
        whole[:, :width] = cos
        signed = torch.zeros_like(whole)
        signed[:, :width] = sin
        signed[:, : width // 2] *= -1
        every = torch.arange(channels, device=cos.device)
        other = every.clone()
        other[:width] = (every[:width] + width // 2) % max(width, 1)
        place = unhalved(every[None].float())[0].long()  # where in halves each of the model's channels stands
        model = torch.empty_like(every).index_copy_(0, place, every)
        return cls(unhalved(whole).contiguous(), unhalved(signed).contiguous(), model[other[place]].to(torch.int32))

    def __call__(self, x: Tensor, at: Tensor, *, back: bool = False) -> Tensor:
        """x [..., d] float32 turned by row `at` [1], or turned back."""
        cos, sin = self.cos[at], self.sin[at]
        if back:
            size = cos.square() + sin.square()
            cos, sin = cos / size, -sin / size
        return x * cos + x[..., self.partner.long()] * sin


def _takes(keys: Ragged, values: Ragged, key_basis: Tensor, value_basis: Tensor) -> bool:
    return on_gpu(keys.data, values.data, key_basis, value_basis)


@with_kernel("gpu.projected:project_newest", when=_takes)
def project_newest(
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    value_basis: Tensor,
    turns: Turns | None,
    first: Tensor,
    into_keys: Tensor,
    into_values: Tensor,
) -> None:
    """Write what is left of each head's last row of keys [t, d] and values [t, dv] in spaces of few directions, rows of
    bases [k, r, d] and [k, rv, dv] orthogonal to each other, to the same row of `into_keys` and `into_values`.

    Coefficients are in units of the basis' rows, and rounded as those. turns: keys are projected turned back by the
    row number `first` [1] (int32) + their number in their head, and turned again. Each head has a row.
    """
    last = keys.lengths.long() - 1
    at = keys.starts.long() + last
    key = keys.data[at].float()
    if turns is not None:
        key = turns(key, first.long() + last, back=True)
    key = _projected(key, key_basis)
    if turns is not None:
        key = turns(key, first.long() + last)
    into_keys[at] = key.to(into_keys.dtype)
    at = values.starts.long() + values.lengths.long() - 1
    into_values[at] = _projected(values.data[at].float(), value_basis).to(into_values.dtype)


def _projected(x: Tensor, basis: Tensor) -> Tensor:
    """x [k, d] in the space of basis [k, r, d], and out of it."""
    exact = basis.float()
    coefficients = torch.einsum("kd,krd->kr", x, exact / exact.square().sum(dim=-1, keepdim=True))
    return torch.einsum("kr,krd->kd", coefficients.to(basis.dtype).float(), exact)
