"""What a model's layers get for its cache where they ask for one: only what is here is ever asked for."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from benchmarks.model_kinds import tiny_of
from workbench.engine.standing import Standing, standing
from workbench.models import tiny

EXPANDS = "k = self.expand_kv(*past_key_values.update(k, v, self.layer_idx))\n"


@pytest.mark.parametrize(
    ("source", "gets"),
    [
        (EXPANDS, True),
        (
            EXPANDS + "past_key_values.update_indexer(k, self.layer_idx)\n",
            False,
        ),  # as DeepSeek-V3.2 of transformers 5.17
        ("past_key_values.update(k, v, self.layer_idx)\n", False),
    ],
)
def test_layers_that_expand_latents_get_one_unless_they_ask_it_for_more(
    source: str, gets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"layers_{abs(hash(source))}.py"
    path.write_text(f"def forward(self, k, v, past_key_values):\n    {source.replace(chr(10), chr(10) + '    ')}")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    monkeypatch.setitem(sys.modules, path.stem, module_from_spec(spec))
    model = tiny("llama")
    monkeypatch.setattr(type(model.get_decoder()), "__module__", path.stem)
    assert isinstance(standing(model, torch.arange(4), following=True), Standing) is gets


def test_a_pass_of_deepseek_has_one_and_of_llama_none() -> None:
    assert isinstance(standing(tiny_of("deepseek_v3"), torch.arange(4), following=True), Standing)
    assert standing(tiny("llama"), torch.arange(4), following=True) is None
