"""How far a run is from the uncompressed one: both read the uncompressed answer, token by token, on fresh stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.formatting import Brief
from workbench.measure.quality import Quality, compare_logits, output_error
from workbench.models.depth import origins
from workbench.progress import Progress
from workbench.runtime.cuda_graph import WORTH
from workbench.runtime.decode import Decoder
from workbench.runtime.greedy import greedy
from workbench.trace import Trace


@dataclass(frozen=True, repr=False)
class Evaluation(Brief):
    """How a run compares with the uncompressed run: figures over the same continuation, and errors head by head.

    output_error: relative error of each head's attention output on that continuation, float32 [l, h]; unlike a plan's
    error it includes what earlier layers passed on. Layers that are gone have none (nan). reference: the uncompressed
    run's tokens.
    """

    figures: Quality
    output_error: Tensor
    reference: tuple[int, ...]


class Reference(NamedTuple):
    """The uncompressed model on some tokens, its own answer or a given text: logits [t, v] for them, and each layer's
    attention outputs [h, t', dv]. layers: what each of these is called (`models.depth.origins`).
    """

    tokens: tuple[int, ...]
    logits: Tensor
    outputs: list[Tensor]
    layers: tuple[int, ...]


def reference(
    trace: Trace,
    decoder: Callable[[], Decoder],
    ids: Tensor,
    max_new_tokens: int,
    eos: Sequence[int],
    progress: Progress,
    given: Tensor | None = None,
) -> Reference:
    """The uncompressed model after the prompt of `trace` and ids [q]; computed once for each question.

    On its own greedy answer of at most max_new_tokens, or on the text `given` [t].
    """

    def compute() -> Reference:
        if given is not None:
            tokens = tuple(given.tolist())
        else:
            answering = decoder()
            answering.progress = progress
            tokens = tuple(greedy(answering, ids, trace.logits, max_new_tokens=max_new_tokens, eos=eos))
        reading = decoder()
        logits, outputs = teacher_forcing(reading, trace.logits, ids, torch.tensor(tokens), progress)
        return Reference(tokens, logits, outputs, origins(reading.model))

    on = max_new_tokens if given is None else tuple(given.tolist())
    return trace.once(("reference", tuple(ids.tolist()), on), compute)


def teacher_forcing(
    decoder: Decoder, logits: Tensor, ids: Tensor, targets: Tensor, progress: Progress | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits [t, v] that predict targets [t] after ids [q], and each layer's attention outputs [h, t', dv] on the way.

    logits [v]: those before ids, for when there are none. The targets are read one at a time, as in decoding, so that
    stores flush and evict as they would there.
    """
    decoder.outputs = [[] for _ in decoder.stores]
    decoder.progress = progress or Progress()
    rows = [decoder.feed(ids)[-1:]] if ids.numel() else [logits[None]]
    if len(targets) > WORTH:
        decoder.fuse()
    read = decoder.progress.track(targets[:-1], "comparing with the full cache", len(targets) - 1)
    rows.extend(decoder.feed(token[None]) for token in read)
    outputs = [torch.cat(layer, dim=1) if layer else torch.empty(0) for layer in decoder.outputs]
    return torch.cat([row.cpu() for row in rows]), outputs


def evaluate(
    against: Reference,
    decoder: Decoder,
    before: Tensor,
    ids: Tensor,
    heads: int,
    progress: Progress,
    answer: Sequence[int] | None = None,
) -> Evaluation:
    """Compare a recipe, on a fresh `decoder` after the prompt, whose logits are `before` [v], and ids [q], with
    the reference.

    answer: what the run itself answered, if the reference is an answer too.
    """
    targets = torch.tensor(against.tokens)
    logits, outputs = teacher_forcing(decoder, before, ids, targets, progress)
    figures = compare_logits(against.logits, logits, targets, reference_tokens=against.tokens, tokens=answer)
    errors = torch.full((len(against.outputs), heads), torch.nan)
    for number, output in zip(origins(decoder.model), outputs, strict=True):
        layer = against.layers.index(number)
        exact = against.outputs[layer]
        errors[layer] = output_error(exact, output).cpu() if exact.numel() else 0.0
    return Evaluation(figures, errors, against.tokens)
