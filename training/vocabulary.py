"""The byte-level BPE of `workbench-tiny` and its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END, USER, ASSISTANT = 0, 1, 2  # ids of the special tokens
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
SIZE = 8192

# Nothing between the turns: what a session adds to a prompt is the question and three tokens.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_vocabulary(texts: Iterable[str], size: int = SIZE) -> Tokenizer:
    """A byte-level BPE of `size` tokens learned from `texts`; every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def chat_tokenizer(tokenizer: Tokenizer, positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it, with the chat template."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[END],
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made
