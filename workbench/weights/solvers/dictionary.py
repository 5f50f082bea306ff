"""A dictionary of which few atoms for each row give nearly that row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_REFINING = 3  # conjugate gradient steps on a choice of atoms that may still change,
_FINAL = 20  # and on the last one


class Dictionary(NamedTuple):
    """atoms [a, i], and codes [o, a] that are zero but where chosen, bool [o, a]."""

    atoms: Tensor
    codes: Tensor
    chosen: Tensor


def learn(rows: Tensor, atoms: int, kept: int, rounds: int) -> Dictionary:
    """A dictionary of `atoms` atoms of which `kept` for each of rows [o, i] give nearly that row."""
    basis = _begin(rows, atoms)
    codes, chosen = pursue(rows, basis, None, kept)
    for _ in range(rounds):
        basis, codes = _fit_atoms(rows, codes)
        codes, chosen = pursue(rows, basis, (codes, chosen), kept)
    gram, pull = basis @ basis.T, rows @ basis.T
    return Dictionary(basis, refine(codes, chosen, gram, pull, _FINAL), chosen)


def _begin(rows: Tensor, atoms: int) -> Tensor:
    """The leading right singular vectors; beyond their number, rows themselves. Unit length, [a, i]."""
    basis = torch.linalg.svd(rows, full_matrices=False)[2][:atoms]
    missing = atoms - basis.shape[0]
    if missing:
        more = rows[torch.arange(missing, device=rows.device) % rows.shape[0]]
        basis = torch.cat([basis, more])
    return _unit(basis)[0]


def _fit_atoms(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The atoms of unit length that serve these codes best, and the codes for them (Engan et al. 1999).

    An atom that no row uses becomes what is left of the row that is served worst.
    """
    gram = (codes.T @ codes).double()
    used = gram.diagonal() > 0
    eye = torch.diag(torch.where(used, 1e-9 * gram.diagonal().mean(), 1.0))
    fitted = torch.linalg.solve(gram + eye, (codes.T @ rows).double()).float()
    unused = (~used).nonzero()[:, 0]
    if unused.numel():
        left = rows - codes @ fitted
        worst = left.square().sum(dim=1).argsort(descending=True, stable=True)
        fitted[unused] = left[worst[torch.arange(unused.numel(), device=rows.device) % rows.shape[0]]]
    made, length = _unit(fitted)
    return made, codes * length


def _unit(basis: Tensor) -> tuple[Tensor, Tensor]:
    length = basis.norm(dim=1).clamp_min(1e-30)
    return basis / length[:, None], length


def pursue(rows: Tensor, basis: Tensor, before: tuple[Tensor, Tensor] | None, kept: int) -> tuple[Tensor, Tensor]:
    """Codes [o, a] with `kept` atoms a row, and which: one step of hard thresholding pursuit (Foucart 2011) from the
    codes `before`, or from none. A row whose error would not fall stays with its atoms.
    """
    gram, pull = basis @ basis.T, rows @ basis.T  # [a, a], [o, a]
    if before is None:
        chosen = _largest(pull, kept)
        return refine(pull * chosen, chosen, gram, pull, _REFINING), chosen
    codes, chosen = before
    codes = refine(codes, chosen, gram, pull, _REFINING)
    slope = pull - codes @ gram
    way = slope * chosen if bool((slope * chosen).abs().sum() > 1e-3 * slope.abs().sum()) else slope
    length = way.square().sum(dim=1) / ((way @ gram) * way).sum(dim=1).clamp_min(1e-30)
    moved = codes + length[:, None] * slope
    other = _largest(moved, kept)
    tried = refine(moved * other, other, gram, pull, _REFINING)
    better = (_loss(tried, gram, pull) < _loss(codes, gram, pull))[:, None]
    return torch.where(better, tried, codes), torch.where(better, other, chosen)


def _largest(values: Tensor, kept: int) -> Tensor:
    """Which `kept` of each row are largest in magnitude, bool like values."""
    places = values.abs().topk(kept, dim=1).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, places, True)


def _loss(codes: Tensor, gram: Tensor, pull: Tensor) -> Tensor:
    """The squared error of each row, up to its own square [o]."""
    return ((codes @ gram - 2 * pull) * codes).sum(dim=1)


def refine(codes: Tensor, chosen: Tensor, gram: Tensor, pull: Tensor, steps: int) -> Tensor:
    """Codes on the chosen atoms, closer to least squares by some steps of conjugate gradients, all rows at once."""
    left = (pull - codes @ gram) * chosen
    way, size = left, left.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        bent = (way @ gram) * chosen
        length = size / (way * bent).sum(dim=1, keepdim=True).clamp_min(1e-30)
        codes = codes + length * way
        left = left - length * bent
        now = left.square().sum(dim=1, keepdim=True)
        way = left + now / size.clamp_min(1e-30) * way
        size = now
    return codes
