"""SentenceKV: what lies in host memory is found sentence by sentence, by the mean of each one's keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import max_pool1d

from workbench.kv.base import Study
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.format import Shape
from workbench.kv.stores.offload import Index
from workbench.kv.stores.sentences import SentenceIndex, sentence_ends
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

_KERNEL = 7  # of the pooling by which a sentence's tokens are weighed, as published


@register
class SentenceKV(SinksAndRecent):
    """Keep first and recent tokens on the device, and fetch the sentences whose mean key is most like the query.

    Prompt and answer are cut into sentences, which end with a token that is a full stop, an exclamation or question
    mark, or a blank line. Each is represented for every KV head by the mean of its keys, on the device; its entries lie
    in host memory. While decoding, the mean query of the sentence in progress is compared with all means by dot
    products, and the best sentences are fetched until there are `fetch` tokens; the first `opening` tokens of a
    sentence and the one that ends it fetch all that can be found, as in the authors' code. Of the prompt only the
    `factor` times as many tokens can be found that its last `window` queries attend to most, max-pooled over 7
    neighbours (the authors' code keeps no others at all; here they lie in host memory too, so that every plan names
    where each token is). Means are of those that can be found.

    Chosen here: KV heads instead of query heads, for which the queries of a group are averaged; what is near grows with
    the budget, where the authors keep 32 first and 32 recent tokens; a sentence ends after `longest` tokens at the
    latest, and everything is cut so where there is no tokenizer.
    """

    key = "sentencekv"
    title = "SentenceKV"
    paper = Paper(
        "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching", "Zhu et al. 2025", "2504.00970"
    )
    claim = "finds a needle as reliably as the full cache, at a latency that does not grow with the text"
    fidelity = Fidelity("deviates", "the query heads of a KV head choose together, and the budget says what is near")
    presets = (
        Preset(
            "longbench",
            "zzbright1998/SentenceKV, LongBench/run_longbench.py, models/sentencekv/, e603dfc",
            fetch=960,  # 1,024 without the first 32 and the recent 32
            factor=3.0,
            window=32,
            sinks=32,
            opening=1,
        ),
        Preset("ruler", "zzbright1998/SentenceKV, RULER/run_ruler.sh, e603dfc", factor=2.0),
    )
    default_budget = 0.25

    sinks: int = param(32, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    fetch: int = param(
        256,
        ge=1,
        le=65536,
        unit="tokens",
        help="how many each query fetches from host memory",
        own="the authors' 960 are a thirtieth of their texts of 31,500 tokens; texts here may have no more than that",
    )
    factor: float = param(3.0, ge=1.0, le=1024.0, help="how many times as many of the prompt's tokens can be found")
    window: int = param(32, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that choose those")
    opening: int = param(1, ge=0, le=64, unit="tokens", help="of a sentence, that fetch all that can be found")
    longest: int = param(
        64,
        ge=1,
        le=1024,
        unit="tokens",
        help="where a sentence ends at the latest",
        own="the authors set no end; text without marks would be one sentence",
    )

    def retrieve(self, study: Study, shapes: Sequence[Shape]) -> Index:
        trace = study.trace
        tokenizer = trace.prompt.tokenizer

        def compute() -> dict[int, Tensor]:
            track = study.progress.track(trace.compressible, "weighing tokens", len(trace.compressible))
            return {layer.index: votes(layer, self.window) for layer in track}

        ends = trace.once(("sentences", self.longest), lambda: sentence_ends(trace.ids, tokenizer, self.longest))
        weights = trace.once(("sentencekv", self.window), compute)
        known = max(int(self.factor * self.fetch), 1)
        return SentenceIndex(self.fetch, known, self.opening, self.longest, ends, weights, tokenizer)


def votes(layer: LayerTrace, window: int) -> Tensor:
    """The attention of the last `window` queries to each position, summed, pooled, averaged by KV head: [k, n]."""
    received = layer.attention(window).mean(dim=1).sum(dim=1)
    return max_pool1d(received, _KERNEL, stride=1, padding=_KERNEL // 2)
