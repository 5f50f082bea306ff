"""Compressed models in the packed format of compressed-tensors, which transformers and servers load by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from workbench.core.precision import checked
from workbench.errors import MissingExtra
from workbench.export.module_data import rebuild
from workbench.weights.layers import PackedLinear

NAME = "compressed-tensors"
WEIGHTS = "model.safetensors"


def unfit(model: PreTrainedModel, twin: PreTrainedModel, names: list[str]) -> str | None:
    """Why a compressed copy of a model cannot be written in this format, in words; None if it can. names: what was
    compressed.

    It holds integers with one scale for each group of columns and nothing else. Checkpoints with zeros of their own
    load wrong on transformers 5 (the shape of the zeros), so only symmetric ones are written.
    """
    for name in names:
        layer, before = twin.get_submodule(name), type(model.get_submodule(name))
        if before is not torch.nn.Linear and type(layer) is before and _alike(layer, model.get_submodule(name)):
            continue  # other numbers in the same place, such as a norm that took factors of the layers behind it
        if before is not torch.nn.Linear:
            return f"{name} stands for a {before.__name__}"
        if type(layer) is not PackedLinear:
            return f"{name} is a {type(layer).__name__}"
        if layer.zero is not None:
            return f"{name} has zeros of its own (symmetric=True has none)"
        if layer.columns is not None:
            return f"{name} has a factor for each column"
        if layer.in_features % layer.group:
            return f"the {layer.in_features} columns of {name} are no multiple of its groups of {layer.group}"
    return None if packed(twin, names) else "nothing in it is compressed"


def packed(twin: PreTrainedModel, names: list[str]) -> dict[str, PackedLinear]:
    """Those of these modules that are packed, by name."""
    return {name: layer for name in names if isinstance(layer := twin.get_submodule(name), PackedLinear)}


def _alike(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    shapes = ({name: tensor.shape for name, tensor in module.state_dict().items()} for module in (one, other))
    return next(shapes) == next(shapes)


def installed() -> bool:
    """Whether the library is here."""
    return find_spec("compressed_tensors") is not None


def check_installed() -> None:
    """Raise MissingExtra where the library is not here."""
    if not installed():
        raise MissingExtra(
            f"the format {NAME} needs that library: pip install 'inference-workbench[export]', or export in the "
            'workbench\'s own format (format="workbench")'
        )


def write(
    twin: PreTrainedModel, config: PretrainedConfig, names: list[str], folder: Path, dtype: torch.dtype | None
) -> None:
    """Write weights and a copy of the configuration into a folder that is there. dtype: of what is not compressed."""
    check_installed()
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    layers = packed(twin, names)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    tied = set(getattr(twin, "_tied_weights_keys", None) or ())
    for name, tensor in twin.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if (owner in layers and key != "bias") or (name in tied and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        plain = tensor.detach()
        tensors[name] = checked(plain, dtype, name) if dtype is not None and plain.is_floating_point() else plain
    for name, layer in layers.items():
        codes = layer.codes().to(torch.int16) - 2 ** (layer.bits - 1)
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes.to(torch.int8), layer.bits)
        tensors[f"{name}.weight_scale"] = layer.scale
        tensors[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = copy.deepcopy(config)
    config.dtype = dtype or twin.dtype
    config.quantization_config = _scheme(layers, twin)
    config.save_pretrained(folder)


def _scheme(layers: dict[str, PackedLinear], twin: PreTrainedModel) -> dict[str, Any]:
    """What the library has to know: layers of the same bits and groups together, and those left alone."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    alike: dict[tuple[int, int | None], list[str]] = {}
    for name, layer in layers.items():
        group = None if layer.group == layer.in_features else layer.group
        alike.setdefault((layer.bits, group), []).append(name)
    groups = {}
    for index, ((bits, group), names) in enumerate(alike.items()):
        strategy = "channel" if group is None else "group"
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=group)
        groups[f"group_{index}"] = QuantizationScheme(targets=names, weights=weights, format="pack-quantized")
    plain = [name for name, module in twin.named_modules() if type(module) is torch.nn.Linear]
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=plain
    )
    scheme: dict[str, Any] = config.to_dict()
    return scheme


def read(folder: Path, skeleton: Callable[[Any, torch.dtype, str | None], PreTrainedModel]) -> PreTrainedModel:
    """What `write` wrote, with layers as small as they were; transformers would unpack them when they are used.

    skeleton: makes a model without data from (configuration, dtype, attention implementation).
    """
    check_installed()
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    groups = config.quantization_config["config_groups"].values()
    bits = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    del config.quantization_config
    model = skeleton(config, config.dtype, None)
    tensors = load_file(folder / WEIGHTS)
    for name, width in bits.items():
        packed, scale, shape = (tensors.pop(f"{name}.weight_{part}") for part in ("packed", "scale", "shape"))
        codes = unpack_from_int32(packed, width, torch.Size(shape.tolist())).to(torch.int16) + 2 ** (width - 1)
        plain: Any = model.get_submodule(name)
        model.set_submodule(name, PackedLinear(codes.to(torch.uint8), scale, None, width, plain.bias))
    for name, owner in (getattr(model, "_tied_weights_keys", None) or {}).items():
        if name not in tensors and owner in tensors:
            tensors[name] = tensors[owner]
    rebuild(model, {}, tensors)
    return model
