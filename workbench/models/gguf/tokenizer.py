"""The tokenizer of a GGUF file: the ids that the model was trained with, or a refusal that says why not.

Two kinds are read: byte-level BPE ("gpt2"), where a name says how text is cut into words before anything is merged, and
SentencePiece's BPE ("llama"), where scores do instead of merges. What the keys mean is llama.cpp's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import CheckpointRefused
from workbench.models.gguf.header import Header

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # of ggml's token types
_SPACE = "\u2581"  # SentencePiece's word for a space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_QWEN_2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
_TEKKEN = _CASED.format(upper=_UPPER, lower=_LOWER, end="") + r"|\p{N}" + _REST
_GPT_4O = _CASED.format(upper=_UPPER, lower=_LOWER, end=_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _REST


@dataclass(frozen=True)
class _Cut:
    """How a byte-level tokenizer cuts text into words.

    split: a pattern of words, None for GPT-2's own. digits: every digit is a word. whole: a word that is a token is
    taken without merging. bos: whether a text begins with the bos token where the file does not say. nfc: whether text
    is composed first.
    """

    split: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_GPT_2, _DIGITS = _Cut(), _Cut(digits=True)
_CUTS = {
    "gpt-2": _GPT_2,
    "phi-2": _GPT_2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _Cut(_LLAMA_3, whole=True, bos=True),
    "llama3": _Cut(_LLAMA_3, whole=True, bos=True),
    "llama-v3": _Cut(_LLAMA_3, whole=True, bos=True),
    "dbrx": _Cut(_LLAMA_3),
    "smaug-bpe": _Cut(_LLAMA_3),
    "qwen2": _Cut(_QWEN_2, nfc=True),
    "tekken": _Cut(_TEKKEN, whole=True, bos=True),
    "gpt-4o": _Cut(_GPT_4O),
    "llama4": _Cut(_GPT_4O),
}

# Keys that change no id, or that are read below.
_ROLES = (
    *("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator", "mask", "cls"),
    *("prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
)
_READ = (
    *("model", "pre", "tokens", "scores", "token_type", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
)
_KNOWN = {
    *("tokenizer.huggingface.json", "tokenizer.chat_template", "tokenizer.chat_templates"),
    *(f"tokenizer.ggml.{role}_token_id" for role in _ROLES),
    *(f"tokenizer.ggml.{name}" for name in _READ),
}
# Keys that are harmless with one value only.
_IDLE = {
    "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "tokenizer.ggml.token_type_count": 0,
}


def read_tokenizer(header: Header, vocabulary: int, positions: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a GGUF file for a model with `vocabulary` rows of embedding; None where the file has none.

    Raises CheckpointRefused where its ids would not be the model's.
    """
    told = _Told(header)
    model = told.get("model")
    if model in (None, "none", "no_vocab") and "tokenizer.ggml.tokens" not in header.metadata:
        return None
    told.check_keys()
    tokens = told.texts("tokens")
    if len(tokens) > vocabulary:
        raise told.refusal(f"has {len(tokens):,} tokens, and the model {vocabulary:,} rows of embedding")
    if len(ids := {token: index for index, token in enumerate(tokens)}) < len(tokens):
        again = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise told.refusal(f"has two tokens {again!r}")
    types = told.get("token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise told.refusal("has another number of token types than of tokens")
    if model == "gpt2":
        cut = _cut(told)
        backend, bos = _byte_level(told, ids, cut), cut.bos
    elif model == "llama":
        backend, bos = _sentencepiece(told, tokens, ids, types), True
    else:
        raise told.refusal(
            f"is of the kind {model!r}, and only gpt2 (byte-level BPE) and llama (SentencePiece) are read"
        )
    return _dressed(told, backend, tokens, types, bos, positions)


class _Told:
    """What the file says of its tokenizer."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"tokenizer.ggml.{key}", default)

    def texts(self, key: str) -> list[str]:
        found = self.get(key)
        if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
            raise self.refusal(f"has no list tokenizer.ggml.{key}")
        return found

    def flag(self, key: str, default: bool) -> bool:
        found = self.get(key, default)
        if not isinstance(found, bool):
            raise self.refusal(f"says neither yes nor no in tokenizer.ggml.{key}")
        return found

    def token(self, role: str, tokens: Sequence[str]) -> str | None:
        index = self.get(f"{role}_token_id")
        if index is None:
            return None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(tokens):
            raise self.refusal(f"names a token that is not there in tokenizer.ggml.{role}_token_id")
        return tokens[index]

    def check_keys(self) -> None:
        for key, value in self.header.metadata.items():
            if not key.startswith("tokenizer.") or key in _KNOWN or key.startswith("tokenizer.chat_template."):
                continue
            if key in _IDLE and value == _IDLE[key]:
                continue
            raise self.refusal(f"has the key {key}, which is not understood")

    def refusal(self, why: str) -> CheckpointRefused:
        return CheckpointRefused(
            f"{self.header.path}: its tokenizer {why}; the ids would not be the model's: use a newer file or a "
            "safetensors folder of the same model"
        )


def _cut(told: _Told) -> _Cut:
    name = told.get("pre")
    if name is None:
        raise told.refusal("does not say how text is cut into words (tokenizer.ggml.pre)")
    if name not in _CUTS:
        raise told.refusal(f"cuts text into words as {name!r} does, which is not known here ({', '.join(_CUTS)} are)")
    return _CUTS[name]


def _byte_level(told: _Told, ids: dict[str, int], cut: _Cut) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if told.flag("add_space_prefix", False):
        raise told.refusal("puts a space before every text, which is not done in byte-level vocabularies")
    merges = []
    for merge in told.texts("merges"):
        left, gap, right = merge.partition(" ")
        if not (left and gap and right) or not {left, right, left + right} <= ids.keys():
            raise told.refusal(f"merges {merge!r}, which are no two tokens that make a third")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=cut.whole))
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    if cut.split is not None:
        steps = [
            pre_tokenizers.Split(Regex(cut.split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(told: _Told, tokens: list[str], ids: dict[str, int], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: spaces are a letter, every text (and what follows a control token) begins with one, and the
    pair that makes the token of the highest score is merged first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    if told.get("pre", "default") not in ("default", "llama"):
        raise told.refusal(f"is SentencePiece and cuts text as {told.get('pre')!r} does, which is not known here")
    scores = told.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise told.refusal("has another number of scores than of tokens")
    unknown = told.token("unknown", tokens)
    of_bytes = {f"<0x{byte:02X}>" for byte in range(256)} <= {
        token for token, kind in zip(tokens, types, strict=True) if kind == _BYTE
    }
    if unknown is None and not of_bytes:
        raise told.refusal("has neither a token for each byte nor an unknown token")
    merged = [index for index, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED)]
    model = models.BPE(
        vocab=ids,
        merges=_merges(tokens, scores, merged),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=of_bytes,
        ignore_merges=False,
    )
    backend = Tokenizer(model)
    prefixed = told.flag("add_space_prefix", True)
    spaces = [normalizers.Prepend(_SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _merges(tokens: list[str], scores: list[float], merged: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the order in which SentencePiece would do it."""
    place = {tokens[index]: index for index in merged}
    pairs = []
    for index in merged:
        token = tokens[index]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in place and right in place:
                pairs.append((-scores[index], -len(left), -len(right), index, left, right))
    return [(left, right) for *_, left, right in sorted(pairs)]


def _dressed(
    told: _Told, backend: Tokenizer, tokens: list[str], types: list[int], bos: bool, positions: int
) -> PreTrainedTokenizerBase:
    """The tokenizer with its special tokens, what it puts around a text, and its chat template."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    roles = {name: told.token(key, tokens) for name, key in _SPECIAL.items()}
    named = set(roles.values())
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if not token or (kind not in (_CONTROL, _USER_DEFINED) and token not in named):
            continue
        special = kind == _CONTROL or token in named
        added = AddedToken(token, normalized=False, special=special)
        (backend.add_special_tokens if special else backend.add_tokens)([added])
        if backend.token_to_id(token) != index:
            raise told.refusal(f"cannot keep the id of {token!r}")
    around: dict[str, tuple[str, int]] = {}
    for role, default in (("bos", bos), ("eos", False)):
        name = roles[f"{role}_token"]
        if told.flag(f"add_{role}_token", default) and name is not None:
            around[role] = (name, told.get(f"{role}_token_id"))
    if around:
        before, after = ([around[role][0]] if role in around else [] for role in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=list(around.values()),
        )
    templates = (
        {"chat_template": template}
        if isinstance(template := told.header.metadata.get("tokenizer.chat_template"), str)
        else {}
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in roles.items() if token is not None},
        **templates,
    )
    _check(told, tokenizer, tokens)
    return tokenizer


_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _check(told: _Told, tokenizer: Any, tokens: list[str]) -> None:
    """What was built is what the file says: no id moved, none was added."""
    if len(tokenizer) != len(tokens):
        raise told.refusal(f"has {len(tokens):,} tokens and came out with {len(tokenizer):,}")
    for index in range(0, len(tokens), max(1, len(tokens) // 1000)):
        if tokenizer.convert_ids_to_tokens(index) != tokens[index]:
            raise told.refusal(f"has the token {tokens[index]!r}, which came out with another id than {index}")
