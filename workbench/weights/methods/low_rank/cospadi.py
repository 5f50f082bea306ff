"""CoSpaDi."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from workbench.core.precision import checked
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.ranked import Ranked
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import DictionaryLinear, dictionary_nbytes
from workbench.weights.solvers.whitening import root, solved

_REFINING = 3  # conjugate gradient steps on a choice of atoms that may still change,
_FINAL = 20  # and on the last one


@register
class CoSpaDi(Ranked):
    """Write each output's weights as a sum of few atoms of the layer's dictionary, fitted to what the layer puts out.

    A weight [o, i] becomes a sparse matrix [o, a], with the same number of coefficients in each row, times a dictionary
    [a, i]: where a low rank puts all rows into one subspace, here each row chooses its own. Both are fitted in
    coordinates in which the inputs are white, so that the squared error is that of the layer's outputs over calibration
    texts (sections 3.1 and 3.2). There are `ratio` times as many atoms as coefficients in a row (the paper's 2); their
    number is the largest within the budget, everything counted: atoms and coefficients at 16 bits, a bit for each place
    (equation 10; the paper's main tables take those bits off the coefficients instead).

    The paper fits atom by atom, by K-SVD with orthogonal matching pursuit, and better than all atoms at once by least
    squares (the method of optimal directions), in three times as long (table 2). Here a layer takes a second and not
    minutes: beginning with the largest singular vectors, atoms by least squares, coefficients by hard thresholding
    pursuit; a row takes new atoms only where that brings it closer, so the error never grows. Each layer has a
    dictionary of its own; the paper can share one between layers.
    """

    key = "cospadi"
    title = "CoSpaDi"
    paper = Paper(
        "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning",
        "Shopkhoev et al. 2025",
        "2509.22075",
    )
    claim = "better than SVD-LLM at 20-50 % compression"
    fidelity = Fidelity(
        "deviates", "atoms by least squares and hard thresholding pursuit, not K-SVD and matching pursuit"
    )
    presets = (Preset("paper", "its main tables: twice as many atoms as coefficients in a row", ratio=2.0),)
    default_budget = 0.8
    needs_hessian: ClassVar[bool] = True

    ratio: float = param(2.0, ge=1.0, le=16.0, help="how many atoms there are for each coefficient of a row")
    rounds: int = param(
        20,
        ge=1,
        le=200,
        help="how often atoms and coefficients are fitted in turn",
        own="other rounds than the paper's: of all atoms at once",
    )

    def rank_nbytes(self, linear: nn.Linear, rank: int) -> int:
        return dictionary_nbytes(linear.out_features, linear.in_features, self.atoms(rank), rank) if rank else 0

    def atoms(self, coefficients: int) -> int:
        """Atoms of a dictionary from which each row takes this many."""
        return int(self.ratio * coefficients)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        kept = self.rank(linear)
        if not kept:
            return linear
        assert inputs is not None
        base = root(inputs.hessian)
        dictionary = learn(linear.weight.detach().float() @ base, self.atoms(kept), kept, self.rounds)
        atoms = solved(dictionary.atoms, base)
        size = atoms.abs().amax(dim=1).clamp_min(1e-30)
        coefficients = (dictionary.codes * size)[dictionary.chosen].view(-1, kept)
        return DictionaryLinear(
            checked(atoms / size[:, None], linear.weight.dtype, "its atoms"),
            dictionary.chosen,
            coefficients,
            linear.bias,
        )


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
