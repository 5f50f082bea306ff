"""A2ATS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.kv.base import Study
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.capabilities import Pin
from workbench.kv.stores.codebook import Codebook
from workbench.kv.stores.format import Shape, index_nbytes
from workbench.kv.stores.offload import Index, Retriever
from workbench.kv.stores.rows import Rows
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace
from workbench_kernels.codebook import codebook_top

_LEAST = 8  # keys for each code: a codebook must be smaller than what it stands for
_MODEL = "as read in the authors' model code, of which the stored copy holds the description alone"
_SMALLER = "a prompt's own keys fill fewer codes than the 4,096 of a calibration text, and theirs are among the bytes"


@register
class A2ATS(SinksAndRecent):
    """Keep first and recent tokens on the device, estimate all others' scores from a codebook of keys, fetch the best.

    Windowed rotary embedding (section 4.1): beyond the window a query sees every key as if it stood `distance`
    positions before it, so keys are quantised without a position. Query-aware quantisation (section 4.2): each key is
    a number of the codebook that is nearest in the metric of the queries' second moment H = L L^T, found by k-means on
    the keys times L. Estimates only select; what is fetched is attended to exactly, at its true positions. Each query
    head selects for itself and all heads of a group attend to what any selected, as in the authors' code. Chosen here:
    the codebook comes from the prompt's own keys and queries instead of a calibration text, which is why it is smaller
    than the published 4,096 codes, and has at most one code for 8 tokens of the prompt; k-means begins at random keys
    and takes 8 rounds. Keys closer than the window are estimated so too, where the budget leaves less room than that.
    """

    key = "a2ats"
    title = "A2ATS"
    paper = Paper(
        "A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware Vector "
        "Quantization",
        "He et al. 2025",
        "2502.12665",
    )
    claim = "up to 2.7 times the throughput, more accurate than other retrieval"
    default_budget = 0.25
    fidelity = Fidelity("deviates", "codebooks come from the prompt, not from a calibration text, and are smaller")
    presets = (Preset("readme", "junhuihe-hjh/A2ATS, README.md, 71f10b0", fetch=0.03),)

    sinks: int = param(8, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay", own=_MODEL)
    fetch: float = param(0.03, ge=0.001, le=1, help="share of all tokens that each query head fetches from host memory")
    codes: int = param(
        256, ge=1, le=4096, help="entries of each KV head's codebook, at most one for 8 tokens", own=_SMALLER
    )
    distance: int = param(
        2048,
        ge=0,
        le=131072,
        unit="tokens",
        help="how far before a query every key counts as when scores are estimated",
        own=_MODEL,
    )

    def retrieve(self, study: Study, shapes: Sequence[Shape]) -> Index:
        def compute() -> dict[int, tuple[Codebook, Tensor]]:
            layers = study.trace.compressible
            track = study.progress.track(layers, "quantising keys", len(layers))
            return {layer.index: self._coded(layer) for layer in track}

        key = ("a2ats", self.codes, self.distance)
        return CodebookIndex(self.fetch, self.codes, study.trace.once(key, compute))

    def _coded(self, layer: LayerTrace) -> tuple[Codebook, Tensor]:
        book = Codebook.of(layer, codes_for(self.codes, layer.tokens), self.distance)
        return book, book.encode(layer.keys, torch.arange(layer.tokens, device=layer.device))


def codes_for(codes: int, tokens: int) -> int:
    """How many codes a prompt of so many tokens gets."""
    return max(min(codes, tokens // _LEAST), 1)


@dataclass(frozen=True)
class CodebookIndex(Index):
    """A codebook for each KV head on the device, and of each entry in host memory its code.

    books: by number of layer, with the codes [k, n] of the prompt's keys. What is needed to give new entries their
    codes lies in host memory.
    """

    fetch: float
    codes: int
    books: dict[int, tuple[Codebook, Tensor]] = field(compare=False, repr=False)

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        codes = codes_for(self.codes, shape.tokens)
        books = len(others) * Codebook.nbytes(shape.kv_heads, codes, shape.key_width)
        return books + int(others.sum()) * Codebook.code_dtype(codes).itemsize + index_nbytes(others)

    def host_nbytes(self, shape: Shape, others: Tensor) -> int:
        return len(others) * Codebook.host_nbytes(shape.kv_heads, shape.key_width)

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        book, codes = self.books[layer.index]
        return Coded(book, Rows.where(codes[..., None], others, codes.dtype), self.fetch)


class Coded(Retriever):
    """The codes [t, 1] of the entries in host memory."""

    def __init__(self, book: Codebook, codes: Rows, fetch: float) -> None:
        self.book, self.codes, self.fetch = book, codes, fetch
        self.tokens: int | None = None  # read so far, with this pass

    capturable = True

    def reads(self, ids: Tensor, positions: Tensor) -> None:
        self.tokens = int(positions[-1]) + 1

    def find_at(self, query: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        table = self.book.scores(query, positions)  # [k, g * q, c]
        known = self.tokens if positions.numel() == 1 else None  # then the device is not waited for
        wanted = max(int(self.fetch * (int(positions.max()) + 1 if known is None else known)), 1)
        return codebook_top(table, self.codes.ragged(), wanted, query.shape[1])

    @property
    def growing(self) -> tuple[Rows, ...]:
        return (self.codes,)

    def captured(self, steps: int, pin: Pin) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
        codes = pin(self.codes, self.codes.longest + steps)
        most = max(int(self.fetch * ((self.tokens or self.codes.longest) + steps)), 1)

        def find(query: Tensor, _scale: float) -> tuple[Tensor, Tensor]:
            table = self.book.scores(query, pin.position)
            wanted = ((pin.position + 1).double() * self.fetch).to(torch.int32).clamp_min_(1)
            return codebook_top(table, codes, most, 1, fewer=wanted)

        return find

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.codes.append(self.book.encode(keys, positions)[..., None])

    def tensors(self) -> list[Tensor]:
        return [self.book.entries, *self.codes.tensors()]

    def host_tensors(self) -> list[Tensor]:
        return [self.book.factor]

    def clone(self) -> Coded:
        twin = copy(self)
        twin.codes = self.codes.clone()
        return twin
