"""Modules of a transformer with something inside that can be narrower: an MLP's neurons, attention's values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from workbench.core.precision import checked
from workbench.weights.layers.narrow_attention import NarrowAttention, known_attention
from workbench.weights.surgery.narrow import narrowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GATED = ["gate_proj", "up_proj", "down_proj"]
_CLOSE = 0.02  # of the largest output: how far rounding at 16 bits may take two ways of the same product apart


class PrunableAxis(NamedTuple):
    """Which axis of a layer's weight can be narrower, 0 for outputs and 1 for inputs, and into how many heads it
    divides.
    """

    axis: int
    heads: int = 1


class PrunableModule:
    """One module with something inside that can be narrower.

    what: such modules in words. name: of the module. out: the layer whose input is inside. layers: its layers, and of
    each which axis can be narrower. heads: what is inside divides into this many, with `width` dimensions each.
    dimension_nbytes: what one dimension of each head takes, at `element_size` bytes a weight.
    """

    what: ClassVar[str]
    name: str
    out: str
    layers: dict[str, PrunableAxis]
    heads: int
    width: int
    dimension_nbytes: int
    element_size: int

    def columns(self, kept: Tensor) -> Tensor:
        """Which inputs of `out` are the dimensions int64 [heads, m], in the order of what stays of them."""
        raise NotImplementedError

    def prune(self, model: PreTrainedModel, kept: Tensor, out: Tensor | None = None) -> None:
        """Keep only these dimensions int64 [heads, m]. out: what the weight of `out` becomes, if not a part of it."""
        raise NotImplementedError

    def by_head(self, squares: Tensor) -> Tensor:
        """The mean squares of the inputs of `out` [i] as [heads, width]."""
        raise NotImplementedError


class PrunableMLP(PrunableModule):
    """A gated MLP: act(gate(x)) * up(x), and down."""

    what = "a gated MLP (gate_proj, up_proj, down_proj)"
    heads = 1

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.out = name, f"{name}.down_proj"
        self.layers = {
            f"{name}.gate_proj": PrunableAxis(0),
            f"{name}.up_proj": PrunableAxis(0),
            f"{name}.down_proj": PrunableAxis(1),
        }
        self.width = module.get_submodule("down_proj").in_features  # type: ignore[assignment]
        self.dimension_nbytes, self.element_size = _nbytes(module, self.layers, self.width)

    def by_head(self, squares: Tensor) -> Tensor:
        return squares[None]

    def columns(self, kept: Tensor) -> Tensor:
        return kept[0]

    def prune(self, model: PreTrainedModel, kept: Tensor, out: Tensor | None = None) -> None:
        for name, (axis, _) in self.layers.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, narrowed(linear, kept[0], axis))
        if out is not None:
            _replace_weight(model.get_submodule(self.out), out)


class PrunableAttention(PrunableModule):
    """Attention of a known class: what each KV head holds as values, and its query heads take out of them."""

    what = "attention of a known class"

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.out = name, f"{name}.o_proj"
        self.heads = kv_heads(module)
        self.groups = module.num_key_value_groups
        self.layers = {
            f"{name}.v_proj": PrunableAxis(0, self.heads),
            f"{name}.o_proj": PrunableAxis(1, self.heads * self.groups),
        }
        self.width = module.v_proj.out_features // self.heads
        self.dimension_nbytes, self.element_size = _nbytes(module, self.layers, self.width)

    def by_head(self, squares: Tensor) -> Tensor:
        return squares.view(self.heads, self.groups, -1).sum(dim=1)

    def columns(self, kept: Tensor) -> Tensor:
        queries = torch.arange(self.heads * self.groups, device=kept.device)[:, None]
        return (queries * self.width + kept.repeat_interleave(self.groups, dim=0)).flatten()

    def prune(self, model: PreTrainedModel, kept: Tensor, out: Tensor | None = None) -> None:
        attention: Any = model.get_submodule(self.name)
        now = PrunableAttention(self.name, attention)  # it may have become narrower since
        kept = kept.cpu()
        heads = torch.arange(self.heads)[:, None]
        channels = getattr(attention, "value_channels", torch.arange(now.width).expand(self.heads, -1))
        narrow = NarrowAttention(
            attention,
            narrowed(attention.v_proj, (heads * now.width + kept).flatten(), 0),
            narrowed(attention.o_proj, now.columns(kept), 1),
            channels.gather(1, kept),
        )
        if out is not None:
            _replace_weight(narrow.o_proj, out)
        model.set_submodule(self.name, narrow)


class PrunableQueriesKeys(PrunableModule):
    """Attention of a known class: the pairs of channels of queries and keys that are rotated together."""

    what = "attention of a known class that rotates its queries and keys as they are projected"

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.out = f"{name} (queries and keys)", f"{name}.k_proj"
        self._attention = name
        self.heads = kv_heads(module)
        self.groups = module.num_key_value_groups
        self.layers = {
            f"{name}.q_proj": PrunableAxis(0, self.heads * self.groups),
            f"{name}.k_proj": PrunableAxis(0, self.heads),
        }
        self.width = module.k_proj.out_features // self.heads // 2
        self.dimension_nbytes, self.element_size = _nbytes(module, self.layers, self.width)
        self.dimension_nbytes += self.heads * 2 * 4  # the numbers of the channels

    def prune(self, model: PreTrainedModel, kept: Tensor, out: Tensor | None = None) -> None:
        attention: Any = model.get_submodule(self._attention)
        channels = torch.cat([kept, kept + self.width], dim=1).cpu()  # [heads, 2 m]
        heads = torch.arange(self.heads)[:, None] * 2 * self.width
        queries = torch.arange(self.heads * self.groups)[:, None] * 2 * self.width
        known = getattr(attention, "key_channels", None)
        values = getattr(attention, "value_channels", None)
        if values is None:
            values = torch.arange(attention.v_proj.out_features // self.heads).expand(self.heads, -1)
        narrow = NarrowAttention(
            attention,
            attention.v_proj,
            attention.o_proj,
            values,
            (channels if known is None else known.cpu().gather(1, channels)).int().to(attention.k_proj.weight.device),
        )
        narrow.k_proj = narrowed(attention.k_proj, (heads + channels).flatten(), 0)
        each = channels.repeat_interleave(self.groups, dim=0)
        narrow.q_proj = narrowed(attention.q_proj, (queries + each).flatten(), 0)
        model.set_submodule(self._attention, narrow)


def kv_heads(attention: Any) -> int:
    """How many KV heads attention of a known class has, also one that has become narrower."""
    if isinstance(attention, NarrowAttention):
        return attention.value_channels.shape[0]
    heads: int = attention.k_proj.out_features // attention.head_dim
    return heads


def prunable_modules(model: nn.Module, names: Sequence[str] | None = None) -> list[PrunableModule]:
    """The modules that can be narrower inside, in order. names: only those whose layers are all among these."""
    modules: list[PrunableModule] = []
    known: dict[type[nn.Module], bool] = {}  # of one class one is tried
    for name, module in model.named_modules():
        projections = [child for child, layer in module.named_children() if type(layer) is nn.Linear]
        if known_attention(module) and {"v_proj", "o_proj", "k_proj", "q_proj"} <= set(projections):
            modules.append(PrunableAttention(name, module))
            if getattr(module, "q_norm", None) is None:  # norms of queries and keys count all their channels
                modules.append(PrunableQueriesKeys(name, module))
        elif projections == _GATED:
            if type(module) not in known:
                known[type(module)] = _gated(module)
            if known[type(module)]:
                modules.append(PrunableMLP(name, module))
    return [module for module in modules if names is None or set(module.layers) <= set(names)]


def activation(mlp: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The activation of a gated MLP, by whichever name its class knows it."""
    return getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)


def _gated(mlp: nn.Module) -> bool:
    """Whether a module computes down(act(gate(x)) * up(x)) and no more: others also keep the largest or clip."""
    act, source = activation(mlp), cast("Any", mlp)
    if act is None:
        return False
    weight = source.gate_proj.weight
    x = torch.linspace(-2, 2, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    with torch.no_grad():
        out = mlp(x)
        want = source.down_proj(act(source.gate_proj(x)) * source.up_proj(x))
    return isinstance(out, Tensor) and bool((out - want).abs().max() <= _CLOSE * want.abs().max())


def _nbytes(module: nn.Module, places: Iterable[str], width: int) -> tuple[int, int]:
    """Bytes of one of `width` dimensions of a module's layers, and of one weight."""
    layers = [module.get_submodule(name.rpartition(".")[2]) for name in places]
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    size = weights[0].element_size()
    return sum(weight.numel() for weight in weights) * size // width, size


def _replace_weight(linear: nn.Module, weight: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(checked(weight, linear.weight.dtype, "its weights").contiguous(), False)
