"""Kept-token sets agree with those of an independent implementation, recorded in files.

The files in `data` hold what kvpress 0.5.5 kept (transformers 5.2, float32, SDPA, one prefill): the prompt's ids, for
each case `<method>@<share>` its parameters, and the kept positions as bits [l, k, n / 8]; the tiny model's weights too.
Compactor's random sketch was seeded as ours is, layer by layer, and its chunks divide what is chosen from: the last
chunk of the reference attends to its own padding.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from workbench.kv.base import KVMethod, Study
from workbench.kv.plan import rank
from workbench.models import cached, facts, load
from workbench.prompt import Prompt
from workbench.registry import method
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read

if TYPE_CHECKING:
    from workbench.trace import Trace

TINY = Path(__file__).parent / "data" / "tiny-llama.safetensors"
DEFAULT = TINY.with_name("smollm2-135m.safetensors")
THEIRS: dict[str, dict[str, Any]] = {  # what the reference has no parameter for, and does in its own way
    "pyramidkv": {"pooling": "avg"},
    "adakv": {"pooling": "avg", "floor": "least"},
    "expected-attention": {"heads": "equal"},
}
AGREEMENT = 0.995  # near-ties may fall differently with other kernels


@cache
def golden(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The cases' parameters, and all tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


CASES = sorted(golden(TINY)[0])
EVEN = [case for case in CASES if not case.startswith(("pyramidkv", "lagkv", "adakv"))]


@cache
def model_of(path: Path) -> PreTrainedModel:
    tensors = golden(path)[1]
    if path == TINY:
        with safe_open(path, "pt") as file:
            config = LlamaConfig(**json.loads(file.metadata()["config"]))
        model = LlamaForCausalLM(config).eval()
        weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}  # tied
        return model
    return load("smollm2-135m").model


@cache
def trace_of(path: Path) -> Trace:
    model = model_of(path)
    return read(model, facts(model), Prompt(golden(path)[1]["ids"].long(), chat=False))


@pytest.fixture(params=[pytest.param(TINY, id="tiny"), pytest.param(DEFAULT, id="smollm2", marks=pytest.mark.model)])
def path(request: pytest.FixtureRequest) -> Path:
    if request.param == DEFAULT and not cached("smollm2-135m"):
        pytest.skip("the default model is not in the cache: run `workbench models fetch smollm2-135m`")
    return request.param


def recorded(path: Path, case: str) -> Tensor:
    """What each layer of a case keeps, bool [l, k, n]."""
    tensors = golden(path)[1]
    bits = np.unpackbits(tensors[f"kept/{case}"].numpy(), axis=-1, count=tensors["ids"].numel())
    return torch.from_numpy(bits).bool()


def described(path: Path, case: str) -> KVMethod:
    """Our method with the case's parameters."""
    parameters = dict(golden(path)[0][case])
    key = case.split("@", maxsplit=1)[0]
    if key == "adakv-snapkv":
        key, parameters["safeguard"] = "adakv", parameters.pop("alpha")
    found = method(key, **THEIRS.get(key, {}), **parameters)
    assert isinstance(found, KVMethod)
    return found


def agreement(ours: Tensor, theirs: Tensor) -> float:
    assert ours.sum() == theirs.sum()
    return float((ours & theirs).sum() / theirs.sum())


@pytest.mark.parametrize("case", EVEN)
def test_the_kept_tokens_are_those_of_the_reference(path: Path, case: str) -> None:
    theirs = recorded(path, case)
    asked = described(path, case).with_budget(f"{int(theirs[0][0].sum())} tokens")
    plan = make_plan(trace_of(path), [asked], torch.float32, model=model_of(path))
    for layer, mask in enumerate(theirs):
        assert agreement(plan.tiers[layer] == 1, mask) >= AGREEMENT, f"layer {layer}"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("adakv")])
def test_the_kept_tokens_of_every_head_are_those_of_the_reference(path: Path, case: str) -> None:
    theirs = recorded(path, case)
    heads = theirs.shape[1]
    asked = described(path, case).with_budget(f"{int(theirs[0].sum()) // heads} tokens")
    plan = make_plan(trace_of(path), [asked], torch.float32)
    for layer, mask in enumerate(theirs):
        assert agreement(plan.tiers[layer] == 1, mask) >= AGREEMENT, f"layer {layer}"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("pyramidkv")])
def test_the_kept_tokens_are_those_of_the_reference_at_its_own_layer_sizes(path: Path, case: str) -> None:
    # The reference rounds the pyramid differently and falls back to equal layers: only the ranking is compared.
    theirs = recorded(path, case)
    ranking = rank(Study(trace_of(path)), described(path, case))
    ours = ranking.selected(theirs.sum(dim=-1))
    for layer, mask in enumerate(theirs):
        assert agreement(ours[layer], mask) >= AGREEMENT, f"layer {layer}"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("lagkv")])
def test_the_kept_tokens_are_those_of_the_reference_up_to_its_ties(path: Path, case: str) -> None:
    # The reference scores by the place within a stretch, equal in all stretches, and sinks and tail alike: among
    # entries that tie with the last one kept, its choice is its sorting routine's.
    theirs = recorded(path, case)
    ranking = rank(Study(trace_of(path)), described(path, case))
    ours = ranking.selected(theirs.sum(dim=-1))
    score = ranking.scores.clamp_max(0)  # [l, k, n]: sinks and tail alike
    for layer, mask in enumerate(theirs):
        last = score[layer].masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
        tied = score[layer] == last
        assert (
            agreement(ours[layer] & ~tied, mask & ~tied) >= AGREEMENT
            if bool((mask & ~tied).any())
            else tied[mask].all()
        )
        assert torch.equal((ours[layer] & tied).sum(dim=1), (mask & tied).sum(dim=1)), f"layer {layer}"
