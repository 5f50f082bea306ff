"""TransAct."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.registry import Paper, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.sampled_texts import sampled_texts
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.surgery.prunable import Site, Values, sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = 32  # tokens of each calibration text


@dataclass(frozen=True)
class _Place:
    """Where a layer stands: in whose modules, which side of it is inside, and how the whole model divides.

    axis: 0 for layers that lead into a module, 1 for those that lead out of it. heads: parts of this many dimensions,
    `width`. whole: bytes of all layers that are pruned; values: of those in attention, whose heads have `value_width`.
    """

    axis: int
    in_attention: bool
    heads: int
    width: int
    whole: int
    values: int
    value_width: int


# Found when a model is looked through, and the same for every budget.
_places: WeakKeyDictionary[nn.Linear, _Place] = WeakKeyDictionary()


@register
class TransAct(WeightMethod):
    """Leave out dimensions inside attention and MLP modules that carry little, and keep what flows between modules.

    Inside a module lie its transitional activations: the neurons of an MLP, and in attention what each head takes out
    of its values. Those with the smallest magnitude over calibration texts (root of the mean square) go, with the rows
    and columns of the weights around them, the same share in every module and head; the query heads that share a KV
    head count together. Matrices are really smaller, and so is the cache, whose values have fewer channels. Pruning is
    iterative: a part goes, the activations of what is left are measured again, the next part goes.

    The published method also prunes queries and keys, calibrates on a corpus, and trains the pruned model on. Here
    queries and keys stay whole, so that scores are exact and rotary positions keep their meaning; the texts are what
    the model itself says (so no data are needed); and nothing is trained, so that much smaller shares can be pruned.

    Budget: the share of the bytes of the layers that are pruned, at the precision they are held in.
    """

    key = "transact"
    title = "TransAct"
    paper = Paper(
        "Pruning Large Language Models to Intra-module Low-rank Architecture with Transitional Activations",
        "Shen et al. 2024",
        "2407.05690",
    )
    claim = "smaller weights, KV cache and attention at high compression, with training after pruning"
    default_budget = 0.9
    measure: ClassVar[str] = "size"
    alone: ClassVar[bool] = False

    texts: int = param(24, ge=1, le=256, help=f"texts of {_TEXT} tokens over which activations are measured")
    rounds: int = param(2, ge=1, le=16, help="in how many steps the dimensions go")
    seed: int = param(0, ge=0, le=2**31 - 1, help="which texts the model says")

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        sites = sites_of(model)
        places = {name: place for site in sites for name, place in site.places.items()}
        taken = {name: linear for name, linear in linears.items() if name in places}
        whole = sum(self.full_nbytes(linear) for linear in taken.values())
        values = sum(self.full_nbytes(linear) for name, linear in taken.items() if places[name][1])
        value_width = next((site.width for site in sites if isinstance(site, Values)), 1)
        for name, linear in taken.items():
            axis, in_attention, heads = places[name]
            width = linear.weight.shape[axis] // heads
            _places[linear] = _Place(axis, in_attention, heads, width, whole, values, value_width)
        return {name: _why(name) for name in linears if name not in taken}

    def nbytes(self, linear: nn.Linear) -> int:
        place = _places[linear]
        return self.full_nbytes(linear) // linear.weight.shape[place.axis] * self._kept(place) * place.heads

    def full_nbytes(self, linear: nn.Linear) -> int:
        return linear.weight.numel() * linear.weight.element_size()

    def _kept(self, place: _Place) -> int:
        """How many dimensions of each head, or neurons, stay."""
        assert self.effective_budget is not None
        limit = self.effective_budget.nbytes(place.whole)
        if limit is None:
            return place.width  # a budget in tokens, which is refused
        # Each head keeps at least one channel; neurons take what is left of the budget.
        channels = _within(place.value_width, limit / place.whole)
        if place.in_attention:
            return _within(place.width, limit / place.whole)
        room = limit - place.values * channels // place.value_width
        return _within(place.width, room / (place.whole - place.values))

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        sites = [site for site in sites_of(twin) if any(name in linears for name in site.places)]
        targets = [self._kept(_places[linears[next(iter(site.places))]]) for site in sites]
        begun = [site.width for site in sites]
        if begun == targets:
            return
        ids = sampled_texts(twin, self.texts, _TEXT, self.seed)
        steps = progress.track(range(self.rounds * len(sites)), f"compressing by {self.key}", self.rounds * len(sites))
        for step in steps:
            done, index = divmod(step, len(sites))
            if index == 0:
                sizes = activations(twin, sites, ids)
            left = self.rounds - done - 1
            count = targets[index] + math.ceil((begun[index] - targets[index]) * left / self.rounds)
            sites[index].prune(twin, sizes[index].topk(count, dim=-1).indices.sort(dim=-1).values)


def _within(width: int, share: float) -> int:
    return min(max(int(width * share + 1e-9), 1), width)


def _why(name: str) -> str:
    if name.endswith(("q_proj", "k_proj")):
        return "queries and keys stay whole"
    return "it stands in no module whose inside is known"


def activations(model: PreTrainedModel, sites: list[Site], ids: Tensor) -> list[Tensor]:
    """Root mean square of each site's transitional activations over texts ids [t, n], float32 [heads, width] each."""
    sums: dict[str, Tensor] = {}
    with _listening(model, [site.out for site in sites], sums), torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    return [site.by_head(sums[site.out] / ids.numel()).sqrt() for site in sites]


@contextmanager
def _listening(model: PreTrainedModel, names: list[str], sums: dict[str, Tensor]) -> Iterator[None]:
    """Until the block ends, add the squares of what enters these layers, over all tokens, to `sums`."""

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].float().square().flatten(0, -2).sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    hooks: list[Callable[[], None]] = []
    try:
        for name in names:
            hooks.append(model.get_submodule(name).register_forward_pre_hook(partial(add, name)).remove)
        yield
    finally:
        for remove in hooks:
            remove()
