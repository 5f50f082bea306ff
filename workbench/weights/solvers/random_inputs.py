"""What a gated MLP's neurons do to inputs that are normal and independent, without any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.weights.solvers.least_squares import damped

_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)  # for means over a standard normal variable


class Channels(NamedTuple):
    """The neurons of a gated MLP, act(gate x) * up x, as what they do to a random input.

    gate, up: float32 [i, hidden]. level, slope: the best line through the activation over each neuron's own gate input,
    level + slope * gate x, float32 [i].
    """

    gate: Tensor
    up: Tensor
    level: Tensor
    slope: Tensor


def channels(gate: Tensor, up: Tensor, squares: Tensor, act: Callable[[Tensor], Tensor]) -> Channels:
    """PrunableMLP under inputs that are normal, independent, and have the mean squares `squares` [hidden]."""
    gate, up = gate.float(), up.float()
    spread = (gate.square() @ squares).sqrt().clamp_min(1e-12)  # [i]
    points = torch.tensor(_POINTS, dtype=gate.dtype, device=gate.device)
    weights = torch.tensor(_WEIGHTS / _WEIGHTS.sum(), dtype=gate.dtype, device=gate.device)
    values = act(spread[:, None] * points)  # [i, 64]
    return Channels(gate, up, values @ weights, (values * points) @ weights / spread)


def overlap(one: Channels, other: Channels, squares: Tensor) -> Tensor:
    """The mean product of each neuron's output in `one` [i] with each in `other` [j], float32 [i, j].

    In closed form under the inputs that `channels` assumes: a neuron is (level + slope g) u, whose g and u are normal,
    and the mean of g u g' u' is E[gu] E[g'u'] + E[gg'] E[uu'] + E[gu'] E[ug'].
    """
    gg, uu = (one.gate * squares) @ other.gate.T, (one.up * squares) @ other.up.T
    gu, ug = (one.gate * squares) @ other.up.T, (one.up * squares) @ other.gate.T
    products = [(x.gate * squares * x.up).sum(dim=1) for x in (one, other)]
    fourth = products[0][:, None] * products[1] + gg * uu + gu * ug
    return one.level[:, None] * other.level * uu + one.slope[:, None] * other.slope * fourth


def data_free_scores(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """How much each neuron may matter, float32 [i]: the largest entry of its row of gate and of up, times the norm of
    its column of down. A few channels carry most of what language models pass on, so that peaks tell more than norms.
    """
    scores: Tensor = gate.float().abs().amax(dim=1) * up.float().abs().amax(dim=1) * down.float().norm(dim=0)
    return scores


def rebuilt(down: Tensor, kept: Tensor, cross: Tensor, gram: Tensor, damping: float) -> Tensor:
    """The weight [o, m] on damaged neurons whose output is closest to that of `down` [o, i] on the whole ones.

    kept: int64 [m], which these are. cross: mean products of whole with damaged neurons [i, m]; gram: of damaged ones
    with each other [m, m]. damping, of the mean of gram's diagonal, holds the weight at that of `down`.
    """
    old = down.double()[:, kept]
    missing = down.double() @ cross.double() - old @ gram.double()
    fitted: Tensor = old + torch.linalg.solve(damped(gram, damping), missing.T).T
    return fitted
