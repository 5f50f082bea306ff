"""GGUF: a file is read whole, to the same logits and ids, or refused with what it is that would be lost."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.models.gguf_files import metadata, tensors, write, write_model
from workbench.errors import CheckpointRefused
from workbench.models import load, tiny
from workbench.models.gguf.header import read_header
from workbench.models.gguf.tokenizer import read_tokenizer

IDS = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
EXPERTS = {"num_experts_per_tok": 2}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LONG = {
    "rope_type": "longrope",
    "long_factor": [1.0 + 0.1 * index for index in range(8)],
    "short_factor": [1.0] * 8,
    "rope_theta": 1e4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **EXPERTS}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2moe": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, **EXPERTS},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, **EXPERTS}),
    "gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3-linear": (
        "Gemma3Text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 16}),
    "phi3-partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3-long": (
        "Phi3",
        {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_parameters": LONG},
    ),
}


def made(name: str) -> Any:
    import transformers

    kind, special = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **special})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases of ones and zeros would hide an offset
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_gguf_with_the_same_logits(name: str, tmp_path: Path) -> None:
    """On both sides of the length where a window slides and long factors take over."""
    model = made(name)
    again = load(write_model(tmp_path / "x.gguf", model), device="cpu").model
    assert type(again) is type(model)
    for length in (14, 90):
        torch.testing.assert_close(again(IDS[:, :length]).logits, model(IDS[:, :length]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_tensors_are_what_gguf_says_they_are(kind: str, tmp_path: Path) -> None:
    model, quantised = tiny("qwen3"), gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "x.gguf", "qwen3", metadata(model), tensors(model), kind=quantised)
    found = load(path, device="cpu").model.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").numpy()
    expected = gguf.dequantize(gguf.quantize(weight, quantised), quantised)
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_llama_3s_factors_are_applied(tmp_path: Path) -> None:
    """The file holds what each frequency is divided by, and not the parameters that it was made from."""
    import transformers

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 1 << 17, "rope_parameters": rope})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 7.9
    path = tmp_path / "x.gguf"
    held = {**tensors(model), "rope_freqs.weight": factors.astype(np.float32)}
    again = load(write(path, "llama", metadata(model), held), device="cpu").model
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    held["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
    with pytest.raises(CheckpointRefused, match="rope_freqs"):
        load(write(path, "llama", metadata(model), held))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3", "mixtral"])
def test_a_missing_tensor_is_named_and_never_made_up(name: str, tmp_path: Path) -> None:
    model = made(name)
    held, said = tensors(model), metadata(model)
    architecture = {"mixtral": "llama"}.get(name, name)
    for lost in [tensor for tensor in held if tensor.startswith("blk.1.")] + [
        "token_embd.weight",
        "output_norm.weight",
    ]:
        rest = {tensor: array for tensor, array in held.items() if tensor != lost}
        with pytest.raises(CheckpointRefused, match=lost.replace(".", r"\.")):
            load(write(tmp_path / "x.gguf", architecture, said, rest))


@pytest.mark.parametrize(
    "extra",
    [
        "blk.3.attn_q.weight",
        "blk.1.attn_q_norm.weight",
        "blk.0.attn_q.bias_2",
        "blk.0.attn_k.bias",
        "rope_factors_long.weight_2",
    ],
)
def test_an_unused_tensor_is_named_and_never_dropped(extra: str, tmp_path: Path) -> None:
    model = tiny("llama")
    held = {**tensors(model), extra: np.ones(64, np.float32)}
    with pytest.raises(CheckpointRefused, match=extra.replace(".", r"\.")):
        load(write(tmp_path / "x.gguf", "llama", metadata(model), held))


@pytest.mark.parametrize(
    ("said", "also"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, {}),
        ({"rope.scaling.type": "yarn"}, {}),
        ({"rope.scaling.attn_factor": 1.2}, {}),
        ({"rope.dimension_count": 8}, {}),
        ({"logit_scale": 0.5}, {}),
        ({"attn_logit_softcapping": 50.0}, {}),
        ({"attention.causal": False}, {}),
        ({"attention.value_length": 8}, {}),
        ({"attention.head_count_kv": [2, 2, 1]}, {}),
        ({"attention.head_count_kv": 4}, {}),
        ({"expert_count": 4}, {}),
        ({"vocab_size": 255}, {}),
        ({"feed_forward_length": 64}, {}),
        ({"block_count": 2}, {}),
        ({"block_count": 4}, {}),
        ({"block_count": 10**9}, {}),
        ({"embedding_length": 10**9}, {}),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, {}),
        ({}, {"general.type": "adapter"}),
        ({}, {"split.count": 2}),
        ({}, {"tokenizer.ggml.eos_token_id": 256}),
    ],
)
def test_metadata_that_makes_another_model_is_applied_or_refused(
    said: dict[str, Any], also: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny("llama")
    path = write(tmp_path / "x.gguf", "llama", {**metadata(model), **said}, tensors(model), also)
    with pytest.raises(CheckpointRefused) as caught:
        load(path, device="cpu")
    assert "\n" not in str(caught.value)


def test_notes_about_the_file_are_no_reason_to_refuse_it(tmp_path: Path) -> None:
    also = {"general.name": "x", "general.tags": ["a", "b"], "quantize.imatrix.file": "y", "someone.version": 3}
    assert load(write_model(tmp_path / "x.gguf", tiny("llama"), also), device="cpu").facts.layers == 3


def test_an_architecture_that_is_not_read_exactly_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"falcon.*qwen3"):
        load(write(tmp_path / "x.gguf", "falcon", {}, {"t": np.ones(32, np.float32)}))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    held = tensors(model)
    held["blk.1.ffn_up.weight"] = held["blk.1.ffn_up.weight"].copy()
    held["blk.1.ffn_up.weight"][3, 4] = np.nan
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.mlp\.up_proj"):
        load(write(tmp_path / "x.gguf", "llama", metadata(model), held))


def test_every_token_that_ends_an_answer_ends_it(tmp_path: Path) -> None:
    also = {f"tokenizer.ggml.{role}_token_id": index for role, index in (("eos", 3), ("eot", 5), ("eom", 3))}
    assert load(write_model(tmp_path / "x.gguf", tiny("llama"), also), device="cpu").facts.eos_ids == (3, 5)


# --- Tokenizers

AWKWARD = [
    " hi",
    "  hi",
    "hi  ",
    "   ",
    "a  b   c",
    "\n\nx\n",
    "\tx",
    "12345 a1b22",
    "DON'T don't I'LL i'll",
    "naïve 日本語 🙂 \u200b",
    "def f(x):\n    return x  # no\n",
    "====",
    "<|end|>x <|end|>",
]


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes, as its paper's code makes it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def byte_level(pre: str | None, **changes: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer whose merges run over digits, letters, spaces and newlines."""
    letters = bytes_to_letters()
    space, line = letters[32], letters[10]
    pairs = [("1", "2"), ("12", "3"), ("2", "2"), ("h", "i"), (space, "h"), (space, "hi"), (space, space), (line, line)]
    pairs += [("=", "="), ("==", "=="), ("'", "t"), ("'", "T"), ("O", "N"), ("D", "ON"), ("d", "o"), ("do", "n")]
    tokens = [*letters.values(), *(left + right for left, right in pairs), "<|end|>"]
    said = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 1) + [3],
        "merges": [f"{left} {right}" for left, right in pairs],
        "eos_token_id": len(tokens) - 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in said.items() if value is not None}


def tokenizer_of(also: dict[str, Any], path: Path, rows: int = 4096) -> Any:
    write(path, "llama", {}, {"t": np.ones(32, np.float32)}, also)
    return read_tokenizer(read_header(path), rows, 2048)


def words(pre: str) -> Any:
    """The pre-tokenizer that the family's own tokenizer.json has, written down here once more."""
    from tokenizers import Regex, pre_tokenizers

    level = pre_tokenizers.ByteLevel
    if pre == "gpt-2":
        return level(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)])
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[pre]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, level(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_text_is_cut_as_the_model_learnt_it(pre: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    also = byte_level(pre)
    found = tokenizer_of(also, tmp_path / "x.gguf")
    tokens = also["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in also["tokenizer.ggml.merges"]]
    plain = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    plain.pre_tokenizer = words(pre)
    plain.add_special_tokens(["<|end|>"])
    for text in AWKWARD:
        ids = found(text, add_special_tokens=False).input_ids
        assert ids == plain.encode(text).ids, text
        assert found.decode(ids) == text


def test_families_cut_the_same_text_differently(tmp_path: Path) -> None:
    cuts = {
        tuple(tokenizer_of(byte_level(pre), tmp_path / "x.gguf").tokenize("DON'T 123"))
        for pre in ("gpt-2", "smollm", "llama-bpe")
    }
    assert len(cuts) == 3


@pytest.mark.parametrize("pre", [None, "default", "made-up", "", 7])
def test_text_that_would_be_cut_by_guesswork_is_refused(pre: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="tokenizer"):
        tokenizer_of(byte_level(pre), tmp_path / "x.gguf")


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer with a token for each byte."""
    pieces = [
        "\u2581",
        "h",
        "i",
        "a",
        "b",
        "x",
        "=",
        "hi",
        "\u2581hi",
        "\u2581\u2581",
        "ab",
        "\u2581a",
        "==",
        "\u2581\u2581\u2581",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|end|>"]
    said = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))] + [0.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in said.items() if value is not None}


def greedy(also: dict[str, Any], text: str) -> list[str]:
    """SentencePiece's algorithm in a plain loop: join the neighbours that make the best token, the leftmost first."""
    scores = dict(zip(also["tokenizer.ggml.tokens"], also["tokenizer.ggml.scores"], strict=True))
    usable = {token for token, kind in zip(scores, also["tokenizer.ggml.token_type"], strict=True) if kind == 1}
    prefixed = also.get("tokenizer.ggml.add_space_prefix", True) and text
    parts = list(("\u2581" if prefixed else "") + text.replace(" ", "\u2581"))
    while True:
        joined = [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in usable]
        if not joined:
            break
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in usable else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_keeps_every_space_and_byte(prefix: bool, tmp_path: Path) -> None:
    also = sentencepiece(add_space_prefix=prefix)
    found = tokenizer_of(also, tmp_path / "x.gguf")
    for text in [text for text in AWKWARD if "<|end|>" not in text] + ["hi", " hi hi", "x   a ab  hi", ""]:
        ids = found(text, add_special_tokens=False).input_ids
        assert found.convert_ids_to_tokens(ids) == greedy(also, text), text
        assert found.decode(ids) == text


def test_what_stands_around_a_text_is_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"

    def around(also: dict[str, Any]) -> tuple[int, int]:
        ids = tokenizer_of(also, path)("x").input_ids
        return ids[0], ids[-1]

    assert around(sentencepiece())[0] == 1  # SentencePiece begins with bos where a file does not say
    assert around(sentencepiece(add_bos_token=False, add_eos_token=True))[1] == 2
    end = byte_level("gpt-2")["tokenizer.ggml.eos_token_id"]
    assert around(byte_level("gpt-2")) == around(byte_level("gpt-2", add_bos_token=False))
    assert around(byte_level("gpt-2", add_eos_token=True))[1] == end
    assert around(byte_level("llama-bpe", bos_token_id=end))[0] == end


def test_a_tokenizer_from_gguf_can_be_saved_again(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for number, also in enumerate((sentencepiece(), byte_level("qwen2"), byte_level("gpt-2", add_eos_token=True))):
        also["tokenizer.chat_template"] = "{{ messages[0].content }}"
        one = tokenizer_of(also, tmp_path / "x.gguf")
        one.save_pretrained(tmp_path / str(number))
        two = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert [two(text).input_ids for text in AWKWARD] == [one(text).input_ids for text in AWKWARD]
        assert two.chat_template == one.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "also",
    [
        sentencepiece(model="t5"),
        sentencepiece(model="bert"),
        sentencepiece(model=None),
        sentencepiece(scores=[0.0, 1.0]),
        sentencepiece(scores=None),
        sentencepiece(token_type=[1, 1]),
        sentencepiece(pre="made-up"),
        sentencepiece(tokens=["a", "a"], scores=[0.0, 0.0], token_type=[1, 1]),
        sentencepiece(bos_token_id=10**6),
        sentencepiece(remove_extra_whitespaces=True),
        sentencepiece(precompiled_charsmap=[1, 2]),
        sentencepiece(unheard_of=1),
        byte_level("gpt-2", merges=["h i", "no such"]),
        byte_level("gpt-2", merges=["hi"]),
        byte_level("gpt-2", merges=None),
        byte_level("gpt-2", add_space_prefix=True),
        byte_level("gpt-2", add_bos_token=1),
    ],
)
def test_a_tokenizer_whose_ids_would_not_be_the_models_is_refused(also: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="tokenizer") as caught:
        tokenizer_of(also, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows_of_embedding_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")  # 256 rows
    with pytest.raises(CheckpointRefused, match="256 rows"):
        load(write_model(tmp_path / "x.gguf", model, byte_level("gpt-2", eos_token_id=None)))


def test_control_tokens_keep_their_ids_and_words_do_not_become_them(tmp_path: Path) -> None:
    also = byte_level("gpt-2", token_type=None)
    also["tokenizer.ggml.token_type"] = [1] * (len(also["tokenizer.ggml.tokens"]) - 1) + [4]
    del also["tokenizer.ggml.eos_token_id"]
    defined = tokenizer_of(also, tmp_path / "x.gguf")
    index = len(also["tokenizer.ggml.tokens"]) - 1
    assert defined("<|end|>").input_ids == [index]
    assert index not in defined.all_special_ids
    control = tokenizer_of(byte_level("gpt-2"), tmp_path / "x.gguf")
    assert control("a<|end|>b").input_ids[1] == index
    assert control.decode([index], skip_special_tokens=True) == ""
    assert json.loads(control.backend_tokenizer.to_str())["added_tokens"][0]["id"] == index
