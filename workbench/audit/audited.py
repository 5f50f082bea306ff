"""The audit: a model is held against itself, and its layers and weights are asked."""

from __future__ import annotations

from typing import Any, cast

import torch

from workbench.audit.layers import attention_findings
from workbench.audit.weights import weight_findings
from workbench.errors import BadParameter, NotApplicable
from workbench.files.paths import place
from workbench.models import Facts, catalogue, facts
from workbench.models.auto_class import auto_class, sees
from workbench.models.findings import Audit
from workbench.models.quiet import quiet
from workbench.progress import Progress
from workbench.registry import method
from workbench.runtime.exactness import probed, verify
from workbench.session import Session
from workbench.trace import Trace
from workbench.weights import WeightMethod

_UNTRIED = "there are no weights to compare with the model by itself"


def audited(model: Any, *, weights: str = "rtn", progress: Progress | None = None) -> Audit:
    """See `workbench.models.audit`."""
    asked = method(weights)
    if not isinstance(asked, WeightMethod):
        raise BadParameter(f"weights={weights!r}: {asked.title} changes no weights; name a weight method")
    config = _config(model)
    if config is not None:
        with torch.device("meta"):
            blank = _blank(config)
        known = facts(blank, name=config.model_type)
        return Audit(
            known.name,
            known.model_type,
            None,
            _UNTRIED,
            weights,
            attention_findings(blank, known, None, "unchecked", _UNTRIED) + weight_findings(blank, asked),
        )
    session = model if isinstance(model, Session) else Session(model, progress=progress)
    trace, why = _tried(session.readings.model, session.facts, progress)
    fate, exact = ("refused", False) if trace is None else ("compressible", True)
    return Audit(
        session.source,
        session.facts.model_type,
        exact,
        why,
        weights,
        attention_findings(session.model, session.facts, trace, cast("Any", fate), why)
        + weight_findings(session.model, asked),
    )


def _tried(model: Any, known: Facts, progress: Progress | None) -> tuple[Trace | None, str]:
    """What reading a few tokens records, where the model is exact; else None and why it is not."""
    try:
        verify(model, known, progress)
        return probed(model, known, progress), ""
    except NotApplicable as refusal:
        return None, str(refusal)


def _config(model: Any) -> Any:
    """The config that is meant; None where a model is: something with weights."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        return model
    if not isinstance(model, str) or model not in CONFIG_MAPPING or model in {each.name for each in catalogue()}:
        return None
    return None if place(model).exists() else CONFIG_MAPPING[model]()


def _blank(config: Any) -> Any:
    """A config's model without data. Raises NotApplicable where transformers has no causal model for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not sees(config):
        raise NotApplicable(f"{config.model_type}: transformers has no causal language model of this kind")
    with quiet():
        try:
            return auto_class(config).from_config(config)
        except Exception as error:  # every config has its own way to fail
            said = (str(error).strip().splitlines() or [""])[0][:120]
            raise NotApplicable(f"{config.model_type}: transformers cannot build this config ({said})") from error
