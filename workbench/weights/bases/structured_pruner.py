"""What methods that make modules narrower inside have in common: which, how large, and how the rest makes up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from workbench.weights.bases.structured import Smaller, Within
from workbench.weights.surgery.prunable import Neurons, Site, sites_of
from workbench.weights.survey import Survey


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
