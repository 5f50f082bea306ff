"""The rotation of a layer is the model's own, whichever channels it pairs, and methods that undo it undo that."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import workbench as wb
from tests.readings import session_on
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.errors import BudgetTooSmall, NoRotation, NotApplicable
from workbench.kv.stores.low_rank import rotary_of, spaces_of
from workbench.models import facts, rotary, rotation_of, tiny
from workbench.models.rotary import switch, switch_notes
from workbench.prompt import Prompt
from workbench.registry import find
from workbench.runtime.prefill import read
from workbench_kernels import Scoring

TOKENS = 40
IDS = torch.randperm(256, generator=torch.Generator().manual_seed(0))  # none twice: equal keys would tie
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], "original_max_position_embeddings": 48,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# name -> (family, what differs from the common shape, whether channels are paired otherwise than as halves from the
# first on, how many are turned at each layer)
KINDS: dict[str, tuple[str, dict[str, Any], bool, tuple[int, ...]]] = {
    "halves": ("Llama", {"head_dim": 16}, False, (16,) * 4),
    "halves, stretched": ("Llama", {"head_dim": 16, "rope_parameters": YARN}, False, (16,) * 4),
    "halves, two tables": ("Llama", {"head_dim": 16, "rope_parameters": LONG}, False, (16,) * 4),
    "halves of some": ("GPTNeoX", {"rope_parameters": PARTLY}, False, (8,) * 4),
    "halves of some, without groups": ("Phi", {"rope_parameters": PARTLY}, False, (8,) * 4),
    "halves, where it slides": ("Exaone4", {"sliding_window": 8, "sliding_window_pattern": 4}, False, (16, 16, 16, 0)),
    "halves, not everywhere": ("SmolLM3", {"no_rope_layers": [1, 1, 0, 1]}, False, (16, 16, 0, 16)),
    "halves, a table a kind": ("Gemma3", {"head_dim": 16, "sliding_window_pattern": 2}, False, (16,) * 4),
    "halves, in an encoder's place": (
        "ModernBertDecoder",
        dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        False,
        (16,) * 4,
    ),
    "backwards": ("NanoChat", {}, False, (16,) * 4),
    "pairs": ("Cohere", {}, True, (16,) * 4),
    "pairs, where it slides": ("Cohere2", {"sliding_window": 8, "head_dim": 16}, True, (16, 16, 16, 0)),
    "pairs of angles in halves": ("Helium", {"head_dim": 16}, True, (16,) * 4),
    "pairs of some": ("Glm", {"head_dim": 16, "rope_parameters": PARTLY}, True, (8,) * 4),
    "pairs of some, from a buffer": ("GPTJ", {"rotary_dim": 8}, True, (8,) * 4),
    "complex numbers": (
        "Llama4",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 128, "attention_chunk_size": 4096},
        True,
        (16, 16, 16, 0),
    ),
    "last halves": ("DeepseekV3", {**MLA, **EXPERTS, "num_key_value_heads": 4}, True, (8,) * 4),
    "last complex numbers": ("DeepseekV2", {**MLA, **EXPERTS, "num_key_value_heads": 4}, True, (8,) * 4),
}
# Parameters that make a prompt of 90 tokens long.
METHODS: dict[str, dict[str, Any]] = {
    "a2ats": {"sinks": 2, "codes": 16, "distance": 64, "fetch": 0.2},
    "cskv": {"window": 8},
    "eigen-attention": {},
    "expected-attention": {"n_future_positions": 32},
    "fireq": {"bits": 4, "group": 16},
    "infllm": {"sinks": 2, "block": 4, "blocks": 4},
    "livevlm": {"sinks": 2, "window": 4, "recent": 8, "page": 4},
    "streammem": {"frame": 8},
}


def built(family: str, **options: Any) -> Any:
    """A random model of 4 layers, hidden size 64, 4 heads of 16."""
    shape = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": None, **options,
    }  # fmt: skip
    text = f"{family}TextConfig"
    config_class = getattr(transformers, text if hasattr(transformers, text) else f"{family}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config_class(**shape)).eval().requires_grad_(False)


@cache
def model_of(kind: str) -> Any:
    family, options, *_ = KINDS[kind]
    return built(family, **options)


class Recorded:
    """Exact attention over one pass, or given outputs in its place; queries and keys are kept."""

    def __init__(self, outputs: dict[int, Tensor] | None = None) -> None:
        self.given, self.outputs = outputs, dict[int, Tensor]()
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.seen[layer] = query, key
        out = self.given[layer] if self.given else causal_attention(query, key, value, scoring)
        self.outputs[layer] = out
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_keys_turned_back_are_those_of_position_zero(kind: str) -> None:
    """The model itself is the judge: the same pass with every token at position 0, where nothing is turned."""
    model, (_, _, reordered, widths) = model_of(kind), KINDS[kind]
    there, positions = Recorded(), torch.arange(TOKENS)
    forward(model, there, IDS[:TOKENS], positions)
    at_zero = Recorded(there.outputs)
    forward(model, at_zero, IDS[:TOKENS], torch.zeros_like(positions))
    for layer, width in enumerate(widths):
        found = rotation_of(model, layer, TOKENS)
        assert found.width == width
        assert (found.order is not None) == (reordered and width > 0)
        for turned, plain in zip(there.seen[layer], at_zero.seen[layer], strict=True):
            torch.testing.assert_close(found.turned_back(turned, positions), plain, atol=1e-4, rtol=1e-4)
            bare = found.undo(plain, torch.zeros_like(positions))  # without the factor of YaRN
            torch.testing.assert_close(found.undo(turned, positions), bare, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.apply(bare, positions), turned, atol=1e-4, rtol=1e-4)
        if width:
            assert (there.seen[layer][1] - at_zero.seen[layer][1]).abs().max() > 0.1


def test_half_precision_and_a_few_large_channels_do_not_hide_the_rotation() -> None:
    # Biases of keys in Qwen2 are hundreds of times larger than all else.
    model = built("Qwen2").bfloat16()
    for block in model.model.layers:
        block.self_attn.k_proj.bias.normal_(0, 0.1)[[7, 15, 23]] = 300.0
    assert [rotation_of(model, layer).width for layer in range(4)] == [16] * 4
    assert rotation_of(model, 0).order is None


def test_a_rotation_that_is_not_known_is_refused_in_one_line_that_names_model_and_layer() -> None:
    # Hunyuan normalises after it has rotated: once the weights of a pair differ, nothing can be turned back.
    model = built("HunYuanDenseV1", head_dim=16)
    model.model.layers[2].self_attn.key_layernorm.weight[:8] = 3.0
    assert rotation_of(model, 1).width == 16
    with pytest.raises(NotApplicable, match=r"layer 2 of HunYuanDenseV1.*methods that rotate keys") as raised:
        rotation_of(model, 2)
    assert not isinstance(raised.value, NoRotation) and "\n" not in str(raised.value)
    layer = read(model, facts(model), Prompt(IDS[:TOKENS], chat=False)).layers[2]
    with pytest.raises(NotApplicable, match="layer 2"):
        spaces_of(layer)


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_learned_positions_are_no_rotation(family: str) -> None:
    shape = {"ffn_dim": 64, "word_embed_proj_dim": 64} if family == "OPT" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=None,
        max_position_embeddings=30,
        bos_token_id=None, eos_token_id=None, **shape,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer = read(model, facts(model), Prompt(IDS[:30], chat=False)).layers[1]
    with pytest.raises(NoRotation, match=f"{family}.*methods that rotate keys"):
        layer.unrotated_queries()
    assert rotary_of(layer) is None and spaces_of(layer).rotary is None


def test_a_table_that_ends_turns_on_behind_its_end() -> None:
    ends, goes_on = (rotation_of(built("GPTJ", rotary_dim=8, max_position_embeddings=size), 0) for size in (40, 512))
    for some, more in zip(ends(torch.arange(300)), goes_on(torch.arange(300)), strict=True):
        torch.testing.assert_close(some, more, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"alibi": True, "ffn_hidden_size": 128}, {}], ids=["Falcon", "Bloom"])
def test_slopes_of_positions_are_no_rotation(options: dict[str, Any]) -> None:
    model = built("Falcon" if options else "Bloom", **options)
    with pytest.raises(NoRotation, match="methods that rotate keys"):
        rotation_of(model, 1)


def test_a_layer_that_does_not_rotate_is_found_and_has_no_table() -> None:
    model = model_of("halves, not everywhere")
    with pytest.raises(NoRotation, match="layer 2 of SmolLM3ForCausalLM"):
        rotary(model, 2, torch.arange(3))
    layer = read(model, facts(model), Prompt(IDS[:TOKENS], chat=False)).layers[2]
    assert torch.equal(layer.unrotated_queries(), layer.queries) and rotary_of(layer) is None


def test_what_was_found_dies_with_the_model() -> None:
    model = built("Llama")
    rotation_of(model, 0)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- Methods


def session_of(model: Any, tokens: int = 90) -> wb.Session:
    return session_on(model, IDS[:tokens], kv_dtype="float32")


@cache
def twins() -> tuple[wb.Session, wb.Session]:
    """The same function as two models: one pairs channels as halves, one as neighbours."""
    halves = tiny("llama", layers=2)
    pairs = built(
        "Helium", num_hidden_layers=2, head_dim=16, rms_norm_eps=halves.config.rms_norm_eps,
        rope_parameters=halves.config.rope_parameters,
    )  # fmt: skip
    neighbours = torch.arange(16).view(2, 8).T.flatten()  # 0, 8, 1, 9, ...
    held = {
        name: weight.unflatten(0, (-1, 16))[:, neighbours].flatten(0, 1)
        if "q_proj" in name or "k_proj" in name
        else weight
        for name, weight in halves.state_dict().items()
    }
    pairs.load_state_dict(held)
    torch.testing.assert_close(pairs(IDS[None, :90]).logits, halves(IDS[None, :90]).logits, atol=1e-4, rtol=1e-4)
    return session_of(halves), session_of(pairs)


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_the_same_whichever_channels_a_model_pairs(method: str) -> None:
    recipe = find(method)(budget=0.3 if method != "fireq" else None, **METHODS[method])
    runs = [session.run(recipe, question=IDS[100:106], max_new_tokens=8) for session in twins()]
    one, other = (run.quality for run in runs)
    assert runs[0].tokens == runs[1].tokens
    assert one.kl > 1e-3  # it was really compressed
    assert other.kl == pytest.approx(one.kl, rel=0.02)


EXACT_WHEN_WHOLE = [method for method in METHODS if method != "fireq"]
OTHERS = ["halves of some", "halves, not everywhere", "backwards", "pairs, where it slides", "pairs of some",
          "complex numbers", "last halves", "last complex numbers"]  # fmt: skip


@cache
def whole(kind: str) -> tuple[wb.Session, tuple[int, ...]]:
    session = session_of(model_of(kind))
    return session, session.run("full", max_new_tokens=6).tokens


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OTHERS)
def test_methods_run_on_every_convention_and_lose_nothing_where_all_is_kept(kind: str, method: str) -> None:
    session, want = whole(kind)
    if method != "fireq":
        assert session.run(find(method)(budget=1.0, **METHODS[method]), max_new_tokens=6).tokens == want
    else:
        quality = session.run(find(method)(bits=8, group=16), max_new_tokens=6).quality
        assert quality.kl < 0.1
    small = find(method)(budget=None if method == "fireq" else 0.6, **METHODS[method])
    try:
        tokens = session.run(small, max_new_tokens=6).tokens
    except BudgetTooSmall as refusal:  # of latent rows, where keys and values of all heads are needed
        assert 0.6 < refusal.smallest <= 1
        tokens = session.run(small.with_budget(refusal.smallest), max_new_tokens=6).tokens
    assert len(tokens) == 6


# --- Tables that switch with length


def test_lengths_at_which_tables_switch_are_named() -> None:
    assert switch(model_of("halves, two tables")) == 48
    assert switch(model_of("halves, stretched")) is None and switch(model_of("pairs")) is None
    grown = built("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    assert switch(grown) == 512
    early = built("Llama", rope_parameters={**LONG, "original_max_position_embeddings": 8})
    assert switch(early) == 8 and rotation_of(early, 0).width == 16
    model = model_of("halves, two tables")
    assert switch_notes(model, 40, 48) == switch_notes(model, 49, 90) == ()
    (note,) = switch_notes(model, 40, 49)
    assert "48 tokens" in note and "\n" not in note


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_each_key_is_turned_back_by_the_table_it_was_turned_with(kind: str) -> None:
    """A prompt read at once below the switch, and tokens one by one beyond it."""
    grown = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = built("Llama", max_position_embeddings=48, rope_parameters=LONG if kind == "longrope" else grown)
    before = model.model.rotary_emb.inv_freq.clone()
    spans = [(0, 44), *((at, at + 1) for at in range(44, 56))]
    for layer in range(2):
        found = rotation_of(model, layer, 44)
        turned, plain = [], []
        for start, end in spans:
            there = Recorded()
            forward(model, there, IDS[start:end], torch.arange(start, end))
            at_zero = Recorded(there.outputs)
            forward(model, at_zero, IDS[start:end], torch.zeros(end - start, dtype=torch.long))
            turned.append(there.seen[layer][1])
            plain.append(at_zero.seen[layer][1])
        keys, want, everywhere = torch.cat(turned, dim=1), torch.cat(plain, dim=1), torch.arange(56)
        torch.testing.assert_close(found.turned_back(keys, everywhere), want, atol=1e-4, rtol=1e-4)
        part = torch.tensor([3, 43, 47, 48, 50])  # in any company
        torch.testing.assert_close(found.turned_back(keys[:, part], part), want[:, part], atol=1e-4, rtol=1e-4)
        wrong = rotation_of(model, layer, 56).turned_back(keys, everywhere)
        assert (wrong - want).abs().max() > 1e-2
        assert torch.equal(model.model.rotary_emb.inv_freq, before)  # the model's own state is left alone


def test_a_prompt_read_in_pieces_across_the_switch_says_so() -> None:
    session = wb.Session((model_of("halves, two tables"), None), kv_dtype="float32")
    session.read(IDS[:120])
    run = session.run(find("streaming-llm")(budget=0.5, positions="text"), max_new_tokens=2)
    assert not any("another table" in note for note in run.notes)  # read at once
    for method in ("infllm", "livevlm", "streammem"):
        with pytest.raises(NotApplicable, match=r"48 tokens.*pieces"):
            session.run(find(method)(budget=0.5), max_new_tokens=2)
    run = session.run(find("epicache")(budget=0.5, segment=16), max_new_tokens=2)
    assert any("another table beyond 48 tokens" in note for note in run.notes)


def test_a_run_across_the_switch_says_so() -> None:
    session = wb.Session((built("Phi3", rope_parameters=LONG, original_max_position_embeddings=48), None))
    session.read(IDS[:44])
    assert not session.run("full", max_new_tokens=4).notes
    (said,) = session.run("full", max_new_tokens=12).notes
    assert "another table beyond 48 tokens" in said
