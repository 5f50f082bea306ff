"""Whether a safetensors folder's weights and its config describe the same model: nothing made up, nothing left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import CheckpointRefused
from workbench.models.auto_class import auto_class
from workbench.models.checkpoint import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tables that older versions of transformers wrote beside the weights, and that every model makes for itself.
_TABLES = re.compile(r"(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.(masked_)?bias|position_ids)$")
_PACKING = 64  # numbers that one stored number may stand for in a quantised checkpoint
_SMALL = 1 << 24  # numbers that are allocated without a thought


def check_size(folder: Path) -> None:
    """Raise CheckpointRefused if config.json describes a far larger model than the weights hold.

    The model is built without memory for its weights, so that nothing large is allocated for what is not there. What
    is missing of a model of about the right size is named by `check_report`.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    wanted = sum(weight.numel() for weight in model.parameters())
    held = sum(tensor.elements for tensor in stored(folder).values())
    packing = _PACKING if getattr(config, "quantization_config", None) else 2
    if wanted > held * packing + _SMALL:
        raise CheckpointRefused(
            f"{folder}: config.json describes a model of {wanted:,} numbers, and the weights hold {held:,}: they do "
            "not belong together; download the model again"
        )


def check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise CheckpointRefused where transformers filled weights in at random or left some out."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointRefused(f"{folder}: the weights lack {_first(missing)}; download the model again")
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise CheckpointRefused(
            f"{folder}: {name} has the shape {list(found)}, and config.json makes it {list(wanted)}: they do not "
            "belong together; download the model again"
        )
    if unexpected := sorted(name for name in report["unexpected_keys"] if not _TABLES.search(name)):
        raise CheckpointRefused(
            f"{folder}: the weights hold {_first(unexpected)}, for which the model that config.json describes has no "
            "use; leaving it out could make another model"
        )


def check_ties(folder: Path, model: PreTrainedModel) -> None:
    """Raise CheckpointRefused where config.json ties two weights and the file holds two that differ."""
    import torch
    from safetensors import safe_open

    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    held, ties = stored(folder), getattr(model, "_tied_weights_keys", None)
    for one, other in ties.items() if isinstance(ties, dict) else ():
        if one not in held or other not in held:
            continue
        values = []
        for tensor in (held[one], held[other]):
            with safe_open(tensor.file, framework="pt") as file:
                values.append(file.get_tensor(tensor.name))
        if not torch.equal(*values):
            raise CheckpointRefused(
                f"{folder}: config.json ties {one} to {other}, and the weights hold two that differ; if they are meant "
                'to, write "tie_word_embeddings": false there'
            )


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
