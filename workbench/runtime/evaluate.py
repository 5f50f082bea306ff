"""How far a run is from the uncompressed one: both read the uncompressed answer, token by token, on fresh stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.engine.attention_hook import device_of
from workbench.formatting import Brief
from workbench.measure.quality import Quality, compare_logits, output_error
from workbench.models.depth import origins
from workbench.progress import Progress
from workbench.runtime.cuda_graph import WORTH
from workbench.runtime.decode import Decoder
from workbench.runtime.greedy import most_likely
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
    attention outputs [h, t', dv]. layers: what each of these is called (`models.depth.origins`). fused: whether single
    tokens were read as fast as the model allows; what is compared with it has to be read in the same way.
    """

    tokens: tuple[int, ...]
    logits: Tensor
    outputs: list[Tensor]
    layers: tuple[int, ...]
    fused: bool


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
        reading = decoder()
        most = max_new_tokens if given is None else given.numel()
        choose, ends = (most_likely, eos) if given is None else (partial(_given, given.tolist()), ())
        fuse = most > WORTH
        tokens, logits, outputs = _read(reading, trace.logits, ids, choose, most, ends, fuse, progress)
        return Reference(tokens, logits, outputs, origins(reading.model), fuse)

    on = max_new_tokens if given is None else tuple(given.tolist())
    return trace.once(("reference", tuple(ids.tolist()), on), compute)


def teacher_forcing(
    decoder: Decoder,
    logits: Tensor,
    ids: Tensor,
    targets: Tensor,
    progress: Progress | None = None,
    *,
    fuse: bool | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits [t, v] that predict targets [t] after ids [q], and each layer's attention outputs [h, t', dv] on the way.

    logits [v]: those before ids, for when there are none. The targets are read one at a time, as in decoding, so that
    stores flush and evict as they would there. fuse: whether as fast as the model allows; None: if that is worth it.
    """
    choose, most = partial(_given, targets.tolist()), len(targets)
    fuse = most > WORTH if fuse is None else fuse
    return _read(decoder, logits, ids, choose, most, (), fuse, progress or Progress())[1:]


def _given(tokens: Sequence[int], _logits: Tensor, step: int) -> int:
    return tokens[step]


def _read(
    decoder: Decoder,
    logits: Tensor,
    ids: Tensor,
    choose: Callable[[Tensor, int], int],
    most: int,
    ends: Sequence[int],
    fuse: bool,
    progress: Progress,
) -> tuple[tuple[int, ...], Tensor, list[Tensor]]:
    """At most so many tokens, chosen by the logits [v] that predict them and their number, up to one of `ends`; the
    logits [t, v], and each layer's attention outputs. The last token is not read.
    """
    decoder.outputs = [[] for _ in decoder.stores]
    decoder.progress = progress
    rows = [decoder.feed(ids)[-1:]] if ids.numel() else [logits[None]]
    if fuse:
        decoder.fuse()
    tokens: list[int] = []
    for step in progress.track(range(most), "comparing with the full cache", most):
        tokens.append(choose(rows[-1][-1], step))
        if step == most - 1 or tokens[-1] in ends:
            break
        rows.append(decoder.feed(torch.tensor(tokens[-1:])))
    outputs = [torch.cat(layer, dim=1) if layer else torch.empty(0) for layer in decoder.outputs]
    return tuple(tokens), torch.cat([row.cpu() for row in rows]), outputs


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
    logits, outputs = teacher_forcing(decoder, before, ids, targets, progress, fuse=against.fused)
    figures = compare_logits(
        against.logits,
        logits,
        targets,
        reference_tokens=against.tokens,
        tokens=answer,
        device=device_of(decoder.model),
    )
    errors = torch.full((len(against.outputs), heads), torch.nan)
    for number, output in zip(origins(decoder.model), outputs, strict=True):
        layer = against.layers.index(number)
        exact = against.outputs[layer]
        errors[layer] = output_error(exact, output).cpu() if exact.numel() else 0.0
    return Evaluation(figures, errors, against.tokens)
