"""Which groups of a weight's columns give a bit to which others (SliM-LLM, Huang et al. 2024, arXiv:2405.14917).

Two pointers move inwards over the groups in the order of their salience: the least salient gives a bit to the most
salient, then the next pair, up to half of all groups. What differs is how the number of pairs is found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.measure.quality import divergence
from workbench.weights.solvers.whitening import root

_TOKENS = 256


def bits_exchanged(losses: Tensor, salience: Tensor) -> Tensor:
    """How many bits more than usual each group of columns gets, int64 [g]: as many pairs as lose least in total.

    losses: of each group with one bit less, as usual, and with one more [3, g]. salience: [g].
    """
    low, high = _pairs(salience)
    gained = (losses[1] - losses[0])[low] + (losses[1] - losses[2])[high]  # by each pair
    return _more(salience, int(torch.cat([gained.new_zeros(1), gained.cumsum(0)]).argmax()))


def bits_by_divergence(weight: Tensor, rounded: Tensor, inputs: Tensor, salience: Tensor) -> Tensor:
    """How many bits more than usual each group of columns gets, int64 [g]: as many pairs as leave the outputs for
    inputs [n, i] closest to those of the weight [o, i], both taken as the logits of distributions.

    rounded: the weight with one bit less everywhere, as usual, and with one more [3, o, i]. salience: [g].
    """
    groups = len(salience)
    want, said = (inputs @ weight.T).log_softmax(dim=-1), inputs @ rounded[1].T  # [n, o]
    parts = inputs.unflatten(1, (groups, -1))  # [n, g, c]
    changes = (rounded - rounded[1]).unflatten(2, (groups, -1))  # [3, o, g, c]
    found = [divergence(said.log_softmax(dim=-1), want.clone()).mean()]
    for pair in zip(*_pairs(salience), strict=True):
        for group, level in zip(pair, (0, 2), strict=True):
            said = said + parts[:, group] @ changes[level, :, group].T
        found.append(divergence(said.log_softmax(dim=-1), want.clone()).mean())
    return _more(salience, int(torch.stack(found).argmin()))


def drawn_inputs(hessian: Tensor) -> Tensor:
    """As many inputs [n, i] as suffice here, of the second moments [i, i] of those that calibration saw."""
    base = root(hessian)
    draw = torch.randn(_TOKENS, len(base), generator=torch.Generator().manual_seed(0))
    return draw.to(base) @ base.T


def _pairs(salience: Tensor) -> tuple[Tensor, Tensor]:
    """Which groups give, and which take, int64 [g / 2] each."""
    order = salience.argsort(stable=True)
    return order[: len(order) // 2], order.flip(0)[: len(order) // 2]


def _more(salience: Tensor, pairs: int) -> Tensor:
    low, high = _pairs(salience)
    more = torch.zeros(len(salience), dtype=torch.int64, device=salience.device)
    more[low[:pairs]], more[high[:pairs]] = -1, 1
    return more
