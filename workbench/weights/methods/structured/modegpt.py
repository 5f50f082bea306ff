"""MoDeGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.core.precision import checked
from workbench.models.decoder import decoder_layers
from workbench.progress import Progress
from workbench.registry import Paper, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.narrow_attention import NarrowAttention, known_attention
from workbench.weights.solvers.whitening import root
from workbench.weights.surgery.narrow import narrowed
from workbench.weights.surgery.prunable import Values, sites_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Module:
    """A pair of layers, or three, with dimensions between them: `heads` times `width`; each of the widths, taken from
    all heads, costs `nbytes`.
    """

    name: str
    into: tuple[str, ...]  # layers that lead into it,
    out: str  # and the one that leads out
    heads: int
    width: int
    nbytes: int


# How many rows or columns stand for one width of a layer, found when a model is looked through: (axis, number).
_places: WeakKeyDictionary[nn.Linear, tuple[int, int]] = WeakKeyDictionary()


@register
class MoDeGPT(WeightMethod):
    """Make modules narrower inside, each kind by its own decomposition, most of all in blocks that do little.

    Feed-forward modules (Nyström approximation): the neurons with the largest ridge leverage in the correlation C of
    their activations stay, and the layer that follows is refitted to them, C[all, kept] C[kept, kept]⁻¹, which is least
    squares on the original's output. Values and outputs of attention (SVD): each KV head's values are replaced by the
    few mixtures of them that keep what its query heads' outputs make of them, the smallest error of any such rank. The
    share that goes differs from block to block: L φ softmax(-s / ε), where s is one minus the cosine between what
    enters and leaves a block (Lin et al. 2024, sections 3.2 and 3.3).

    The published method also narrows queries and keys (CR decomposition). Here they stay whole, so that scores are
    exact and rotary positions keep their meaning. Correlations are those of the uncompressed model, where the paper
    measures them again after each block.

    Budget: the share of the bytes of the layers that are narrowed, at the precision they are held in. The cache becomes
    smaller with the values. From a share of 1 on the weights stay as they are.
    """

    key = "modegpt"
    title = "MoDeGPT"
    paper = Paper(
        "MoDeGPT: Modular Decomposition for Large Language Model Compression", "Lin et al. 2024", "2408.09632"
    )
    claim = "90-95 % of zero-shot accuracy at 25-30 % compression, without training"
    default_budget = 0.75
    measure: ClassVar[str] = "size"
    needs_moment: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    temperature: float = param(0.1, gt=0, le=100, help="ε: the lower, the more blocks differ in what they lose")
    ridge: float = param(
        0.01, gt=0, le=100, help="λ of the leverage, in mean squares of a neuron: below it, directions count for little"
    )

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        taken = set()
        for module in (module for parts in _modules(model).values() for module in parts):
            names = (*module.into, module.out)
            if all(name in linears for name in names):
                taken |= set(names)
                for name in names:
                    linear, axis = linears[name], int(name == module.out)
                    _places[linear] = axis, linear.weight.shape[axis] // module.width
        return {name: _why(name) for name in linears if name not in taken}

    def full_nbytes(self, linear: nn.Linear) -> int:
        return linear.weight.numel() * linear.weight.element_size()

    def nbytes(self, linear: nn.Linear) -> int:
        return self.full_nbytes(linear)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        smallest = 0
        for linear in linears.values():
            axis, count = _places[linear]
            smallest += self.full_nbytes(linear) // linear.weight.shape[axis] * count
        return max(smallest, self._limit(linears))

    def _limit(self, linears: Mapping[str, nn.Linear]) -> int:
        assert self.effective_budget is not None
        full = sum(map(self.full_nbytes, linears.values()))
        limit = self.effective_budget.nbytes(full)
        return full if limit is None else min(limit, full)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self._limit(linears)
        if limit >= sum(map(self.full_nbytes, linears.values())):
            return
        found = {name: [module for module in parts if module.out in linears] for name, parts in _modules(twin).items()}
        for _ in study.inputs(moments=True, progress=progress):
            pass  # one pass over the texts, which tells how much each block does, too
        losses = shares(1 - study.similarity(progress), self.temperature)
        widths = dict(zip(found, allocate(list(found.values()), losses.tolist(), limit), strict=True))
        steps = progress.track(study.inputs(moments=True), f"compressing by {self.key}", len(found))
        for name, inputs in steps:
            for module, width in zip(found[name], widths[name], strict=True):
                if width == module.width:
                    continue
                with self.naming(module.out):
                    if known_attention(twin.get_submodule(module.name)):
                        _narrow_values(twin, module, width, inputs)
                    else:
                        self._narrow_neurons(twin, module, width, inputs)

    def _narrow_neurons(
        self, twin: PreTrainedModel, module: _Module, width: int, inputs: Mapping[str, InputStats]
    ) -> None:
        moment = inputs[module.out].second_moment
        kept = leverage(moment, self.ridge).topk(width).indices.sort().values
        for name in module.into:
            twin.set_submodule(name, narrowed(_linear(twin, name), kept, 0))
        out = _linear(twin, module.out)
        twin.set_submodule(module.out, _made(refitted(out.weight.detach(), moment, kept), out.bias, out))


def _narrow_values(twin: PreTrainedModel, module: _Module, width: int, inputs: Mapping[str, InputStats]) -> None:
    attention: Any = twin.get_submodule(module.name)
    value, out = attention.v_proj, attention.o_proj
    stats = inputs[module.into[0]]
    rows = value.weight.detach().float().unflatten(0, (module.heads, -1))  # [k, d, i]
    bias = torch.zeros_like(rows[..., 0]) if value.bias is None else value.bias.detach().float().view_as(rows[..., 0])
    columns = out.weight.detach().float().unflatten(1, (module.heads, -1, module.width))  # [o, k, g, d]
    new_rows, new_bias, new_columns = [], [], []
    for head in range(module.heads):
        mixing, outputs = mixtures(
            columns[:, head].transpose(0, 1).flatten(0, 1), value_moment(rows[head], bias[head], stats), width
        )
        new_rows.append(mixing @ rows[head])
        new_bias.append(mixing @ bias[head])
        new_columns.append(outputs.unflatten(0, (-1, out.out_features)).permute(1, 0, 2))  # [o, g, r]
    v_bias = None if value.bias is None else nn.Parameter(torch.cat(new_bias).to(value.bias.dtype), False)
    v_proj = _made(torch.cat(new_rows), v_bias, value)
    o_proj = _made(torch.stack(new_columns, dim=1).flatten(1), out.bias, out)
    channels = torch.arange(width).expand(module.heads, -1)
    twin.set_submodule(module.name, NarrowAttention(attention, v_proj, o_proj, channels))


def shares(importance: Tensor, temperature: float) -> Tensor:
    """How much each block loses, relative to the average, for its importance [l]: L softmax(-s / ε)."""
    return importance.numel() * (-importance.double() / temperature).softmax(dim=0)


def allocate(modules: Sequence[Sequence[_Module]], losses: Sequence[float], limit: int) -> list[list[int]]:
    """How wide the modules of each block become, within `limit` bytes together.

    Blocks lose in proportion to `losses` as far as they can: at least one width of each module stays. Within a block,
    heads lose that share, and neurons what the bytes ask for besides.
    """

    def widths(factor: float) -> list[list[int]]:
        return [_within(parts, 1 - min(factor * loss, 1.0)) for parts, loss in zip(modules, losses, strict=True)]

    def nbytes(found: Sequence[Sequence[int]]) -> int:
        pairs = [pair for parts, own in zip(modules, found, strict=True) for pair in zip(parts, own, strict=True)]
        return sum(module.nbytes * width for module, width in pairs)

    low, high = 0.0, 1 / max(min(losses), 1e-12)  # at `high` nothing but the smallest widths stays
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if nbytes(widths(middle)) <= limit else (middle, high)
    return widths(high)


def _within(modules: Sequence[_Module], share: float) -> list[int]:
    """The widths of a block's modules at this share of its bytes; the last module takes what is left of them."""
    room = share * sum(module.width * module.nbytes for module in modules)
    found = []
    for number, module in enumerate(modules, 1):
        part = share * module.width if number < len(modules) else room / module.nbytes
        found.append(min(max(int(part + 1e-9), 1), module.width))
        room -= found[-1] * module.nbytes
    return found


def leverage(moment: Tensor, ridge: float) -> Tensor:
    """The ridge leverage of each neuron [i] in the correlation [i, i]: the diagonal of C (C + λ I)⁻¹."""
    exact = moment.double()
    mean = exact.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(moment[0])
    damped = exact + ridge * mean * torch.eye(len(exact), dtype=torch.float64, device=exact.device)
    return (1 - ridge * mean * torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()).float()


def refitted(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The weight [o, m] that makes of the kept inputs what comes closest to the outputs of weight [o, i]."""
    if not moment.diagonal().sum() > 0:
        return weight[:, kept]
    base = root(moment[kept][:, kept]).double()
    pull = weight.double() @ moment[:, kept].double()  # [o, m]
    return torch.cholesky_solve(pull.T, base).T.float()


def value_moment(rows: Tensor, bias: Tensor, inputs: InputStats) -> Tensor:
    """The mean of v vᵀ [d, d] for values v = rows x + bias, rows [d, i]."""
    mean = torch.outer(rows @ inputs.mean, bias)
    return rows @ inputs.second_moment @ rows.T + mean + mean.T + torch.outer(bias, bias)


def mixtures(outputs: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The matrix A [r, d] and outputs [o, r] in place of outputs [o, d], for which outputs (A v) comes closest to
    outputs v in the mean square over values with this second moment [d, d].
    """
    base = root(moment).double()
    seen = outputs.double() @ base  # what white values give
    _, basis = torch.linalg.eigh(seen.T @ seen)
    chosen = basis[:, -rank:].flip(1)  # [d, r]
    mixing = torch.linalg.solve_triangular(base, chosen.T, upper=False, left=False)
    return mixing.float(), (seen @ chosen).float()


def _modules(model: nn.Module) -> dict[str, list[_Module]]:
    """What can be narrower in each block, attention first."""
    names = decoder_layers(model)
    found: dict[str, list[_Module]] = {name: [] for name in names}
    for site in sorted(sites_of(model), key=lambda site: not isinstance(site, Values)):
        block = next((name for name in names if site.name.startswith(f"{name}.")), None)
        if block is not None:
            into = tuple(name for name in site.places if name != site.out)
            found[block].append(_Module(site.name, into, site.out, site.heads, site.width, site.dimension_nbytes))
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _made(weight: Tensor, bias: nn.Parameter | None, like: nn.Linear) -> nn.Linear:
    """A plain layer with this weight [o, i], in the precision and mode of another."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(checked(weight, like.weight.dtype, "its weights").contiguous(), False)
    made.bias = bias  # type: ignore[assignment]
    return made.train(like.training)


def _why(name: str) -> str:
    if name.endswith(("q_proj", "k_proj")):
        return "queries and keys stay whole"
    return "it stands in no module whose inside is known"
