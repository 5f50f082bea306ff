"""How much of a layer's attention goes everywhere: of a prompt, or of a model whatever it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.core.attention_rows import attention_rows
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.examples import example, needle
from workbench.models import max_positions
from workbench.progress import Progress
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUERIES = 32  # the last of what is read, as in TailorKV's code
_TOKENS = 1024  # of the text by which a model is measured


def dense_preference(queries: Tensor, keys: Tensor, scoring: Scoring, share: float) -> float:
    """What the largest `share` of each softmax row leaves over to other keys, averaged over heads and rows.

    queries [h, n, d], of which the last 32 are asked, over keys [k, n, d].
    """
    tokens = keys.shape[1]
    left, rows = 0.0, 0
    for _, block in attention_rows(queries[:, -QUERIES:], keys, scoring):  # [h, q, n]
        largest = block.topk(max(int(share * tokens), 1), dim=-1).values.sum(dim=-1)
        whole = 1 if scoring.sinks is None else block.sum(dim=-1)
        left, rows = left + float((whole - largest).sum()), rows + largest.numel()
    return left / rows


def of_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, share: float, progress: Progress
) -> dict[int, float]:
    """The dense preference of every layer on a text of the package's own, random ids where there is no tokenizer."""
    measuring = _Measuring(share, progress)
    ids = own_text(model, tokenizer)
    with torch.inference_mode():
        forward(model, measuring, ids, torch.arange(len(ids)))
    return measuring.preference


def own_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """About a thousand ids of a text of the package's own, by which a model is measured, int64 [n]; random ones where
    there is no tokenizer.
    """
    most = min(_TOKENS, max_positions(model) * 3 // 4)
    if tokenizer is None:
        vocabulary = model.config.get_text_config().vocab_size
        return torch.randint(0, vocabulary, (most,), generator=torch.Generator().manual_seed(0))
    text = f"{example('dialogue').text}\n\n{example('code').text}\n\n{needle(_TOKENS).text}"
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])[:most]  # it may be longer than the model reads


@dataclass
class _Measuring:
    """Exact attention that measures each layer's preference on the way."""

    share: float
    progress: Progress
    preference: dict[int, float] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.check()
        self.preference[layer] = dense_preference(query, key, scoring, self.share)
        return causal_attention(query, key, value, scoring)
