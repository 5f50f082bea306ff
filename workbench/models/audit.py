"""Where users find the audit of a model: beside what loads one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.models.findings import Audit
from workbench.models.load import LoadedModel
from workbench.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def audit(
    model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | LoadedModel | PreTrainedConfig | Any,
    *,
    weights: str = "rtn",
    progress: Progress | None = None,
) -> Audit:
    """What each layer of a model is, and what of it is compressed, left exact or refused, with the reason.

    model: a session, or what a session takes: a name, hub id, folder, pair of model and tokenizer, loaded model. Of a
    config of transformers or a model type ("qwen3") without weights the kinds, sizes and fates of layers are told, but
    not whether reading is exact. weights: the key of the weight method that is asked which modules it takes. Raises
    ModelNotFound, UnknownMethod, BadParameter for a method that changes no weights, NotApplicable for a model that is
    no decoder, and what loading raises. One that is refused when it is read is audited, not raised.

        >>> print(audit("workbench-tiny"))
        workbench-tiny (llama): exact
    """
    # What compares a model with itself stands above this package, and imports it.
    done: Audit = import_module("workbench.audit").audited(model, weights=weights, progress=progress)
    return done
