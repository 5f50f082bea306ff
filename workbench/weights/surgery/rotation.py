"""Rotations and scalings of a decoder's weights that leave what it computes as it is.

What flows between blocks is rotated by one matrix, the values of each head by another, and the neurons of feed-forward
modules by a third, which has to be done while the model runs. Channels of values and neurons are scaled besides.
Everything else goes into the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from workbench.core.hadamard import rotate
from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers
from workbench.weights.layers.rotated import PlainNorm, RotatedEmbedding, UnrotatedNorm, across

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")  # x / rms(x) * weight
_FUSED = {"self_attn": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")}
_APART = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_LEAST = 1e-3  # of the largest: the smallest that a norm's weight counts as where it has to be divided by
_WIDEST = 100.0  # how far a channel is scaled up or down at most


@dataclass(frozen=True)
class LayerRotation:
    """What becomes of one layer y = W x + b: x' = (x / entering) rotated, y' = (y * leaving) rotated.

    entering [i], leaving [o]: float64. inner, outer: numbers that are rotated together on either side; 1: none. outer
    begins with the output `first`; those before are neither scaled nor rotated. heads: the parts of what enters that
    are rotated across each other besides; 1: they are not.
    """

    entering: Tensor
    leaving: Tensor
    inner: int
    outer: int = 1
    first: int = 0
    heads: int = 1

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [o, i] between what enters and leaves as they have become, float32."""
        wide = self.out(weight.detach().double().T).T
        return self._entered(wide * self.entering).float()

    def out(self, y: Tensor) -> Tensor:
        """Outputs [..., o] as they become."""
        behind = y[..., self.first :] * self.leaving[self.first :]
        return torch.cat([y[..., : self.first], _rotated(behind, self.outer)], dim=-1)

    def hessian(self, hessian: Tensor) -> Tensor:
        """The Hessian [i, i] of the inputs as they have become, float32."""
        divisor = self.entering
        least = _LEAST * divisor.abs().max()
        divisor = torch.where(divisor.abs() < least, torch.where(divisor < 0, -least, least), divisor)
        return self._entered(self._entered(hessian.double() / divisor / divisor[:, None]).T).float()

    def _entered(self, x: Tensor) -> Tensor:
        """Inputs [..., i] rotated."""
        turned = _rotated(x, self.inner)
        return turned if self.heads == 1 else across(turned, self.heads, rotate)

    @property
    def moves_bias(self) -> bool:
        """Whether what leaves is no longer what left."""
        return self.outer > 1 or bool((self.leaving != 1).any())


def _rotated(x: Tensor, size: int) -> Tensor:
    """x [..., d] with every `size` neighbouring numbers rotated."""
    return rotate(x.unflatten(-1, (-1, size))).flatten(-2) if size > 1 else x


class DecoderRotation:
    """Where the rotations go in a decoder of a known form.

    Raises NotApplicable, with the reason, where the form is another: norms after modules (Gemma), experts, or layers
    that are compressed already.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.blocks = decoder_layers(model)
        self.name = next(iter(self.blocks)).rsplit(".", 2)[0]
        core: Any = model.get_submodule(self.name)
        self.core = core
        for name, block in self.blocks.items():
            reason = _unknown(block)
            if reason is not None:
                raise NotApplicable(f"weights cannot be rotated in {type(model).__name__}: {name} {reason}")
        if type(getattr(core, "embed_tokens", None)) is not nn.Embedding or not known_norm(getattr(core, "norm", None)):
            raise NotApplicable(
                f"weights cannot be rotated in {type(model).__name__}: what it looks up, or normalises at its end, is "
                "of no known form"
            )
        self.width: int = core.embed_tokens.embedding_dim
        config = model.config.get_text_config()
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or self.heads
        first: Any = next(iter(self.blocks.values()))
        self.head_dim: int = first.self_attn.o_proj.in_features // self.heads
        for name, block in self.blocks.items():
            values = getattr(block.self_attn, "v_proj", None)
            if values is not None and values.out_features != self.kv_heads * self.head_dim:
                raise NotApplicable(
                    f"weights cannot be rotated in {type(model).__name__}: {name}.self_attn has "
                    f"{values.out_features} channels of values, not {self.kv_heads} heads of {self.head_dim}"
                )

    def signs(self, seed: int) -> Tensor:
        """The random signs of the rotation between blocks, int8 [hidden], on the CPU."""
        draw = torch.Generator().manual_seed(seed)
        return (2 * torch.randint(0, 2, (self.width,), generator=draw) - 1).to(torch.int8)

    def rotations(
        self, block: str, signs: Tensor, squares: Mapping[str, Tensor] | None = None, *, heads: int = 1
    ) -> dict[str, LayerRotation]:
        """What becomes of each linear layer of a block, by its full name.

        squares: mean squares [i] of what enters the layers, to scale channels of values and neurons by; None: they are
        not scaled. heads: how many heads of attention's outputs are rotated across each other before `o_proj`, as the
        model runs; 1: none.
        """
        module: Any = self.blocks[block]
        device = module.self_attn.o_proj.weight.device
        signs = signs.double().to(device)
        attention, mlp, width, d = module.self_attn, module.mlp, self.width, self.head_dim
        groups = (self.kv_heads, self.heads // self.kv_heads, d)  # how the inputs of o_proj divide
        values = torch.ones(self.kv_heads * d, dtype=torch.float64, device=device)
        neurons = torch.ones(mlp.down_proj.in_features, dtype=torch.float64, device=device)
        if squares is not None:
            o_proj, down_proj = f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj"
            weights = attention.o_proj.weight.detach().float().square().sum(dim=0)
            values = balance(*(part.view(groups).sum(dim=1).flatten() for part in (squares[o_proj], weights)))
            neurons = balance(squares[down_proj], mlp.down_proj.weight.detach().float().square().sum(dim=0))
        entering = module.input_layernorm.weight.detach().double() * signs
        made: dict[str, LayerRotation] = {}
        for name in projections("self_attn", attention)[:-1]:
            outputs = getattr(attention, name).out_features
            leaving = torch.ones(outputs, dtype=torch.float64, device=device)
            if name in ("v_proj", "qkv_proj"):
                leaving[outputs - values.numel() :] = 1 / values
                rotation = LayerRotation(entering, leaving, width, d, outputs - values.numel())
            else:
                rotation = LayerRotation(entering, leaving, width)
            made[f"{block}.self_attn.{name}"] = rotation
        by_head = values.view(self.kv_heads, 1, d).expand(groups).flatten()
        made[f"{block}.self_attn.o_proj"] = LayerRotation(by_head, signs, d, width, heads=heads)
        entering = module.post_attention_layernorm.weight.detach().double() * signs
        for name in projections("mlp", mlp)[:-1]:
            outputs = getattr(mlp, name).out_features
            leaving = torch.ones(outputs, dtype=torch.float64, device=device)
            if name != "gate_proj":
                leaving[outputs - neurons.numel() :] = 1 / neurons
            made[f"{block}.mlp.{name}"] = LayerRotation(entering, leaving, width)
        made[f"{block}.mlp.down_proj"] = LayerRotation(neurons, signs, neurons.numel(), width)
        return made

    def rotate_ends(self, twin: PreTrainedModel, signs: Tensor) -> None:
        """Rotate what enters the first block of a copy and undo it behind the last; weights of norms go, for they are
        in what `rotations` makes. The tables of the embedding and the head stay the original's own.
        """
        core: Any = twin.get_submodule(self.name)
        core.embed_tokens = RotatedEmbedding(core.embed_tokens, signs.to(core.embed_tokens.weight.device))
        core.norm = UnrotatedNorm(core.norm.weight, core.norm.variance_epsilon, signs.to(core.norm.weight.device))
        for name in self.blocks:
            block: Any = twin.get_submodule(name)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                setattr(block, norm, PlainNorm(getattr(block, norm).variance_epsilon))


def unrotatable(key: str, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Which of these layers of a model the method of this key cannot rotate, with the reason.

    Raises NotApplicable for a model of no known form.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise NotApplicable(f"{key}: {type(model).__name__} is no transformers model")
    known, found = tuple(f"{name}." for name in DecoderRotation(model).blocks), set(names)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.startswith(known) and name not in found:
            raise NotApplicable(f"{key}: {name} shares its weight, which would be rotated twice")
    return {name: "it stands in no block of the decoder" for name in names if not name.startswith(known)}


def rotated_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers in the blocks of a model whose numbers a rotation changes, by name, and why."""
    within = tuple(f"{name}." for name in decoder_layers(cast("PreTrainedModel", model)))
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: "what flows between layers is rotated" for name in layers if name.startswith(within)}


def rotation_nbytes(linears: Mapping[str, nn.Linear]) -> int:
    """Bytes that a rotation of these layers takes beside their weights: random signs, and biases that are rotated."""
    ends = ("v_proj", "qkv_proj", "o_proj", "down_proj")
    turned = [linear for name, linear in linears.items() if name.endswith(ends)]
    biases = sum(linear.bias.nbytes for linear in turned if linear.bias is not None)
    return biases + next(linear.out_features for name, linear in linears.items() if name.endswith("o_proj"))


def balance(inputs: Tensor, weights: Tensor) -> Tensor:
    """What channels with mean squares `inputs` [i] are divided by, before they meet weights of squares `weights` [i].

    Where channels are rotated together, rounding spreads its error evenly over them: it costs Σ x_j² / s_j² times
    Σ s_j² w_j², which is smallest for s_j² = |x_j| / |w_j| (Cauchy and Schwarz). The factors' geometric mean is 1.
    """
    inputs, weights = (
        part.double().clamp_min(1e-8 * float(part.double().mean()) + 1e-30) for part in (inputs, weights)
    )
    logs = 0.25 * (inputs.log() - weights.log())
    return (logs - logs.mean()).exp().clamp(1 / _WIDEST, _WIDEST)


def rotated_linear(linear: nn.Linear, rotation: LayerRotation) -> nn.Linear:
    """The layer as it becomes, in its own dtype, which holds no tensor of the original but a bias that stays."""
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(rotation.weight(linear.weight).to(linear.weight.dtype), requires_grad=False)
    bias = linear.bias
    if bias is not None and rotation.moves_bias:
        bias = nn.Parameter(rotation.out(bias.detach().double()).to(bias.dtype), requires_grad=False)
    made.bias = bias
    return made.train(linear.training)


def projections(place: str, module: nn.Module) -> tuple[str, ...]:
    """The names of a module's linear layers, the one that leads out of it last."""
    return _FUSED[place] if hasattr(module, _FUSED[place][0]) else _APART[place]


def _unknown(block: nn.Module) -> str | None:
    """Why a block is of no known form; None: it is."""
    children = {name for name, child in block.named_children() if any(True for _ in child.parameters())}
    if children != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return f"holds {', '.join(sorted(children))}"
    if not known_norm(block.input_layernorm) or not known_norm(block.post_attention_layernorm):
        return f"normalises by {type(block.input_layernorm).__name__}"
    for place in ("self_attn", "mlp"):
        module = block.get_submodule(place)
        names = projections(place, module)
        strange = [name for name in names if type(getattr(module, name, None)) is not nn.Linear]
        if strange:
            return f"has no plain linear layer {place}.{strange[0]}"
        own = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
        if own - set(names) - {"q_norm", "k_norm"}:
            return f"has something unknown in {place}: {', '.join(sorted(own - set(names)))}"
    return None


def known_norm(module: object) -> bool:
    """Whether a norm is one that computes x / rms(x) * weight."""
    return type(module).__name__ in _NORMS
