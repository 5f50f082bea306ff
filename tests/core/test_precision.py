"""Numbers that no longer fit where they are to be held are named, never infinite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import workbench as wb
from workbench.core.precision import checked, half, sixteen
from workbench.errors import MissingExtra, OutOfRange
from workbench.kv import KIVI, MiKV, Mustafar, SnapKV, TurboMind, ZipCache
from workbench.models import tiny
from workbench.registry import registered
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.variants import Variants

_LAYER = "model.layers.0.mlp.down_proj"
_IDS = torch.arange(64)
_SHORT: dict[str, dict[str, Any]] = {
    "evopress": {"generations": 1, "offspring": 2},
    "ziplm": {"starts": 2, "patience": 1},
}


def test_a_cast_names_the_largest_number_and_where_the_form_ends() -> None:
    fits = torch.tensor([1.0, -65504.0])
    assert torch.equal(half(fits, "scales"), fits.half()) and checked(fits, torch.float32, "scales") is fits
    with pytest.raises(OutOfRange, match=r"^scales reach 7e\+04, and float16 ends at 65,504$"):
        half(torch.tensor([1.0, -7e4]), "scales")
    with pytest.raises(OutOfRange, match="scales hold what is not a number"):
        half(torch.tensor([1.0, torch.nan]), "scales")
    large = torch.tensor([7e4], dtype=torch.bfloat16)
    assert torch.equal(sixteen(large, "weights"), large)
    with pytest.raises(OutOfRange):
        sixteen(large.float(), "weights")


@pytest.mark.parametrize("kind", ["one", "row", "all"])
def test_every_weight_method_holds_a_large_weight_or_names_layer_and_value(kind: str) -> None:
    refused, messages = set(), list[str]()
    for cls in registered("weights"):
        model: Any = tiny("llama", layers=2)
        weight = model.get_submodule(_LAYER).weight.data
        if kind == "all":
            weight.mul_(1e6 / weight.abs().max())
        else:
            weight[(3, 5) if kind == "one" else 3] = 7e4
        settings: dict[str, Any] = _SHORT.get(cls.key, {})
        try:
            twin = Variants(model, None, Calibration(SAMPLED, samples=2, tokens=16)).get((cls(**settings),))
        except OutOfRange as failure:
            refused.add(cls.key)
            messages.append(str(failure))
            continue
        except MissingExtra:  # a library that is optional
            refused.add(cls.key)
            continue
        with torch.no_grad():
            assert twin(_IDS[None]).logits.isfinite().all(), cls.key
    assert all(f", {_LAYER}" in message and "float16 ends at 65,504" in message for message in messages), messages
    wanted = {"one": {"easyquant"}, "row": {"hqq", "pb-llm", "vptq", "easyquant", "owq"}, "all": {"rtn", "gptq"}}
    assert wanted[kind] <= refused


@pytest.mark.parametrize(("side", "kv_dtype"), [("v", "bfloat16"), ("k", "bfloat16"), ("v", "float16")])
def test_every_cache_method_holds_large_entries_or_says_that_it_cannot(side: str, kv_dtype: str) -> None:
    model: Any = tiny("llama", layers=2)
    attention = model.model.layers[0].self_attn
    taken, given = (attention.v_proj, attention.o_proj) if side == "v" else (attention.k_proj, attention.q_proj)
    taken.weight.data.mul_(1e5)
    given.weight.data.div_(1e5)
    session = wb.Session((model, None), kv_dtype=kv_dtype)
    session.read(_IDS)
    refused, messages = set(), list[str]()
    recipes = [SnapKV(), KIVI(residual=32), KIVI(residual=128), ZipCache(), MiKV(), TurboMind(), Mustafar()]
    for recipe in recipes:
        try:
            quality = session.run(recipe, max_new_tokens=70).quality
        except OutOfRange as failure:
            messages.append(str(failure))
            refused.add((recipe.key, getattr(recipe, "residual", None)))
            continue
        assert quality is not None and quality.kl == quality.kl
    assert all("float16" in message and "\n" not in message for message in messages), messages
    assert {("kivi", 32), ("kivi", 128)} <= refused  # when it is built, and when what is decoded leaves the tail
    assert (("snapkv", None) in refused) == (kv_dtype == "float16")


def test_ordinary_entries_are_held_as_they_were() -> None:
    session = wb.Session((tiny("llama", layers=1), None), kv_dtype="float16")
    session.read(_IDS)
    for key in ("snapkv", "kivi", "alisa", "mustafar"):
        assert session.run(key, max_new_tokens=3).quality is not None
