"""Decode steps of a cache that is full: for each token that enters another leaves, so all steps are the same work.

H2O, TOVA or StreamingLLM at their budget hold as many entries after a step as before it, in the same places. One step
is captured as a CUDA graph, with all that stores and the evicting method do in it, and replayed. That it really is the
same each time is seen from the stores: what the host knows of them must not change in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.engine.attention_hook import device_of
from workbench.errors import NotApplicable
from workbench.runtime.decode import Decoder
from workbench.runtime.no_waiting import NoWaiting
from workbench.runtime.token_graphs import Step, refusal, step_of

if TYPE_CHECKING:
    from workbench.kv.stores import Store


class SteadyStep:
    """Greedy decoding by replays of one step of a decoder whose cache is full.

    The decoder's stores are replaced by copies, into whose tensors the graph writes. On a CPU steps run as they are.
    """

    def __init__(self, decoder: Decoder, token: int, steps: int) -> None:
        """token: the last one chosen, not read yet; steps: to do at most.

        Raises NotApplicable where a step changes more than entries, or cannot be captured; nothing has changed then.
        """
        device = device_of(decoder.model)
        why = _unsteady(decoder, steps) or (refusal(decoder.model) if device.type == "cuda" else None)
        if why is not None:
            raise NotApplicable(why)
        self._decoder, self.steps = decoder, steps
        with torch.inference_mode():
            self._token = torch.tensor([token], device=device)
            self._position = torch.tensor([decoder.position], device=device)
            self._written = torch.zeros(1, dtype=torch.long, device=device)
            self._out = torch.zeros(max(steps, 2), dtype=torch.long, device=device)
            step, self._read = step_of(decoder.model, self._token, self._position)
            self._scores, self._replay, decoder.stores = self._prepared(step)
        self._seen = torch.empty(steps, dtype=torch.long, pin_memory=device.type == "cuda")
        self._launched = 0

    def answer(self, eos: Sequence[int]) -> Iterator[int]:
        """Yield the tokens of all steps, or those up to and including one of `eos`.

        The next step begins before a token is yielded: who stops in between leaves a decoder that has read that token.
        """
        wait = self._launch()
        while wait is not None:
            wait()
            token = int(self._seen[self._launched - 1])
            wait = None if token in eos or self._launched == self.steps else self._launch()
            yield token

    def _launch(self) -> Callable[[], object] | None:
        """Begin the next step; returns what waits for its token."""
        with torch.inference_mode():
            self._replay()
            at = slice(self._launched, self._launched + 1)
            self._seen[at].copy_(self._out[at], non_blocking=True)
        self._launched += 1
        self._decoder.repeated(self._scores)
        if not self._token.is_cuda:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def _prepared(self, step: Step) -> tuple[tuple[int, ...], Callable[[], object], list[Store]]:
        """How many scores each layer computes in a step, what makes one, and the stores that it works on."""
        device = self._token.device
        if device.type != "cuda":
            scores, twin = self._tried(step), self._decoder.clone()
            return scores, partial(self._step, step, twin), twin.stores
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            scores, twin = self._tried(step), self._decoder.clone()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._step(step, twin)
        torch.cuda.current_stream(device).wait_stream(stream)
        return scores, graph.replay, twin.stores

    def _tried(self, step: Step) -> tuple[int, ...]:
        """Let a copy of the decoder do two steps; returns the scores of one.

        Raises NotApplicable where they change what the host knows of its stores, or wait for the device.
        """
        trial = self._decoder.clone()
        places = (self._token, self._position, self._written)
        before, known = [x.clone() for x in places], host_state(trial.stores)
        device = self._token.device
        checks = (nullcontext(), NoWaiting(device) if device.type == "cuda" else nullcontext())
        for check in checks:  # first kernels compile, which may wait
            with check:
                self._step(step, trial)
            if host_state(trial.stores) != known:
                raise NotApplicable("its cache is not the same after each step")
        for x, old in zip(places, before, strict=True):
            x.copy_(old)
        return tuple(count // 2 for count in trial.scores_computed)

    def _step(self, step: Step, decoder: Decoder) -> None:
        """Let a copy of the decoder read the token, choose the next one and put it in its place."""
        decoder.stand(self._position)
        token = step(decoder).argmax(keepdim=True)
        self._out.index_copy_(0, self._written, token)
        self._token.copy_(token)
        self._position.add_(1)
        self._written.add_(1)


def _unsteady(decoder: Decoder, steps: int) -> str | None:
    """Why a decoder's steps are not all the same, as far as can be told beforehand."""
    if decoder.evicting is None:
        return "its cache grows"
    if decoder.attention is not None or decoder.outputs is not None or decoder.turns(steps):
        return "its attention is not the same in each step"
    if decoder.images is not None and decoder.images.coordinates is not None:
        return "the images of the prompt take other positions than their tokens"
    return None


def host_state(x: object, depth: int = 0) -> object:
    """What the host knows of an object: numbers as they are, of tensors where and how they lie, of others their parts.

    Two states are equal where the same work on both reads and writes the same places.
    """
    if isinstance(x, Tensor):
        return (x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), str(x.device))
    if x is None or isinstance(x, bool | int | float | str | torch.dtype | torch.device):
        return x
    if isinstance(x, Mapping):
        return tuple((key, host_state(value, depth + 1)) for key, value in x.items())
    if isinstance(x, list | tuple):
        return tuple(host_state(value, depth + 1) for value in x)
    parts: Any = getattr(x, "__dict__", None)
    return id(x) if parts is None or depth > _DEEPEST else (type(x), host_state(parts, depth + 1))


_DEEPEST = 12  # stores hold stores, and these their rows
