"""Models older than transformers' attention interface read and decode exactly, and are left as they were."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

import workbench as wb
from tests.engine.test_attention_hook import Exact, state
from tests.runtime.test_exactness import as_transformers, made, no_seals  # noqa: F401  (nothing was found exact before)
from workbench.engine.attention_hook import engaged, forward
from workbench.errors import NotApplicable
from workbench.models import facts
from workbench.runtime.decode import Decoder
from workbench.runtime.exactness import verify

IDS = torch.arange(40) * 7 % 251
# name -> (class, what differs from the common shape, KV heads, window of each layer)
BART = {"d_model": 64, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
FALCON = {"ffn_hidden_size": 128, "parallel_attn": True}
KINDS: dict[str, tuple[str, dict[str, Any], int, tuple[int | None, ...]]] = {
    "gptj": ("GPTJ", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}, 4, (None,) * 4),
    "codegen": ("CodeGen", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}, 4, (None,) * 4),
    "gpt-neo": (
        "GPTNeo",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 9},
        4,
        (None, 9, None, 9),
    ),
    "gpt-neox japanese": ("GPTNeoXJapanese", {}, 4, (None,) * 4),
    "gpt": ("OpenAIGPT", {"n_embd": 64, "n_layer": 4, "n_head": 4}, 4, (None,) * 4),
    "bart": ("Bart", BART | {"forced_eos_token_id": None}, 4, (None,) * 4),
    "mvp": ("Mvp", BART | {"forced_eos_token_id": None}, 4, (None,) * 4),
    "trocr": ("TrOCR", BART, 4, (None,) * 4),
    "xglm": ("XGLM", {"d_model": 64, "num_layers": 4, "attention_heads": 4, "ffn_dim": 128}, 4, (None,) * 4),
    "bloom": ("Bloom", {"n_head": 4}, 4, (None,) * 4),
    "bloom, six heads": ("Bloom", {"hidden_size": 96, "num_attention_heads": 6}, 6, (None,) * 4),
    "mpt": ("Mpt", {}, 4, (None,) * 4),
    "mpt, six heads": (
        "Mpt",
        {"hidden_size": 96, "num_attention_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}},
        6,
        (None,) * 4,
    ),
    "falcon, one KV head": ("Falcon", FALCON, 1, (None,) * 4),
    "falcon, groups": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, 2, (None,) * 4),
    "falcon, one norm": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        2,
        (None,) * 4,
    ),
    "falcon, alibi": ("Falcon", FALCON | {"alibi": True}, 1, (None,) * 4),
    "falcon, alibi in groups": (
        "Falcon",
        FALCON | {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
        2,
        (None,) * 4,
    ),
    "falcon, one after the other": (
        "Falcon",
        {"ffn_hidden_size": 128, "parallel_attn": False, "multi_query": False, "bias": True},
        4,
        (None,) * 4,
    ),
}


def model_of(kind: str) -> PreTrainedModel:
    family, options, *_ = KINDS[kind]
    head = "LMHeadModel" if family == "OpenAIGPT" else "ForCausalLM"
    return made(f"{family}Config", f"{family}{head}", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_and_decodes_as_transformers_does_and_holds_keys_once_a_kv_head(kind: str) -> None:  # trap 3
    model, (_, _, kv_heads, windows) = model_of(kind), KINDS[kind]
    session = as_transformers(model)
    assert [layer.keys_held.shape[0] for layer in session.trace.layers] == [kv_heads] * 4
    assert tuple(layer.window for layer in session.trace.layers) == windows
    plan = session.run("snapkv", budget=0.6, window=4, max_new_tokens=4).plan
    assert plan.nbytes <= 0.6 * plan.full_nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_gives_its_own_logits_and_leaves_no_trace(kind: str) -> None:  # trap 15
    model = model_of(kind)
    before = state(model)
    with torch.inference_mode():
        want = model(IDS[None]).logits[0]
    got = forward(model, Exact(), IDS, torch.arange(IDS.numel()), logits=IDS.numel())
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert state(model) == before
    with pytest.raises(RuntimeError, match="accident"):
        forward(model, Exact(fail_at=2), IDS, torch.arange(IDS.numel()))
    assert state(model) == before
    with engaged(model):  # a pass inside another: what stood there before it is what comes back
        forward(model, Exact(), IDS, torch.arange(IDS.numel()))
        again = forward(model, Exact(), IDS, torch.arange(IDS.numel()))
        torch.testing.assert_close(again, got[-1:], atol=1e-4, rtol=1e-4)
    assert state(model) == before


@pytest.mark.parametrize(
    "kind", ["bloom, six heads", "mpt", "mpt, six heads", "falcon, alibi", "falcon, alibi in groups"]
)
def test_positions_far_from_the_start_weigh_what_the_model_gives_them(kind: str) -> None:
    model = model_of(kind)
    ids = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = model(ids[None]).logits[0]
    session = wb.Session((model, None), kv_dtype="float32")
    session.read(ids[:680])
    close = partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)
    close(session.trace.logits, want[679])
    plan = session.plan("full")
    decoder = Decoder(model, plan.stores(), plan.position)
    close(decoder.feed(ids[680:], logits=20), want[680:])


@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_it_agrees_with_itself(kind: str) -> None:
    model = model_of(kind).bfloat16()
    verify(model, facts(model))
    session = wb.Session((model, None))
    session.read(IDS)
    assert session.trace.layers[0].keys_held.dtype == session.trace.layers[0].queries_held.dtype == torch.bfloat16
    assert session.run("kivi", bits=4, max_new_tokens=3).tokens


def test_what_is_exact_with_one_implementation_is_refused_with_another_that_computes_something_else() -> None:
    kind, options, *_ = KINDS["falcon, alibi"]
    wb.Session((made(f"{kind}Config", f"{kind}ForCausalLM", **options), None)).read(IDS)
    eager = made(f"{kind}Config", f"{kind}ForCausalLM", **options, attn_implementation="eager")  # it adds ALiBi twice
    with pytest.raises(NotApplicable, match="reading gives other logits than the model itself"):
        wb.Session((eager, None)).read(IDS)


def test_blooms_scores_are_not_rounded_in_16_bits() -> None:
    ids = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(0))
    low = model_of("bloom").bfloat16()
    with torch.inference_mode():
        want, own = model_of("bloom").bfloat16().float()(ids[None]).logits[0, 600:], low(ids[None]).logits[0, 600:]
    got = forward(low, Exact(), ids, torch.arange(700), logits=100)
    assert (got - want).norm() < 0.3 * (own.float() - want).norm()


def test_a_module_that_transformers_has_changed_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gptj")
    before = state(model)

    def other(self: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, sinks: Any = None) -> Any: ...

    monkeypatch.setattr(GPTJAttention, "_attn", other)
    with pytest.raises(NotApplicable, match="GPTJAttention of this version of transformers has a new argument sinks"):
        wb.Session((model, None)).read(IDS)
    monkeypatch.delattr(GPTJAttention, "_attn")
    with pytest.raises(NotApplicable, match="GPTJAttention of this version of transformers has no _attn"):
        wb.Session((model, None)).read(IDS)
    monkeypatch.undo()
    del model.transformer.h[3].attn.scale_attn
    with pytest.raises(NotApplicable, match="has no scale_attn"):
        wb.Session((model, None)).read(IDS)
    model.transformer.h[3].attn.scale_attn = 4.0
    assert state(model) == before
