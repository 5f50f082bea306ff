"""What methods that make modules narrower inside have in common: which, how large, and how the rest makes up for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.core.bisection import boundary
from workbench.weights.base import Survey, WeightMethod
from workbench.weights.surgery.prunable import Neurons, Site, sites_of


class Smaller(WeightMethod):
    """Base of methods whose layers stay plain, at the precision they were in, and become smaller or fewer.

    Budget: the share of the bytes of the layers that are taken, or a size for them. From 1 on all stays as it is.
    """

    measure: ClassVar[str] = "size"
    alone: ClassVar[bool] = False

    def full_nbytes(self, linear: nn.Linear) -> int:
        return linear.weight.numel() * linear.weight.element_size()

    def limit(self, linears: Mapping[str, nn.Linear]) -> int | None:
        """How many bytes these layers may take together; None: as many as they do."""
        full = sum(self.full_nbytes(linear) for linear in linears.values())
        limit = None if self.effective_budget is None else self.effective_budget.nbytes(full)
        return None if limit is None or limit >= full else limit


class StructuredPruner(Smaller):
    """Base of methods that leave out whole dimensions inside modules, with the rows and columns of the weights there.

    Each module keeps at least one dimension.
    """

    takes: ClassVar[tuple[type[Site], ...]] = (Neurons,)  # which modules are made narrower

    def sites(self, model: nn.Module, names: Sequence[str] | None = None) -> list[Site]:
        """The modules of a model that the method makes narrower; names: only those whose layers are all among these."""
        return [site for site in sites_of(model, names) if isinstance(site, self.takes)]

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        refused = super().refused(model, linears)
        left = [name for name in linears if name not in refused]
        taken = {name for site in self.sites(model, left) for name in site.places}
        kinds = " and in no ".join(kind.what.removeprefix("a ") for kind in self.takes)
        return refused | {name: f"it stands in no {kinds}" for name in left if name not in taken}

    def survey(self, model: nn.Module) -> Survey:
        found = Survey.of(model, self)
        sites = self.sites(model, tuple(found.linears))
        whole = sum(self.site_nbytes(site, site.width) for site in sites)
        least = sum(self.site_nbytes(site, 1) for site in sites)
        return Within(**vars(found), whole=whole, least=least)

    def site_nbytes(self, site: Site, width: int) -> int:
        """Bytes of a module's layers once each of its heads has `width` dimensions."""
        return site.dimension_nbytes * width


@dataclass(frozen=True)
class Within(Survey):
    """A survey of a method that takes what its budget gives: never more than `whole`, and never less than `least`."""

    whole: int
    least: int

    @property
    def nbytes(self) -> int:
        assert isinstance(self.method, Smaller)
        limit = self.method.limit(self.linears)
        return self.whole if limit is None else max(min(limit, self.whole), self.least)


def shared_out(
    shares: Sequence[float], widths: Sequence[int], nbytes: Callable[[int, int], int], limit: int
) -> list[int]:
    """How many dimensions each module keeps so that all together take at most `limit` bytes, and nearly that.

    Each keeps its width times its share times a number that is the same for all, at least one and at most all; what is
    left over goes to those whose share was rounded down most. nbytes: of which module at which width. One dimension of
    each has to fit.
    """

    def at(scale: float) -> list[int]:
        wanted = (int(scale * share * width + 1e-9) for share, width in zip(shares, widths, strict=True))
        return [min(max(count, 1), width) for count, width in zip(wanted, widths, strict=True)]

    def total(counts: Sequence[int]) -> int:
        return sum(nbytes(index, count) for index, count in enumerate(counts))

    everything = 1 / max(min(shares), 1e-6)
    if total(at(everything)) <= limit:
        return at(everything)
    scale = boundary(lambda scale: total(at(scale)) <= limit, 0.0, everything, steps=50)
    counts = at(scale)
    rest = [scale * share * width - count for share, width, count in zip(shares, widths, counts, strict=True)]
    room = limit - total(counts)
    for index in sorted(range(len(counts)), key=lambda index: -rest[index]):
        more = nbytes(index, counts[index] + 1) - nbytes(index, counts[index])
        if counts[index] < widths[index] and more <= room:
            counts[index] += 1
            room -= more
    return counts


def refitted(weight: Tensor, moment: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weight [o, m] on the inputs `kept` int64 [m] whose outputs are closest to those of weight [o, i], float64.

    moment: the mean of x xᵀ [i, i], to whose diagonal `damping` of its mean is added.
    """
    hessian = damped(moment, damping)
    return torch.linalg.solve(hessian[kept][:, kept], (weight.double() @ hessian[:, kept]).T).T


def damped(moment: Tensor, damping: float) -> Tensor:
    """A second moment [i, i] with `damping` of its diagonal's mean added to the diagonal, float64; never singular."""
    mean = moment.double().diagonal().mean().clamp_min(1e-12)
    return moment.double() + damping * mean * torch.eye(moment.shape[0], dtype=torch.double, device=moment.device)
