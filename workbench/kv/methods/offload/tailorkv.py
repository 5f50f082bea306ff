"""TailorKV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.kv.base import Study
from workbench.kv.dense_preference import dense_preference, of_model
from workbench.kv.ranking import Ranking
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.channels import ChannelIndex
from workbench.kv.stores.format import Format, Shape, stored_nbytes
from workbench.kv.stores.tailored import TailoredFormat
from workbench.registry import Fidelity, Paper, Preset, param, register


class DenseAndSparse(SinksAndRecent):
    """Class layers by how much of their attention goes everywhere, and give those that fetch the larger window.

    A base class: what it says about scores and room yields to any other method of a recipe.
    """

    threshold: float = param(0.2, ge=0, le=1, help="dense preference above which a layer is quantised")
    share: float = param(0.05, gt=0, le=1, help="part of a row's weights, the largest, that a sparse layer relies on")
    residual: int = param(128, ge=1, le=4096, unit="tokens", help="entries that stay exact in quantised layers")

    def importance(self, study: Study) -> Tensor | None:
        return self.preference(study)

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        assert ranking.importance is not None
        dense = ranking.importance > self.threshold
        heads, tokens = ranking.kv_heads, ranking.tokens
        rows = entries // heads  # over all layers, as all heads of a layer keep equally many
        low, high = int(dense.sum()), int((~dense).sum())
        exact = min(self.residual, tokens, rows // (low + high)) * low
        sparse = min(rows - exact, high * tokens)
        counts = torch.zeros(ranking.layers, dtype=torch.int64)
        counts[~dense], counts[dense] = _even(sparse, high), _even(min(rows - sparse, low * tokens), low)
        return counts[:, None].repeat(1, heads)

    def preference(self, study: Study) -> Tensor:
        """The dense preference of each compressible layer, float32 [l]: the model's, or without one the prompt's."""
        layers, model = study.trace.compressible, study.model
        if model is None:
            found = {x.index: dense_preference(x.queries, x.keys, x.scoring, self.share) for x in layers}
        else:
            tokenizer = study.trace.prompt.tokenizer
            found = study.of_model.once(
                ("dense preference", self.share, tokenizer is None),
                lambda: of_model(model, tokenizer, self.share, study.progress),
            )
        return torch.tensor([found[layer.index] for layer in layers])


@register
class TailorKV(DenseAndSparse):
    """Quantise the layers that look everywhere, and fetch a few tokens from host memory in those that look at few.

    A layer's dense preference is the part of its attention that the largest twentieth of the weights leaves over, for
    the last 32 queries of a text and on average over heads, measured once for each model of a session. Above
    `threshold` it is quantisation-friendly: all its entries are at 1 or 2 bits, keys per channel and values per token,
    but for a window of `residual` exact ones. The others are sparsity-friendly: the first tokens and the newest are on
    the device, the rest in host memory. Their index is the official code's: of the `channels` channels in which the
    group's mean query times the largest key is largest, the keys are copied, and the `fetch` entries with the largest
    product in these are fetched.

    The budget goes to `residual` entries a head of the quantised layers, or as many as all heads could have if those
    are fewer, then to the window of the sparse layers; what these cannot use makes more of the quantised layers exact.
    bits "auto": 2, but 1 where the quantised layers at 2 bits would take more than half of the budget.

    Chosen here: the text is the package's own examples, where the authors take fifty questions of GSM8K (without a
    model to read it, it is the prompt); the exact window in quantised layers stays where the prompt ended, and newer
    tokens are exact until they fill a group of their own; old tokens of the answer follow into host memory, where the
    official code keeps them.

    Nothing is copied ahead of time: channels are chosen by the layer's own query, where the code takes the next layer's
    projection of what enters this layer. On the default model and the tiny one 85 and 76 % of the channels are the same
    by either, and of the 64 largest products a query finds 66 and 74 %, by the code's way 63 and 70 %.
    """

    key = "tailorkv"
    title = "TailorKV"
    paper = Paper(
        "TailorKV: A Hybrid Framework for Long-Context Inference via Tailored KV Cache Optimization",
        "Yao et al. 2025",
        "2505.19586",
    )
    claim = "128K tokens of an 8B model on one 24 GB card, nearly without loss"
    default_budget = 0.25
    fidelity = Fidelity(
        "deviates", "nothing is fetched a layer ahead; old tokens of the answer move to host memory too"
    )
    presets = (
        Preset(
            "arguments",
            "ydyhello/TailorKV, utils/process_args.py and models/modeling_llama_search.py, 4e9fc81",
            bits=2,
            group=128,
            residual=128,
            sinks=8,
            channels=8,
            fetch=64,
            threshold=0.2,
            share=0.05,
        ),
        Preset(
            "longbench", "ydyhello/TailorKV, scripts/long_test.sh, 4e9fc81", bits=1, group=64, residual=128, fetch=128
        ),
    )

    sinks: int = param(8, ge=0, le=256, unit="tokens", help="tokens at the beginning that stay on the device")
    bits: Literal["auto", 1, 2, 4] = param(
        "auto",
        help="bits of each number in quantised layers",
        own="the published 2, unless its layers would then take more than half of a budget: then the published 1",
    )
    group: int = param(128, ge=4, le=256, unit="numbers", help="how many numbers share a scale and a zero there")
    fetch: int = param(64, ge=1, le=16384, unit="tokens", help="entries fetched for each query of a KV head")
    channels: int = param(8, ge=1, le=256, help="channels of the keys that approximate a query's scores")

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        layers, preference = study.trace.compressible, self.preference(study)
        dense = frozenset(layer.index for layer, p in zip(layers, preference, strict=True) if p > self.threshold)
        index = ChannelIndex(dtype, self.fetch, self.channels)

        def form(bits: int) -> TailoredFormat:
            return TailoredFormat(dtype, dense, bits, self.group, index, self.sinks)

        if self.bits != "auto":
            return form(self.bits)
        quantised = [shape for shape in shapes if shape.layer in dense]
        least = torch.ones(len(quantised), shapes[0].kv_heads, dtype=torch.int64)
        fits = limit is None or 2 * stored_nbytes(form(2), quantised, least) <= limit
        return form(2 if fits else 1)


def _even(total: int, parts: int) -> Tensor:
    """`total` in whole parts as equal as possible, int64 [parts], the earlier ones larger."""
    each, more = divmod(total, max(parts, 1))
    return each + (torch.arange(parts) < more).long()
