"""Singular values of weights: how many directions a matrix really uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor, nn

from workbench import arguments
from workbench.errors import NotApplicable
from workbench.formatting import Brief
from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.compress import weight_methods
from workbench.weights.surgery.linears import linear_layers, weight_of
from workbench.weights.variants import Variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum(Brief):
    """The singular values of one weight matrix, on the CPU: float32 [r], descending, the largest one 1 (all 0: 0).

    name: of its layer; layer, module: where that is. largest: the largest singular value itself.
    """

    name: str
    layer: int | None
    module: str
    largest: float
    values: Tensor

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the values as shares of their sum (Roy and Vetterli 2007): from 1, one
        direction, to r, all alike. Not a number where all are 0: no direction is used.
        """
        if not self.largest:
            return math.nan
        share = self.values.double() / self.values.double().sum()
        return math.exp(float(torch.special.entr(share).sum()))

    @property
    def stable_rank(self) -> float:
        """The sum of the squares over the largest; not a number where all are 0."""
        return math.nan if not self.largest else float(self.values.double().square().sum())

    def rank_for(self, energy: float) -> int:
        """The fewest singular values that hold this share of the sum of squares; none where all are 0."""
        arguments.number("energy", energy, 0, 1)
        if not self.largest:
            return 0
        energies = self.values.double().square().cumsum(0)
        return min(int((energies < energy * energies[-1]).sum()) + 1, self.values.numel())


@dataclass(frozen=True, eq=False, repr=False)
class Spectra(Brief):
    """The spectra of all linear layers in a model's blocks, in order."""

    spectra: tuple[Spectrum, ...]

    def __len__(self) -> int:
        return len(self.spectra)

    def __getitem__(self, index: int) -> Spectrum:
        return self.spectra[index]

    def to_frame(self) -> pd.DataFrame:
        """One row a matrix: layer, module, rank (at most), effective_rank, stable_rank, rank_90, rank_99, largest."""
        rows = [
            {
                "layer": spectrum.layer,
                "module": spectrum.module,
                "rank": spectrum.values.numel(),
                "effective_rank": spectrum.effective_rank,
                "stable_rank": spectrum.stable_rank,
                "rank_90": spectrum.rank_for(0.9),
                "rank_99": spectrum.rank_for(0.99),
                "largest": spectrum.largest,
            }
            for spectrum in self.spectra
        ]
        return pd.DataFrame(rows)


def singular_values(weight: Tensor) -> Tensor:
    """Of weight [o, i]: float64 [min(o, i)], descending; by the eigenvalues of the smaller product with itself, in
    float64, so that values below about 1e-8 of the largest are lost in rounding.
    """
    wide = weight.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    return values


def spectra(
    variants: Variants,
    methods: Sequence[Method] = (),
    *,
    layer: int | None = None,
    module: str | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """The singular values of the weights in the decoder's layers as weight methods made them; without methods, of the
    model's own. See `spectra_of`. Raises BadRecipe for methods of another family.
    """
    twin = variants.get(weight_methods(methods), progress)
    return spectra_of(twin, layer=layer, module=module, progress=progress)


def spectra_of(
    model: PreTrainedModel,
    *,
    layer: int | None = None,
    module: str | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """The spectra of the weights of all linear layers in the decoder's blocks, compressed ones as they are used.

    layer, module: only of that decoder layer, or of the layers of that name inside it. Raises NotApplicable where there
    are none.
    """
    names = list(decoder_layers(model))
    linears = {name: placed(name, names) for name in linear_layers(model)}
    if layer is not None:
        layer = arguments.index("layer", layer, len(names), "the model's layers")
    if module is not None:
        arguments.choice(
            "module", module, dict.fromkeys(short for where, short in linears.values() if where is not None)
        )
    chosen: dict[str, tuple[int, str, nn.Module]] = {}
    for name, linear in linear_layers(model).items():
        where, short = placed(name, names)
        if where is not None and layer in (None, where) and module in (None, short):
            chosen[name] = where, short, linear
    if not chosen:
        only = "" if layer is None and module is None else f" at layer={layer!r}, module={module!r}"
        raise NotApplicable(f"{type(model).__name__} has no linear layer in its decoder's layers{only}")
    rows = []
    track = (progress or Progress()).track(chosen.items(), "singular values", len(chosen))
    for name, (where, short, linear) in track:
        weight = weight_of(linear)
        assert weight is not None
        values = singular_values(weight).cpu()
        largest = float(values[0])
        rows.append(Spectrum(name, where, short, largest, (values / (largest or 1.0)).float()))
    return Spectra(tuple(rows))
