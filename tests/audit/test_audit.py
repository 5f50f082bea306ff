"""The audit of a model tells what reading and compressing it do, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import CLIPConfig, MistralConfig, PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import tiny_of
from workbench.errors import BadParameter, ModelNotFound, NotApplicable
from workbench.models.findings import ranges


def fates(audit: wb.models.Audit) -> list[tuple[str, str, str]]:
    """Of each layer what it is, what becomes of it, and the reason."""
    return [(finding.kind, finding.standing, finding.why) for finding in audit.of("attention")]


def test_it_says_what_a_reading_leaves_exact(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    session = wb.Session((tiny_model("gemma3"), None))  # slides in the layers 0 and 2
    audit = wb.models.audit(session)
    trace = session.read(list(range(3, 43)))
    assert audit.exact is True and audit.why == ""
    assert [finding.layers for finding in audit.of("attention")] == [(0,), (1,), (2,)]
    for layer, finding in zip(trace.layers, audit.of("attention"), strict=True):
        assert finding.why == trace.exact.get(layer.index, "")
        assert finding.standing == ("exact" if layer.index in trace.exact else "compressible")
        assert (finding.heads, finding.kv_heads) == (layer.heads, layer.kv_heads)
        assert (finding.key_size, finding.value_size) == (layer.keys.shape[-1], layer.values.shape[-1])
    assert [kind for kind, _, _ in fates(audit)] == ["sliding window of 16", "full attention", "sliding window of 16"]


def test_weights_are_told_as_the_method_finds_them(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("qwen3-moe")
    audit = wb.models.audit((model, None), weights="rtn")
    left = wb.method("rtn").left_alone(model)  # type: ignore[attr-defined]
    said = {(finding.module, finding.why) for finding in audit.of("weights") if finding.standing == "exact"}
    assert {why for _, why in said} == set(left.values())
    assert ("mlp.experts.gate_up_proj", left["model.layers.0.mlp.experts.gate_up_proj"]) in said
    taken = {finding.module: finding for finding in audit.of("weights") if finding.standing == "compressible"}
    assert set(taken) == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert taken["self_attn.q_proj"].layers == (0, 1, 2)
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    assert sum(finding.numbers or 0 for finding in audit.of("weights")) == sum(weight.numel() for weight in matrices)


def test_a_model_that_is_refused_is_audited_with_the_reason() -> None:
    model = tiny_of("bert")
    audit = wb.models.audit((model, None))
    with pytest.raises(NotApplicable) as refusal:
        wb.Session((model, None)).read([5, 6, 7])
    assert audit.exact is False and audit.why == str(refusal.value) and "\n" not in audit.why
    assert set(fates(audit)) == {("full attention", "refused", audit.why)}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma3n_text", "shares the KV of layer 1"),
        ("deepseek_v3", "full attention, MLA, latent 32 + 8"),
        ("lfm2_moe", "convolution"),
    ],
)
def test_each_kind_of_layer_has_its_word(kind: str, said: str) -> None:
    assert said in {kind for kind, _, _ in fates(wb.models.audit((tiny_of(kind), None)))}


def test_a_config_is_audited_without_weights() -> None:
    audit = wb.models.audit(MistralConfig(num_hidden_layers=2, sliding_window=100))
    assert audit.exact is None
    assert fates(audit) == [("sliding window of 100", "unchecked", audit.why)] * 2
    assert len(wb.models.audit("mistral").of("attention")) == MistralConfig().num_hidden_layers
    projections = {finding.module: finding for finding in audit.of("weights")}
    assert projections["mlp.down_proj"].numbers == 2 * 4096 * 14336


def test_layers_that_are_alike_are_folded() -> None:
    audit = wb.models.audit(MistralConfig(num_hidden_layers=5, sliding_window=None))
    (attention,) = [finding for finding in audit.folded() if finding.part == "attention"]
    assert attention.layers == (0, 1, 2, 3, 4) and attention.row()["layers"] == "0-4"
    frame = audit.frame()
    assert list(frame[frame.part == "attention"]["layers"]) == ["0", "1", "2", "3", "4"]
    assert len(frame) == len(audit) == len(list(audit))
    assert ranges([7, 1, 2, 3]) == "1-3, 7"


def test_what_cannot_be_audited_is_said_in_one_line(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ModelNotFound, match=r"^no model 'nothing-of-the-kind'"):
        wb.models.audit("nothing-of-the-kind")
    with pytest.raises(NotApplicable, match=r"^clip: transformers has no causal language model of this kind$"):
        wb.models.audit(CLIPConfig())
    with pytest.raises(BadParameter, match="changes no weights"):
        wb.models.audit((tiny_llama, None), weights="snapkv")
