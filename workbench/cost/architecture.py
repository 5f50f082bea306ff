"""What of a model decides what it costs: what each layer keeps of a text, and the matrices that it multiplies by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from workbench.engine.latents import Expansion, Latents
from workbench.models import Facts
from workbench.prompt import Prompt
from workbench.runtime.prefill import exact_layers
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a text of n tokens.

    layer: as the model calls it. kv_heads, key_width, value_width: of its own keys and values, 0 where it has none.
    entry: numbers that its model's own cache holds of a token, fewer than those of all heads where that holds latents.
    window, chunk: how many positions a query sees; None: all. shared: the earlier layer whose keys and values it reads.
    state_nbytes: of a state of one size, whatever n is; token_nbytes: of what grows by a token beside keys and values
    (an indexer's keys). latent: r and d_r, numbers of a latent row and of its rotated one, of which all heads make
    their keys and values (MLA).
    """

    layer: int
    kv_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    entry: int = 0
    window: int | None = None
    chunk: int | None = None
    shared: int | None = None
    state_nbytes: int = 0
    token_nbytes: int = 0
    latent: tuple[int, int] | None = None

    @property
    def attends(self) -> bool:
        """Whether it has attention, over its own keys and values or another layer's."""
        return self.kv_heads > 0 or self.shared is not None

    @property
    def holds_rows(self) -> bool:
        """Whether its cache holds latent rows in place of keys and values."""
        return self.latent is not None and self.entry == sum(self.latent)

    def held(self, tokens: int) -> int:
        """How many positions it holds of so many."""
        held = tokens if self.window is None else min(tokens, self.window)
        return held if self.chunk is None else min(held, (tokens - 1) % self.chunk + 1)

    def kind(self, heads: int) -> str:
        """In the field's words, of a model with so many query heads."""
        if self.shared is not None:
            return f"shares the KV of layer {self.shared}"
        if not self.kv_heads:
            return "state" if self.state_nbytes else "no cache"
        grouping = "MHA" if self.kv_heads == heads else "MQA" if self.kv_heads == 1 else "GQA"
        words = ["MLA" if self.latent else grouping]
        words += [f"window {self.window:,}"] if self.window else []
        words += [f"chunks of {self.chunk:,}"] if self.chunk else []
        words += ["a state beside it"] if self.state_nbytes else []
        return ", ".join(words)


@dataclass(frozen=True)
class Matrix:
    """Weights that a token is multiplied by: `experts` matrices of `rows` outputs and `columns` inputs.

    name: within its layer. nbytes: of all together, as they lie in memory. share: how much of them a token uses: 1, or
    the experts that act of those there are. path: its module's full name.
    """

    name: str
    rows: int
    columns: int
    nbytes: int
    path: str = ""
    experts: int = 1
    share: float = 1.0

    @property
    def flops(self) -> float:
        """Operations of one token."""
        return 2 * self.rows * self.columns * self.experts * self.share

    def read_nbytes(self, tokens: int) -> float:
        """Bytes that so many tokens together are expected to read, where each draws its experts evenly."""
        return self.nbytes * (1 - (1 - self.share) ** tokens)


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    facts: sizes as its config has them. itemsize: bytes of a number that it computes with. weight_nbytes: of all
    parameters, tied ones once. matrices: those that tokens of text are multiplied by, the output head last; an
    embedding is looked up. intermediate: what a layer's MLP widens a token to,
    of all experts that act; gated: by two matrices, whose products are multiplied.
    """

    name: str
    facts: Facts
    dtype: torch.dtype
    layers: tuple[CacheLayer, ...]
    matrices: tuple[Matrix, ...]
    weight_nbytes: int
    intermediate: int
    gated: bool = True

    @property
    def query_width(self) -> int:
        """Numbers of a query head: those of a key that it is compared with."""
        return max((layer.key_width for layer in self.layers), default=0)

    @property
    def value_width(self) -> int:
        """Numbers of a value head."""
        return max((layer.value_width for layer in self.layers), default=0)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of all experts together."""
        return sum(matrix.nbytes for matrix in self.matrices if matrix.share < 1)

    def trace(self, tokens: int, dtype: torch.dtype) -> Trace:
        """The shapes of a reading of so many tokens, without a number in them, as planning wants them."""
        layers: list[LayerTrace] = []
        places: dict[int, int] = {}
        nothing = Expansion(nn.Identity(), dtype, linear=True)  # of rows without numbers
        for each in self.layers:
            if not each.attends:
                continue
            places[each.layer] = len(layers)
            source = self._of(each.shared) if each.shared is not None else each
            scoring = Scoring(scale=1.0, window=each.window, chunk=each.chunk)
            layers.append(
                LayerTrace(
                    index=len(layers),
                    keys_held=torch.empty(source.kv_heads, tokens, source.key_width, dtype=dtype, device="meta"),
                    values_held=torch.empty(source.kv_heads, tokens, source.value_width, dtype=dtype, device="meta"),
                    queries_held=torch.empty(self.facts.heads, tokens, source.key_width, dtype=dtype, device="meta"),
                    device=torch.device("cpu"),
                    scoring=scoring,
                    shared=None if each.shared is None else places[each.shared],
                    number=each.layer,
                    latents=None if not each.holds_rows else Latents(*_rows(each.latent, tokens, dtype), nothing),
                )
            )
        exact = exact_layers(layers, None)
        if len({layer.latents is None for layer in layers if layer.index not in exact}) > 1:  # plans are of one kind
            layers = [layer if layer.index in exact else replace(layer, latents=None) for layer in layers]
        prompt = Prompt(torch.empty(tokens, dtype=torch.int64, device="meta"), chat=False)
        logits = torch.empty(self.facts.vocab_size, device="meta")
        return Trace(prompt, tuple(layers), logits, 0.0, exact)

    def _of(self, number: int) -> CacheLayer:
        return next(layer for layer in self.layers if layer.layer == number)

    def kv_nbytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the keys and values that the model's own cache holds of so many tokens."""
        return sum(layer.held(tokens) * layer.entry for layer in self.layers) * dtype.itemsize

    def heads_nbytes(self, tokens: int, dtype: torch.dtype) -> int:
        """The same where every head is held: more for latent attention (MLA)."""
        widths = (layer.held(tokens) * layer.kv_heads * (layer.key_width + layer.value_width) for layer in self.layers)
        return sum(widths) * dtype.itemsize

    def latent_nbytes(self, tokens: int, dtype: torch.dtype) -> int | None:
        """The same where latent attention holds latents and rotated keys; None where there is none."""
        if not any(layer.latent for layer in self.layers):
            return None
        numbers = (layer.held(tokens) * (sum(layer.latent or ()) or layer.entry) for layer in self.layers)
        return sum(numbers) * dtype.itemsize

    def state_nbytes(self, tokens: int) -> int:
        """Bytes of what layers keep beside keys and values, or in their place, after so many tokens."""
        return sum(layer.state_nbytes + tokens * layer.token_nbytes for layer in self.layers)


def _rows(latent: tuple[int, int] | None, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latent and rotated rows [1, n, r], [1, n, d_r] without numbers."""
    assert latent is not None
    rank, rotated = (torch.empty(1, tokens, width, dtype=dtype, device="meta") for width in latent)
    return rank, rotated
