"""The one function: from a model, a recipe and a device to an estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench import arguments
from workbench.budget import BudgetLike
from workbench.cost.architecture import Architecture
from workbench.cost.cache import cache_under
from workbench.cost.estimate import Beside, Cost
from workbench.cost.hardware import Hardware
from workbench.cost.hardware import hardware as device_of
from workbench.cost.kernels import steps
from workbench.cost.memory import Memory, activation_nbytes
from workbench.cost.probe import architecture as architecture_of
from workbench.cost.probe import blank
from workbench.cost.source import config_of, dtypes_of
from workbench.cost.times import Machine, decode_terms, prefill_terms, seconds
from workbench.cost.weights import weights_under
from workbench.errors import BadParameter, BadRecipe
from workbench.recipe import Recipe, Spec

_DTYPES = ("bfloat16", "float16", "float32")


def cost(
    model: Any,
    recipe: Spec = "full",
    hardware: str | Path | Hardware = "H200",
    context: int = 32768,
    batch: int = 1,
    *,
    budget: BudgetLike | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    devices: int = 1,
    chunk: int | None = None,
    usable: float = 0.9,
) -> Cost:
    """What running a model would cost; no weight is loaded, and nothing is downloaded.

    model: a packaged name, a folder with config.json, a GGUF file, a hub id whose config.json is in the local cache, a
    model type of transformers, a config, a loaded model or session, or numbers under config.json's names. recipe and
    budget: KV and weight methods, as everywhere. hardware: a name (`workbench.cost.catalogue()`), a TOML file of the
    same form, or a `Hardware`. context: tokens of each sequence in the cache; batch: sequences. dtype: what the model
    computes in and its weights have (default: as a loaded model has it or its config says, else bfloat16); kv_dtype: of
    the uncompressed cache (default: a session's, else the same). devices: that share its matrices (tensor parallel).
    chunk: tokens of a prompt that are read at once (default all). usable: the share of the devices' memory.

    Bytes are exact where the methods foretell them, and bounds where the prompt decides: the notes say which. Times are
    a model's (`Cost.explain`). Raises BadParameter, BadBudget, BudgetTooSmall, BadRecipe, ModelNotFound,
    CheckpointRefused, NotApplicable for what cannot be told without the weights or a prompt.

        >>> wb.cost("workbench-tiny", hardware="H100", context=2048).memory.kv
        8388608
    """
    import torch

    tokens = arguments.whole("context", context, 1, arguments.MOST_TOKENS)
    sequences = arguments.whole("batch", batch, 1)
    stated = None if dtype is None else arguments.choice("dtype", dtype, _DTYPES)
    held_as = None if kv_dtype is None else arguments.choice("kv_dtype", kv_dtype, _DTYPES)
    at_once = tokens if chunk is None else min(arguments.whole("chunk", chunk, 1), tokens)
    share = arguments.number("usable", usable, 0, 1, above=True)
    device = device_of(hardware)
    device.peak(stated or _DTYPES[0])
    chosen = Recipe.of(recipe, budget=budget)
    others = [method.key for method in chosen.methods if method.family == "attention"]
    if others:
        raise BadRecipe(f"{', '.join(others)}: what an attention method saves is not estimated; leave it out")

    config, name = config_of(model)
    own, cached = dtypes_of(model, config)
    precision = stated or (own if own in _DTYPES else _DTYPES[0])
    machine = Machine(device, arguments.whole("devices", devices, 1), precision)
    kv: torch.dtype = getattr(torch, held_as or (precision if stated or cached not in _DTYPES else cached))
    shape = architecture_of(config, name, getattr(torch, precision))
    if tokens > shape.facts.max_positions:
        raise BadParameter(f"context is {tokens:,}: {name} has {shape.facts.max_positions:,} positions")
    weight_methods = chosen.family("weights")
    weights = weights_under(weight_methods, blank(config, shape.dtype) if weight_methods else None, shape)
    cache = cache_under(chosen.family("kv"), chosen.budget, shape, tokens, kv)
    states = shape.state_nbytes(tokens)
    memory = Memory(
        weights=weights.nbytes,
        kv=sequences * cache.nbytes,
        states=sequences * states,
        activations=activation_nbytes(shape, at_once, sequences) * machine.devices,
        step_activations=activation_nbytes(shape, 1, sequences) * machine.devices,
        reading_kv=sequences * max(cache.reading_nbytes, cache.nbytes),
        host=sequences * cache.host_nbytes,
        full_weights=weights.full_nbytes,
        full_kv=sequences * cache.full_nbytes,
    )
    decode = decode_terms(shape, weights, cache, states, machine, sequences)
    notes = [*weights.notes, *cache.notes]
    if precision not in machine.hardware.compute:
        notes.append(f"{machine.hardware.name} states no {precision} peak: it computes at its int8 peak here")
    return Cost(
        architecture=shape,
        recipe=chosen,
        machine=machine,
        context=tokens,
        batch=sequences,
        chunk=at_once,
        usable=share,
        memory=memory,
        sequence_nbytes=cache.nbytes + states,
        prefill=prefill_terms(shape, weights, machine, sequences, tokens, at_once),
        decode=decode,
        weights=weights,
        cache=cache,
        notes=tuple(notes),
        measured=_measured(shape, chosen, machine, tokens, sequences, seconds(decode)),
    )


def _measured(
    shape: Architecture, recipe: Recipe, machine: Machine, tokens: int, sequences: int, estimated: float
) -> Beside | None:
    """A step that was timed under just these conditions, beside the estimate."""
    if sequences != 1 or machine.devices != 1 or machine.dtype != "bfloat16" or recipe.budget is not None:
        return None
    facts = shape.facts
    sizes = {
        "hidden_size": facts.hidden_size,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "vocab_size": facts.vocab_size,
    }
    for step in steps():
        same = Recipe.from_dict({"methods": list(step.recipe)}).methods == recipe.methods
        if same and step.on == machine.hardware.name and step.tokens == tokens and step.model == sizes:
            return Beside(step.us, estimated * 1e6 / step.us - 1, step.source)
    return None
