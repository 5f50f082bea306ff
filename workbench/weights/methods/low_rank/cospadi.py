"""CoSpaDi."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from workbench.core.precision import checked
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.ranked import Ranked
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import DictionaryLinear, dictionary_nbytes
from workbench.weights.solvers.dictionary import learn
from workbench.weights.solvers.whitening import root, solved


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
