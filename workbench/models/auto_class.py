"""Which of transformers' automatic classes makes a model of a config: of text alone, or of text and images."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, but AutoModelForImageTextToText for configs that only it knows."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as TEXT

    return AutoModelForImageTextToText if sees(config) and type(config) not in TEXT else AutoModelForCausalLM


def sees(config: Any) -> bool:
    """Whether a model of this config reads images beside text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as IMAGES

    return type(config) in IMAGES
