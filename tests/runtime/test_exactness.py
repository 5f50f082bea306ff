"""A model is exact or refused: masks are obeyed or refused, and what else differs from the model by itself is found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import COMMON, tiny_of
from workbench.engine.attention_hook import forward
from workbench.engine.masks import AnnouncedMask, Span, announced
from workbench.errors import ModelNotFound, NotApplicable
from workbench.models import UNLIMITED, facts, tiny
from workbench.runtime import exactness
from workbench.runtime.exactness import fingerprint, verify
from workbench_kernels import Scoring

IDS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_seals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No model has been looked at before."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return tmp_path


def made(config: str, model: str, **options: Any) -> PreTrainedModel:
    """A tiny random model of transformers, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: PreTrainedModel = getattr(transformers, model)(getattr(transformers, config)(**(COMMON | options)))
    return built.eval().requires_grad_(False)  # type: ignore[return-value]


def refusal(model: PreTrainedModel, tokens: int = 40) -> str:
    """In what words a model is refused when it is to read so many tokens."""
    with pytest.raises(NotApplicable) as caught:
        wb.Session((model, None)).read(IDS[:tokens])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_transformers(model: PreTrainedModel, tokens: int = 40, new: int = 8) -> wb.Session:
    """A session that has read and answered, one by one and after several tokens at once, as transformers does."""
    session = wb.Session((model, None), kv_dtype="float32")
    session.read(IDS[:tokens])
    for more in (0, 5):
        asked = IDS[: tokens + more]
        want: Any = model.generate(asked[None], max_new_tokens=new, do_sample=False)  # type: ignore[operator]
        run = session.run("full", question=asked[tokens:] if more else None, max_new_tokens=new)
        assert list(run.tokens) == want[0, asked.numel() :].tolist()
    return session


# -- masks


def causal(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv <= q


def sliding(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv <= q) & (kv > q - 7)


def chunks(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv <= q) & (kv // 7 == q // 7)


def ahead(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv <= q) | (kv < 5)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 40, 700])
def test_the_rule_of_a_mask_is_recognised_whatever_its_length(tokens: int) -> None:
    def span(rule: Any, local_size: int | None) -> Span:
        return announced(rule, tokens, tokens, local_size, torch.device("cpu"), check=True).span

    assert span(causal, None) == Span()
    assert span(sliding, 7) == Span(window=7)
    assert span(chunks, 7) == Span(chunk=7)  # also before a token stands beyond
    if tokens > 7:
        assert span(sliding, None) == Span(window=7)  # found, where the model does not say it
        assert span(chunks, 5).refusal == "attends in blocks"
    if tokens > 1:
        assert span(ahead, None).refusal == "attends to later tokens too"


def test_a_mask_can_be_handed_on_but_not_computed_with() -> None:
    for mode in (True, False):
        with torch.inference_mode(mode):
            mask = announced(sliding, 9, 9, 7, torch.device("cpu"), check=True)
            for same in (mask[..., :9], mask.to(torch.bool), mask.to(torch.float32), mask.to("cpu"), mask[:, :, -4:]):
                assert isinstance(same, AnnouncedMask) and same.span == Span(window=7)
    assert mask[:, :, -4:, :6].shape == (1, 1, 4, 6)
    for compute in (lambda: mask & mask, mask.any, lambda: torch.zeros(9, 9) + mask, lambda: mask[0, 0, 0]):
        with pytest.raises(NotApplicable, match="computes with its attention mask"):
            compute()


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    assert "attends to later tokens" in refusal(made("BertConfig", "BertLMHeadModel"))
    bidirectional = made("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=16, use_bidirectional_attention=True)
    assert "layer 0: Gemma3Attention attends to later tokens" in refusal(bidirectional)
    assert "attends to later tokens" in refusal(made("LlamaConfig", "LlamaForCausalLM", is_causal=False))


def test_a_model_that_makes_its_own_mask_of_the_causal_one_is_refused() -> None:
    assert "computes with its attention mask" in refusal(made("DogeConfig", "DogeForCausalLM", keep_window_size=8))


def test_a_window_is_taken_from_the_mask_not_from_what_the_layer_says() -> None:
    model = tiny("gemma3", window=16)
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 4  # what transformers itself looks at only for flash attention
    session = as_transformers(model)
    assert session.trace is not None
    assert [layer.window for layer in session.trace.layers] == [16, None, 16]


# -- what is beside masks


def test_states_that_modules_keep_by_themselves_are_refused() -> None:
    said = refusal(tiny_of("recurrent_gemma"))
    assert "layers 0, 1, 3 of recurrent_gemma keep their state somewhere else than in the model's cache" in said


def test_two_attentions_in_a_layer_are_refused() -> None:
    assert "layer 0 of diffllama attends more than once" in refusal(made("DiffLlamaConfig", "DiffLlamaForCausalLM"))


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Data2VecText"])
def test_positions_that_begin_elsewhere_are_found_by_reading(family: str) -> None:
    model = made(f"{family}Config", f"{family}ForCausalLM", is_decoder=True, pad_token_id=1)
    assert "reading gives other logits than the model itself" in refusal(model)


def test_positions_by_the_caches_length_are_found_by_decoding() -> None:
    options = {
        "d_model": 64,
        "decoder_layers": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 128,
        "encoder_layers": 1,
    }
    assert "decoding gives other logits" in refusal(made("BartConfig", "BartForCausalLM", **options))


def test_the_layer_where_a_difference_begins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", layers=4)
    third = model.model.layers[2]
    original = type(third).forward

    def looks_into_the_cache(self: nn.Module, hidden: Tensor, **given: Any) -> Tensor:
        out: Tensor = original(self, hidden, **given)
        return out + 1 if self is third and given.get("past_key_values") is not None else out

    monkeypatch.setattr(type(third), "forward", looks_into_the_cache)
    assert "first in layer 2" in refusal(model)


def test_a_bert_told_to_be_a_decoder_is_exact() -> None:
    as_transformers(made("BertConfig", "BertLMHeadModel", is_decoder=True))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("LlamaModel", "LlamaModel does not generate text"),
        ("LlamaForSequenceClassification", "does not generate text"),
        ("BertModel", "does not generate text"),
        ("T5ForConditionalGeneration", "is an encoder and a decoder"),
    ],
)
def test_what_is_no_decoder_with_a_language_head_is_refused_when_it_is_opened(model: str, said: str) -> None:
    config = f"{model.partition('For')[0].removesuffix('Model')}Config"
    own = {"d_model": 64, "d_ff": 64, "num_heads": 4} if config == "T5Config" else {}
    with pytest.raises(NotApplicable, match=said):
        wb.Session((made(config, model, **(own | {"pad_token_id": 0})), None))


def test_a_model_without_its_weights_is_refused_when_it_is_opened() -> None:
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    with pytest.raises(ModelNotFound, match="meta device"):
        wb.Session((empty, None))


def test_layers_that_do_not_hand_keywords_on_are_read() -> None:
    as_transformers(made("NemotronConfig", "NemotronForCausalLM"))
    as_transformers(made("StableLmConfig", "StableLmForCausalLM"))


def test_sizes_are_those_that_were_recorded() -> None:
    latent = made(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    assert as_transformers(latent).facts.head_dim == 16


def test_a_model_without_a_number_of_positions_opens() -> None:
    model = made("BloomConfig", "BloomForCausalLM")
    session = wb.Session((model, None))
    assert session.facts.max_positions == UNLIMITED and "up to" not in session.summary()
    assert "none of the layers of bloom uses transformers' attention interface" in refusal(model)


def test_attention_to_something_else_than_the_tokens_read_is_refused(tiny_llama: PreTrainedModel) -> None:
    attention = transformers.AttentionInterface()["workbench"] if _known() else None
    assert attention is not None
    layer = tiny_llama.model.layers[0].self_attn

    class Beside(nn.Module):
        layer_idx = 0

    class Handler:
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 7, 16)
            return attention(Beside(), q, k, k, None)[0]  # type: ignore[no-any-return]

    assert layer is not None
    with pytest.raises(NotApplicable, match="attends with 1 x 3 queries to 7 keys"):
        forward(tiny_llama, Handler(), IDS, torch.arange(IDS.numel()))


def _known() -> bool:
    forward(tiny("llama", layers=1), _Echo(), IDS[:2], torch.arange(2))
    return True


class _Echo:
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return query


# -- the check itself


def test_a_model_that_passed_is_not_looked_at_again(no_seals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    wb.Session((model, None)).read(IDS)
    assert [seal.name for seal in (no_seals / "exact").iterdir()] == [fingerprint(model)]
    monkeypatch.setattr(exactness, "_logits", lambda *given: pytest.fail("looked at again"))
    wb.Session((tiny("llama", seed=1), None)).read(IDS)  # other numbers in the same weights
    with pytest.raises(pytest.fail.Exception):
        wb.Session((tiny("qwen3"), None)).read(IDS)


def test_a_refused_model_is_refused_again_and_trust_goes_on() -> None:
    model = made("RobertaConfig", "RobertaForCausalLM", is_decoder=True, pad_token_id=1)
    assert refusal(model) == refusal(model)
    assert wb.Session((model, None), trust=True).read(IDS).tokens == IDS.numel()


def test_a_cache_that_cannot_be_written_only_forgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("WORKBENCH_CACHE", str(blocked / "below"))
    assert wb.Session((tiny("llama"), None)).read(IDS).tokens == IDS.numel()


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    assert "not finite" in refusal(model)
    with pytest.raises(NotApplicable, match="not finite"):
        wb.Session((model, None), trust=True).read(IDS)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3", "llama"])
def test_nothing_of_the_check_stays_on_the_model(architecture: str) -> None:
    model = tiny(architecture, window=24)
    before = (str(model.config), [sorted(vars(module)) for module in model.modules()])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    verify(model, facts(model))
    assert (str(model.config), [sorted(vars(module)) for module in model.modules()]) == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_the_check_passes_the_edge_of_a_window_however_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral", window=1000)
    widths = []
    original = exactness._logits

    def watching(*given: Any) -> Tensor:
        widths.append(model.config.sliding_window)
        return original(*given)

    monkeypatch.setattr(exactness, "_logits", watching)
    verify(model, facts(model))
    assert widths == [exactness._WINDOW] and model.config.sliding_window == 1000
    assert exactness._READ > exactness._WINDOW


def test_the_fingerprint_tells_models_apart_but_not_their_weights() -> None:
    plain = tiny("llama")
    assert fingerprint(plain) == fingerprint(tiny("llama", seed=1))
    assert fingerprint(plain) != fingerprint(tiny("llama", layers=2))
    assert fingerprint(plain) != fingerprint(tiny("llama").to(torch.bfloat16))  # type: ignore[arg-type]
    assert re.fullmatch(r"[0-9a-f]{32}", fingerprint(plain))
