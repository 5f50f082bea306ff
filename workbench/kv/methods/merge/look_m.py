"""LOOK-M."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from workbench.core.nearest import nearest_kept
from workbench.errors import BadParameter
from workbench.kv.accumulated_attention import AccumulatedAttention, heavy_or_recent
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


class TextPrior(AccumulatedAttention):
    """Score positions by the attention they received and by how recent they are, all text before any image token."""

    image_spans: str = param(
        "",
        help="image tokens as first-end positions, for instance 5-581, 600-1176",
        own="those that were read with the prompt",
    )
    recent_share: float = param(0.5, ge=0, le=1, help="part of the kept positions that are simply the last ones")

    @field_validator("image_spans", mode="before")
    @classmethod
    def _written_one_way(cls, given: object) -> str:
        """Pairs of numbers become text; text is written one way, so that equal spans are equal."""
        if not isinstance(given, str):
            if not isinstance(given, Sequence) or not all(isinstance(span, Sequence) for span in given):
                raise ValueError("spans are text, as 5-581, 600-1176, or pairs of positions")
            given = ", ".join("-".join(str(end) for end in span) for span in given)
        return ", ".join(f"{first}-{end}" for first, end in _spans(given))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The image tokens as (first position, one after the last)."""
        return _spans(self.image_spans)

    def score(self, layer: LayerTrace) -> Tensor:
        image = self.is_image(layer.tokens)
        if layer.images is not None and not self.spans:
            image = layer.images >= 0
        image = image.to(layer.device)
        received = super().score(layer).double()  # so that adding the largest blurs nothing
        prior = received.amax(dim=1, keepdim=True)
        return heavy_or_recent(torch.where(image, received, received + prior), self.recent_share)

    def is_image(self, tokens: int) -> Tensor:
        """Which positions of a prompt are image tokens, bool [n]. Raises BadParameter for spans beyond its end."""
        image = torch.zeros(tokens, dtype=torch.bool)
        for first, end in self.spans:
            if end > tokens:
                raise BadParameter(
                    f"{self.key}: the image span {first}-{end} reaches beyond the prompt, which has {tokens} tokens"
                )
            image[first:end] = True
        return image


@register
class LookM(TextPrior):
    """Evict image tokens before text, and merge what is evicted into the most similar of what stays.

    A `recent_share` of what is kept are the last positions, the rest those with the largest sum of attention received,
    to which all text adds more than any image token has (the paper's text-prior eviction). As in H2O a
    position's score is the better of its two places. Every evicted key and its value then go into the kept entry whose
    key has the largest cosine similarity (the many-to-one nearest-neighbour matching of its merging strategies), head
    by head:

        averaged    mean of the kept entry and all that go into it
        pivotal     the same, of each evicted entry its mean with the kept one
        weighted    the same, of each evicted entry its multiple by the similarity

    Which positions are image tokens, a prompt that was read with images says; of other prompts the caller does:
    `image_spans="5-581"`, or pairs of numbers; each from its first position up to the one after its last. With none
    the prompt is plain text and only merging sets it apart.

    Merges take every evicted entry, as the paper's equations do; the authors' code leaves out the less similar half
    in averaged and weighted merging. While decoding nothing is evicted (the prompt is compressed once).
    """

    key = "look-m"
    title = "LOOK-M"
    paper = Paper(
        "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference",
        "Wan et al. 2024",
        "2406.18139",
    )
    claim = "80 % less cache, 1.5 times faster decoding"
    fidelity = Fidelity("deviates", "a recent heavy hitter counts once, so both halves reach a little further")
    presets = (
        Preset(
            "script", "SUSTechBruce/LOOK-M, scripts/text-prior-pivot-merge_eval.sh, ecf0f51",
            strategy="pivotal", recent_share=0.5,
        ),
    )  # fmt: skip
    default_budget = 0.2

    strategy: Literal["averaged", "pivotal", "weighted"] = param("pivotal", help="how evicted entries are merged")

    def merge(self, layer: LayerTrace, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = layer.keys.float(), layer.values.float()
        similarity, home = nearest_kept(layer.keys, kept)
        weight = similarity if self.strategy == "weighted" else torch.ones_like(similarity)
        weight = torch.where(kept, 0.0, weight)  # [k, n]
        kept_weight = torch.ones_like(weight)  # how much of the kept entry there is
        taken = torch.zeros_like(weight).scatter_add_(1, home, (~kept).to(weight.dtype))
        if self.strategy == "pivotal":
            weight, kept_weight = weight / 2, 1 + taken / 2
        merged = [_gathered(x, weight, home, kept_weight) / (1 + taken)[..., None] for x in (keys, values)]
        return merged[0], merged[1]


def _gathered(x: Tensor, weight: Tensor, home: Tensor, kept_weight: Tensor) -> Tensor:
    """kept_weight [k, n] times each row of x [k, n, d], plus weight [k, n] times the rows whose `home` [k, n] it is."""
    return (kept_weight[..., None] * x).scatter_add_(1, home[..., None].expand_as(x), weight[..., None] * x)


def _spans(text: str) -> tuple[tuple[int, int], ...]:
    """Read "5-581, 600-1176". Raises ValueError, which becomes BadParameter."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    matches = [re.fullmatch(r"([0-9]{1,18})\s*-\s*([0-9]{1,18})", part) for part in parts]
    spans = tuple((int(match[1]), int(match[2])) for match in matches if match)
    if len(spans) != len(parts):
        raise ValueError("spans of positions look like 5-581, 600-1176")
    if any(first >= end for first, end in spans):
        raise ValueError("each span goes from a position, at least 0, to a larger one")
    return spans
