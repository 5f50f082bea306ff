"""How well numbers lend themselves to rounding: what is lost to zero, and how much of the levels' space is used."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kernel_share(x: Tensor, step: Tensor | float) -> float:
    """The share of x that rounds to zero in these steps, which broadcast with it: the "quantisation kernel".

    What is zero already does not count in it, only among all (Liu et al. 2024, arXiv:2410.07505: the elements of
    activations that a quantiser maps to zero). Losses are small while it is below 1 % for Llama-like models.
    """
    lost = (x.abs() <= 0.5 * torch.as_tensor(step, device=x.device)) & (x != 0)
    return float(lost.float().mean())


def space_used(moment: Tensor) -> float:
    """How much of the space of quantisation levels numbers fill, per dimension: the QSUR's d-th root, from 0 to 0.5.

    moment: the second moment of vectors [d, d]. They lie in an ellipsoid {x: xᵀ M⁻¹ x <= c}; levels, one range for all
    channels, fill the cube around it: of half side √(c max M_jj). The rate is the quotient of the two volumes; c
    cancels (Hu et al. 2025, arXiv:2501.13987, section 3, with the mean left out; the paper takes the ends of the
    ellipsoid's axes for its extent, which reach less far). As the rate itself vanishes in many dimensions, its d-th
    root is given, as in the paper's figure 3. Rotations change the cube alone: it is smallest where all channels are
    equally large, and the rate largest where M is a multiple of the identity. 0 where some direction is never taken.
    """
    wide = moment.double()
    size = wide.shape[0]
    logs = torch.linalg.eigvalsh(wide).clamp_min(0).log()
    ball = (0.5 * size * math.log(math.pi) - math.lgamma(0.5 * size + 1)) / size
    side = math.log(2) + 0.5 * float(wide.diagonal().max().log())
    return math.exp(ball + 0.5 * float(logs.mean()) - side)
