"""What one reading of a prompt recorded: kept whole, so that any budget can be tried again without reading again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from workbench import arguments
from workbench.core.attention_rows import attention_rows
from workbench.core.memo import Memo
from workbench.core.rope import Rotation
from workbench.engine.latents import Latents
from workbench.engine.states import States
from workbench.errors import BadParameter, NoRotation, NotRead
from workbench.formatting import Brief, mib
from workbench.measure.attention import column_sums
from workbench.measure.memory import Timeline, tensor_bytes
from workbench.prompt import Prompt
from workbench_kernels import Scoring

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class LayerTrace(Brief):
    """One layer's reading of the prompt, as its attention saw it (after q/k norms and rotary embedding).

    index: which of the layers that attend. keys [k, n, d], values [k, n, dv], queries [h, n, d]: in the model's compute
    precision, on `device` wherever they are held (a long prompt's recording may rest in host memory). scoring: how
    products become scores, with the width of a sliding-window layer. rotary: function that says how the
    layer rotates where so many tokens were read; None: it does not. narrowed_from: where an attention method set the
    window, how many positions the plain model's cache would hold.
    plain_widths: widths of a key and a value of the plain model's cache, where this model's are not those.
    shared: the earlier layer whose keys and values this one reads; None: it has its own. number: what the model calls
    the layer, where others keep no keys and values or have gone; None: as `index` says. latents: the rows of which all
    heads make their keys and values (MLA), and which the layer's cache holds in place of these; None: it has none.
    images: of each token the number of the image that it stands for, int64 [n], -1 for text; None: all is text.
    """

    index: int
    keys_held: Tensor
    values_held: Tensor
    queries_held: Tensor
    device: torch.device
    scoring: Scoring
    rotary: Callable[[int], Rotation] | None = field(default=None, repr=False)
    narrowed_from: int | None = None
    plain_widths: tuple[int, int] | None = None
    shared: int | None = None
    number: int | None = None
    latents: Latents | None = None
    images: Tensor | None = field(default=None, repr=False)

    @property
    def called(self) -> int:
        """The layer's number in the model."""
        return self.index if self.number is None else self.number

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return self.scoring.scale

    @property
    def window(self) -> int | None:
        """How many positions a query sees, its own included; None: all up to its own."""
        return self.scoring.window

    @property
    def chunk(self) -> int | None:
        """How many positions make a chunk, of which a query sees only its own; None: there are no chunks."""
        return self.scoring.chunk

    @property
    def bound(self) -> int | None:
        """How many positions a query sees at most, however long the text is; None: all up to its own."""
        given = [width for width in (self.window, self.chunk) if width is not None]
        return min(given, default=None)

    @property
    def held(self) -> int:
        """How many positions the layer's uncompressed cache holds after the prompt: those of its window or chunk."""
        held = self.tokens if self.window is None else min(self.tokens, self.window)
        return held if self.chunk is None else min(held, (self.tokens - 1) % self.chunk + 1)

    @property
    def softcap(self) -> float | None:
        """The bound of scores; None: unbounded."""
        return self.scoring.softcap

    @property
    def keys(self) -> Tensor:
        return self.keys_held.to(self.device)

    @property
    def values(self) -> Tensor:
        return self.values_held.to(self.device)

    @property
    def queries(self) -> Tensor:
        return self.queries_held.to(self.device)

    def blank(self, tokens: int | None = None) -> LayerTrace:
        """The same layer without data (default as many tokens), for its shapes."""
        count = self.tokens if tokens is None else tokens
        held = (self.keys_held, self.values_held, self.queries_held)
        keys, values, queries = (torch.empty(x.shape[0], count, x.shape[2], dtype=x.dtype, device="meta") for x in held)
        scoring = replace(self.scoring, chosen=None)
        latents = None if self.latents is None else self.latents.blank(count)
        blank = replace(self, keys_held=keys, values_held=values, queries_held=queries)
        return replace(blank, scoring=scoring, latents=latents)

    @property
    def rows(self) -> LayerTrace:
        """The layer as its cache holds it, for stores that go by keys and values alone: rotated rows [1, n, w] for keys
        and latent ones [1, n, r] for values; itself where it has none.
        """
        if self.latents is None:
            return self
        return replace(self, keys_held=self.latents.rotated, values_held=self.latents.latent)

    @property
    def absorbed(self) -> LayerTrace:
        """The same attention over the rows (`latents`) as the keys of one KV head that all query heads share; itself
        where there are none.
        """
        if self.latents is None:
            return self
        rows = self.latents.to(self.device)
        to_keys = rows.expansion.maps(rows.latent, rows.rotated)[0].to(self.queries.dtype)
        return replace(
            self,
            keys_held=torch.cat([rows.latent, rows.rotated], dim=-1),
            values_held=rows.latent,
            queries_held=self.queries @ to_keys.transpose(1, 2),
            latents=None,
        )

    @cached_property
    def image_span(self) -> tuple[int, int] | None:
        """From where to where, the end not included, tokens of images stand in the prompt; None without images."""
        places = () if self.images is None else (self.images >= 0).nonzero()[:, 0].tolist()
        return (places[0], places[-1] + 1) if places else None

    @property
    def tokens(self) -> int:
        return self.keys_held.shape[1]

    @property
    def positions(self) -> Tensor:
        """Where keys and values stand, int64 [k or 1, n], ascending."""
        return torch.arange(self.tokens, device=self.device)[None]

    @property
    def end(self) -> int:
        """Where the next token stands."""
        return self.tokens

    @property
    def kv_heads(self) -> int:
        return self.keys_held.shape[0]

    @property
    def heads(self) -> int:
        return self.queries_held.shape[0]

    @property
    def groups(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def attention_rows(self, last: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Exact causal softmax rows of the last `last` queries (default all), block by block: (rows, [h, rows, n])."""
        first = 0 if last is None else max(0, self.tokens - last)
        yield from attention_rows(
            self.queries_held[:, first:].to(self.device),
            self.keys,
            self.scoring,
            query_positions=torch.arange(first, self.tokens, device=self.device),
        )

    def attention(self, last: int) -> Tensor:
        """Exact causal softmax rows of the last `last` queries by KV head, [k, g, last, n] float32."""
        rows = torch.cat([block for _, block in self.attention_rows(last)], dim=1)  # [h, last, n]
        return rows.view(self.kv_heads, self.groups, *rows.shape[1:])

    def received(self) -> Tensor:
        """Attention that each position received from all queries, summed over the group of each KV head: [k, n]
        float32. Found once; not to be written to.
        """
        return self._received

    @cached_property
    def _received(self) -> Tensor:
        sums = column_sums(self.queries, self.keys, self.scoring)  # [h, n]
        return sums.view(self.kv_heads, self.groups, -1).sum(dim=1).to(self.device)

    def unrotated_queries(self) -> Tensor:
        """The queries before rotary embedding, [h, n, d]. Raises NotApplicable as `rotation` does."""
        return self.rotation.undo(self.queries.float(), torch.arange(self.tokens, device=self.device))

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, remembered under `key` for as long as this layer's recording lives."""
        return self._memo.once(key, compute)

    @cached_property
    def _memo(self) -> Memo:
        return Memo()

    @cached_property
    def rotation(self) -> Rotation:
        """How this layer rotates queries and keys: its table at positions, applied and undone.

        Raises NoRotation where positions are no rotation, NotApplicable where it is one that is not known.
        """
        if self.rotary is None:
            raise NoRotation(f"layer {self.called} has no rotary position embedding that could be undone")
        return self.rotary(self.tokens)


@dataclass(repr=False)
class Trace:
    """A prompt's keys, values and queries at every layer, the logits after its last token, and scores computed from
    them.

    prompt: what was read. layers: LayerTrace each. logits: float32 [v] after the last token. read_seconds: how long it
    took. exact: layers that KV methods must leave alone, with the reason (sliding windows and the like). timeline: live
    bytes while reading. computed: score entries that reading really computed at each layer, summed over its query
    heads; empty where nothing counted them. gone: shapes of the layers that a weight method took out of the model.
    memory: what modules of a compressed model remembered of the prompt. learnt: what an attention method learnt of the
    model before it read. memo: what was computed of it since (`once`). states: what layers that keep another state than
    keys and values remember of the prompt, on the model's device; None where the model has none.
    """

    prompt: Prompt
    layers: tuple[LayerTrace, ...]
    logits: Tensor
    read_seconds: float
    exact: dict[int, str] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline, repr=False)
    computed: tuple[int, ...] = field(default=(), repr=False)
    gone: tuple[LayerTrace, ...] = field(default=(), repr=False)
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    learnt: dict[Any, Any] = field(default_factory=dict, repr=False)
    memo: Memo = field(default_factory=Memo, repr=False)
    states: States | None = field(default=None, repr=False)

    @property
    def ids(self) -> Tensor:
        """The token ids read, int64 [n]."""
        return self.prompt.ids

    @property
    def tokens(self) -> int:
        return int(self.ids.numel())

    def __repr__(self) -> str:
        read = f"<Trace of {self.tokens:,} tokens: {len(self.layers)} layers"
        if not self.recorded:
            return f"{read}, nothing recorded>"
        first = self.layers[0]
        return f"{read} of {first.kv_heads} KV heads, {mib(self.nbytes)}>"

    @property
    def recorded(self) -> bool:
        """Whether keys, values and queries are there; without them only methods that read by themselves can be used."""
        return self.layers[0].keys_held.device.type != "meta"

    def need_recording(self) -> Trace:
        """The trace itself. Raises NotRead where keys, values and queries are not there."""
        if not self.recorded:
            raise NotRead("this prompt was taken in without a recording: call read(text) without record=False")
        return self

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the model calls the layers that were recorded: those that attend."""
        return tuple(layer.called for layer in self.layers)

    def place(self, number: int) -> int:
        """Where in `layers` the one is that the model calls so.

        Raises BadParameter for one that is not there, or that has no keys and values.
        """
        numbers = self.numbers
        if numbers == tuple(range(len(numbers))):
            return arguments.index("layer", number, len(numbers), "the model's layers")
        asked = arguments.whole("layer", number)
        if asked not in numbers:
            raise BadParameter(
                f"layer {asked} has no keys and values here; the layers that have are {', '.join(map(str, numbers))}"
            )
        return numbers.index(asked)

    @property
    def compressible(self) -> tuple[LayerTrace, ...]:
        """The layers that KV methods may change."""
        return tuple(layer for layer in self.layers if layer.index not in self.exact)

    @property
    def latent(self) -> str:
        """What the cache of layers with latent attention holds, as "MLA, latent 512 + 64"; nothing where none has."""
        return next((layer.latents.kind for layer in self.layers if layer.latents), "")

    @property
    def kv_heads(self) -> int:
        """How many KV heads the layers have that KV methods may change, of all if there are none; others that stay as
        they are may have more or fewer.
        """
        return (self.compressible or self.layers)[0].kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes held by the recording (never counted as a run's cache), states and images included."""
        held = [x for layer in self.layers for x in (layer.keys_held, layer.values_held, layer.queries_held)]
        held += [x for layer in self.layers if layer.latents for x in (layer.latents.latent, layer.latents.rotated)]
        chosen = [layer.scoring.chosen.keys for layer in self.layers if layer.scoring.chosen is not None]
        states = () if self.states is None else self.states.tensors()
        images = 0 if self.prompt.images is None else self.prompt.images.nbytes
        return images + tensor_bytes([*held, *(keys for keys in chosen if keys is not None), *states])

    @property
    def score_share(self) -> float | None:
        """Score entries computed while reading, of all causal ones; None where nothing counted them."""
        if not self.computed:
            return None
        heads = sum(layer.heads for layer in self.layers)
        return sum(self.computed) / (heads * self.tokens * (self.tokens + 1) // 2)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, remembered under `key` for as long as the trace lives.

        Who asks for the same waits; who asks for something else does not.
        """
        return self.memo.once(key, compute)
