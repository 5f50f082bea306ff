"""The newest row of each head as what low-rank spaces will hold of it."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rotary import Turns
from workbench_kernels.rows import Ragged


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
