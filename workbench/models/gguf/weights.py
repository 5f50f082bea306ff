"""The weights of a GGUF file as a transformers model: every parameter from the file, every tensor of it used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import CheckpointRefused
from workbench.models.gguf.architectures import Architecture
from workbench.models.gguf.header import Header
from workbench.models.gguf.rope import rotary_tensors
from workbench.models.gguf.tensors import tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


def read_weights(header: Header, architecture: Architecture, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file, its weights dequantised to `dtype`.

    Raises CheckpointRefused, before a tensor is read, where the file lacks one that the model needs, holds one that it
    does not take, or holds one of another shape; and where a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    from workbench.models.finite import check_finite

    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001  (there is no public way to the class)
    shapes = _parameters(kind, config)
    _check(header, architecture, shapes)
    weights = {}
    for name, shape in shapes.items():
        parts = [tensor(header, source) for source in architecture.sources(name)]
        joined = parts[0] if len(parts) == 1 else _joined(parts)
        weights[name] = _unconverted(joined.reshape(shape), name, architecture, config).to(dtype)
    check_finite(str(header.path), weights.items(), dtype)
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)
    wrong = [
        name for kind_of_key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind_of_key]
    ]
    if wrong:
        raise CheckpointRefused(f"{header.path}: this version of transformers has no place for {wrong[0]}")
    model.config._name_or_path = str(header.path)  # noqa: SLF001  (as from_pretrained does)
    return model  # type: ignore[no-any-return]


def _parameters(kind: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """What the model is made of: name -> shape, tied ones once. Nothing is allocated."""
    import torch

    with torch.device("meta"):
        model = kind(config)
    named = dict(model.named_parameters())
    persistent = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return {name: tuple(part.shape) for name, part in {**named, **persistent}.items()}


def _check(header: Header, architecture: Architecture, shapes: dict[str, tuple[int, ...]]) -> None:
    used = rotary_tensors(header)
    for name, shape in shapes.items():
        sources = architecture.sources(name)
        for source in sources:
            if source not in header.tensors:
                raise CheckpointRefused(
                    f"{header.path}: lacks the tensor {source}, which makes the model's {name}; download it again"
                )
        used.update(sources)
        found = [header.tensors[source].shape for source in sources]
        if not _fits(shape, found):
            stored = " and ".join(f"{source} {list(extent)}" for source, extent in zip(sources, found, strict=True))
            raise CheckpointRefused(
                f"{header.path}: holds {stored} where the model's {name} has the shape {list(shape)}: the metadata and "
                "the weights contradict each other"
            )
    unused = sorted(set(header.tensors) - used)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise CheckpointRefused(
            f"{header.path}: holds the tensor {unused[0]}{more}, for which {header.architecture} as read here has no "
            "use; leaving it out could make another model: use a safetensors folder of the same model"
        )


def _fits(shape: tuple[int, ...], found: list[tuple[int, ...]]) -> bool:
    if len(found) == 1:
        return found[0] == shape or (shape[0] == 1 and found[0] == shape[1:])  # a router with one output is a vector
    rows = len(shape) - 2
    total = sum(one[rows] for one in found if len(one) == len(shape))
    return (
        all(one[:rows] + one[rows + 1 :] == shape[:rows] + shape[rows + 1 :] for one in found) and total == shape[rows]
    )


def _joined(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts, dim=parts[0].ndim - 2)


def _unconverted(weight: Tensor, name: str, architecture: Architecture, config: Any) -> Tensor:
    """What llama.cpp's converter did to a weight, undone."""
    if architecture.norm_offset and name.endswith("norm.weight"):
        return weight - architecture.norm_offset
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture.interleaved and heads:
        pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])  # [h, d / 2, 2, ...]
        return pairs.transpose(1, 2).reshape(weight.shape)
    return weight
