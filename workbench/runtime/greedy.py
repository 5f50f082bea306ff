"""Greedy decoding: the loop that makes an answer, by captured steps where that can be done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import isfinite

import torch
from torch import Tensor

from workbench.engine.attention_hook import device_of
from workbench.errors import NotApplicable, OutOfRange
from workbench.progress import Progress
from workbench.runtime import cuda_graph
from workbench.runtime.cuda_graph import WORTH, CapturedStep
from workbench.runtime.decode import Decoder
from workbench.runtime.steady_step import SteadyStep


def greedy(
    decoder: Decoder, ids: Tensor, logits: Tensor, *, max_new_tokens: int, eos: Sequence[int], graphs: bool = False
) -> Iterator[int]:
    """Read ids [q] and yield the most likely tokens one by one, up to and including one that ends the answer.

    logits [v]: those before ids, for when there is nothing to read first. The last token yielded has not been read.
    graphs: on a CUDA device, capture a step and replay it, where the stores allow it and the answer is long enough.
    Reports to the decoder's progress.
    """
    progress = decoder.progress or Progress()
    if ids.numel():
        progress.update("question", 0, 1)
        logits = decoder.feed(ids, measure=True)[-1]
        progress.update("question", 1, 1)
    for step in range(max_new_tokens):
        token = most_likely(logits, step)
        yield token
        progress.update("decoding", step + 1, max_new_tokens)
        if token in eos or step == max_new_tokens - 1:
            return
        left = max_new_tokens - step - 1
        if step == 1 and left >= WORTH:  # the first token was read as all are without, and was measured
            following = _faster(decoder, token, left, graphs)
            if following is not None:
                for more, token in enumerate(following.answer(eos), step + 2):
                    yield token
                    progress.update("decoding", more, max_new_tokens)
                return
        logits = decoder.feed(torch.tensor([token]), measure=step == 0)[-1]


def most_likely(logits: Tensor, step: int) -> int:
    """The place of the largest of logits [v], for which the host waits once; step: how many tokens there are before it.

    Raises OutOfRange where it is not finite: what was appended on a GPU is not checked token by token.
    """
    largest, place = torch.stack([logits.max().double(), logits.argmax().double()]).tolist()
    if not isfinite(largest):
        raise OutOfRange(
            f"after {step} tokens the logits are not finite numbers: what the model computes, or its keys and "
            'values in this cache, may be too large for their precision; try kv_dtype="bfloat16", or another method'
        )
    return int(place)


def _faster(decoder: Decoder, token: int, steps: int, graphs: bool) -> CapturedStep | SteadyStep | None:
    """Captured steps from here on; None where the decoder goes on token by token, then as fast as it can."""
    on_gpu = device_of(decoder.model).type == "cuda"
    if graphs and on_gpu:
        with suppress(NotApplicable):
            following = cuda_graph.capture(decoder, token, steps)
            decoder.notes += [note] if (note := cuda_graph.note(decoder)) else []
            return following
        with suppress(NotApplicable):
            return SteadyStep(decoder, token, steps)
    reason = decoder.fuse()
    if graphs and on_gpu and reason is not None:
        decoder.notes.append(f"decoded without CUDA graphs: {reason}")
    return None
