"""One token through a model on a GPU: what lies between its attentions is captured once, and replayed for every store.

Most of a step's time at batch 1 goes into launching small operations. A CUDA graph launches many at once, but only of
work whose shapes and places stay as they are, which not every store's are. So each stretch from one attention to the
next is a graph of its own (as in vLLM's piecewise graphs), and stores attend between replays, in whatever way they do.
Graphs know the model alone: every run on it, under whatever recipe, replays the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.engine.attention_hook import Handler, device_of, devices_of, forward, latents, showing
from workbench.engine.latents import Latents
from workbench.engine.states import has_indexer, keeps_states
from workbench.errors import NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.runtime.fused_step import FusedStep
from workbench.runtime.no_waiting import NoWaiting
from workbench.runtime.plain_layers import device_weight, plain_layers
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.kv.stores import Store


@dataclass(frozen=True)
class _Asked:
    """An attention: what stands in its places once the graph before it was replayed, and where the next one reads."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    out: Tensor
    rows: Latents | None  # of which key and value were made


class TokenGraphs:
    """The forward pass of one token as graphs between attentions, for a model on one CUDA device.

    nbytes: of what passes from one graph to the next.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises NotApplicable where the model's steps cannot be captured."""
        why = refusal(model)
        if why is not None:
            raise NotApplicable(why)
        self._lock = Lock()  # two threads' steps would meet in the same places
        self._held = held(model)
        device = device_of(model)
        with torch.inference_mode():
            self._token = torch.zeros(1, dtype=torch.long, device=device)
            self._position = torch.ones(1, dtype=torch.long, device=device)
            step, self._read = step_of(model, self._token, self._position)
            recorder = _Recorder(step)
            self._graphs, self._asked, self._logits = recorder.captured(device)
        between = [x for one in self._asked for x in (one.query, one.out)]
        between += [x for one in self._asked if one.rows for x in (one.rows.latent, one.rows.rotated)]
        self.nbytes = tensor_bytes([self._logits, *between])

    def stands_for(self, model: PreTrainedModel) -> bool:
        """Whether the model is still made of the modules and tensors that were captured."""
        return self._held == held(model)

    def __call__(self, handler: Handler, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits [1, v] behind token ids [1] at positions [1]."""
        with torch.inference_mode(), self._lock:
            self._token.fill_(int(ids))  # a number given to a kernel: nothing is copied from host memory
            self._position.fill_(int(positions))
            for graph, asked in zip(self._graphs, self._asked, strict=False):
                graph.replay()
                with showing(asked.rows):
                    out = handler.attend(asked.layer, asked.query, asked.key, asked.value, asked.scoring)
                asked.out.copy_(out)
            self._graphs[-1].replay()
            return self._logits.to(torch.float32, copy=True)

    def attend(self, store: Store, query: Tensor, scoring: Scoring) -> None:
        """Stores attend by their own kernels."""
        return


def refusal(model: PreTrainedModel) -> str | None:
    """Why single tokens through this model cannot be captured, or None if they can, as far as can be told."""
    devices = devices_of(model)
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return "the model is not on one GPU"
    if keeps_states(model):
        return "some layers keep another state than keys and values"
    if has_indexer(model):
        return "an indexer of the model chooses what each token attends to"
    return None


def held(model: PreTrainedModel) -> tuple[int, ...]:
    """What a model is made of, by identity: a graph reads its tensors where they lay when it was captured."""
    tensors = [*model.parameters(), *model.buffers()]
    return (*(id(module) for module in model.modules()), *(x.data_ptr() for x in tensors))


Step = Callable[[Handler], Tensor]  # a token's pass, from who attends to the logits [v]


def step_of(model: PreTrainedModel, token: Tensor, position: Tensor) -> tuple[Step, object]:
    """The pass of the token [1] at the position [1], fused where the model's layers are known, and what has to live as
    long as its graphs, besides the model.
    """
    if plain_layers(model):
        config: Any = model.config
        layers = [_Between(model, index) for index in range(config.num_hidden_layers)]

        def fused(handler: Handler) -> Tensor:
            for layer in layers:
                layer.handler = handler
            try:
                return FusedStep(model, layers)(token, position)
            finally:
                for layer in layers:
                    layer.handler = None

        return fused, layers
    mask = torch.zeros(1, 1, 1, 1, device=token.device)  # no one looks at it, but then none is made of positions
    scorings = _scorings(model)
    return lambda handler: forward(model, _Told(handler, scorings), token, position, mask=mask)[-1], mask


class _Between:
    """A layer of `FusedStep` whose new key and value go to a place of their own, where the attention finds them."""

    def __init__(self, model: Any, index: int) -> None:
        attention, weight = model.model.layers[index].self_attn, device_weight(model)
        heads = attention.k_proj.out_features // attention.head_dim
        self._index = attention.layer_idx
        self._key, self._value = weight.new_zeros(2, heads, attention.head_dim)
        self._rows = torch.arange(heads, device=weight.device)
        self.handler: Handler | None = None

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._key, self._rows, self._value, self._rows

    def attend(self, query: Tensor, scoring: Scoring) -> Tensor:
        assert self.handler is not None
        return self.handler.attend(self._index, query, self._key[:, None], self._value[:, None], scoring)


class _Told:
    """A handler whose layers score as their masks say, for a pass that has none."""

    def __init__(self, handler: Handler, scorings: Sequence[Scoring]) -> None:
        self._handler, self._scorings, self._next = handler, scorings, 0

    @property
    def memory(self) -> Any:
        return getattr(self._handler, "memory", None)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self._next += 1
        return self._handler.attend(layer, query, key, value, self._scorings[self._next - 1])


class _Forgetful:
    """Base of handlers that belong to no run: modules that remember something of one are not captured."""

    @property
    def memory(self) -> dict[Any, Any]:
        raise NotApplicable("modules of the compressed model remember something of each run")


class _Listener(_Forgetful):
    """Attends with zeros, and notes what each layer asks for."""

    def __init__(self) -> None:
        self.scorings: list[Scoring] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.scorings.append(scoring)
        return query.new_zeros(*query.shape[:2], value.shape[-1])


def _scorings(model: PreTrainedModel) -> list[Scoring]:
    """How each layer's attention scores a token that comes alone: asked in a pass in which masks tell it."""
    listener = _Listener()
    forward(model, listener, torch.tensor([0]), torch.tensor([1]))
    if any(scoring.chosen is not None for scoring in listener.scorings):
        raise NotApplicable("the model chooses what each token attends to")
    return listener.scorings


class _Recorder(_Forgetful):
    """Captures a step: whenever a layer attends a graph ends, and the next begins."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._asked: list[_Asked] = []

    def captured(self, device: torch.device) -> tuple[list[torch.cuda.CUDAGraph], list[_Asked], Tensor]:
        """All graphs, the attentions between them, and the logits [1, v] that the last one leaves."""
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for check in (nullcontext(), NoWaiting(device)):  # first kernels compile, which may wait
                with check:
                    self._step(_Listener())
            torch.cuda.synchronize(device)
            self._begin()
            try:
                logits = self._step(self)[None]
            finally:
                self._graphs[-1].capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return self._graphs, self._asked, logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self._graphs[-1].capture_end()
        out = query.new_zeros(*query.shape[:2], value.shape[-1])
        self._asked.append(_Asked(layer, query, key, value, scoring, out, latents()))
        self._begin()
        return out

    def _begin(self) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")
