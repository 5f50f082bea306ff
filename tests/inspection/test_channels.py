"""Channel tables: keys, values, activations and weights, one row a channel."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.errors import BadParameter, Cancelled, NotRead
from workbench.inspection.channels import channel_table
from workbench.models import tiny
from workbench.progress import Progress

IDS = torch.arange(40) * 7 % 256


@pytest.fixture(scope="module")
def session() -> wb.Session:
    session = wb.Session((tiny("llama"), None))
    session.read(IDS)
    return session


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_every_channel_of_every_kv_head_has_one_row_with_the_figures_of_its_tensor(
    session: wb.Session, kind: str
) -> None:
    table = channel_table(kind, session.model, session.trace)
    assert list(table.columns) == ["layer", "head", "channel", "absmax", "kurtosis", "energy"]
    assert len(table) == 3 * 2 * 16
    assert session.trace is not None
    layer = session.trace.layers[2]
    held = (layer.keys if kind == "keys" else layer.values)[1, :, 5]  # [n]
    row = table.query("layer == 2 and head == 1 and channel == 5").iloc[0]
    assert row.absmax == pytest.approx(held.abs().max().item())
    assert table.groupby(["layer", "head"]).energy.sum().tolist() == pytest.approx([1] * 6, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "mixtral"])
def test_activations_are_the_hidden_states_that_enter_each_layer(architecture: str) -> None:
    session = wb.Session((tiny(architecture), None))
    session.read(IDS)
    table = channel_table("activations", session.model, session.trace)
    with torch.inference_mode():
        states = session.model(IDS[None], output_hidden_states=True).hidden_states
    for index in range(3):
        found = torch.tensor(table.query("layer == @index").absmax.to_numpy())
        torch.testing.assert_close(found, states[index][0].abs().amax(0), atol=1e-4, rtol=1e-4)


def test_activations_are_computed_once_for_a_trace_and_leave_no_hook_behind(session: wb.Session) -> None:
    before = session.model.config._attn_implementation
    first = channel_table("activations", session.model, session.trace)
    stages: list[str] = []
    again = channel_table("activations", session.model, session.trace, Progress(lambda stage, *_: stages.append(stage)))
    assert stages == [] and first.equals(again)
    assert not any(module._forward_pre_hooks for module in session.model.modules())
    assert session.model.config._attn_implementation == before


def test_a_table_handed_out_may_be_changed_without_harming_the_next(session: wb.Session) -> None:
    table = channel_table("keys", session.model, session.trace)
    table["absmax"] = 0.0
    assert (channel_table("keys", session.model, session.trace).absmax > 0).all()


def test_weights_have_a_row_for_each_input_channel_of_each_linear(session: wb.Session) -> None:
    table = channel_table("weights", session.model)
    linears = {n: m for n, m in session.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(table) == sum(module.in_features for module in linears.values())
    down = linears["model.layers.1.mlp.down_proj"].weight
    found = table[(table.layer == 1) & (table.module == "mlp.down_proj")]
    assert found.absmax.tolist() == pytest.approx(down.abs().amax(0).tolist())
    assert table[table.module == "lm_head"].layer.isna().all()
    assert str(table.module.dtype) == "category" and str(table.layer.dtype) == "Int16"


def test_unknown_kinds_missing_prompts_and_cancelling_are_said_clearly(session: wb.Session) -> None:
    with pytest.raises(BadParameter, match="keys, values, activations, weights"):
        channel_table("queries", session.model, session.trace)
    with pytest.raises(NotRead, match="read"):
        channel_table("keys", session.model)
    fresh = wb.Session((tiny("llama"), None))
    progress = Progress(lambda stage, done, total: progress.cancel() if done == 1 else None)
    trace = fresh.read(IDS)
    with pytest.raises(Cancelled):
        channel_table("activations", fresh.model, trace, progress)
    assert not any(module._forward_pre_hooks for module in fresh.model.modules())
