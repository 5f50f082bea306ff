"""Policies from the literature, each small: what its paper changes of continuous batching."""

from workbench.cost.serving.policies.alise import Alise
from workbench.cost.serving.policies.fastswitch import FastSwitch
from workbench.cost.serving.policies.flexllm import FlexLLM
from workbench.cost.serving.policies.layered_prefill import LayeredPrefill

__all__ = ["Alise", "FastSwitch", "FlexLLM", "LayeredPrefill"]
