"""Where numbers are unusually large: channels, single activations, and tokens that draw attention.

These three decide what a compression method must treat with care: channels with outliers spoil a shared quantisation
scale, massive activations carry attention sinks, and sinks must survive every eviction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from workbench import arguments
from workbench.errors import InputError

# Statistics are taken in float64, this many bytes of channels at a time.
_CHUNK_BYTES = 4 * 2**20  # stays in the processor's cache
_CUDA_CHUNK_BYTES = 512 * 2**20  # on a GPU small pieces only wait for one another


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Statistics of each channel over the tokens. All fields have the shape of the input without its token axis."""

    absmax: Tensor
    """[..., channels] float32: the largest absolute value"""
    kurtosis: Tensor
    """[..., channels] float32: Pearson's, the fourth central moment over the squared variance: 3 for a normal
    distribution, 1.8 for a uniform one, large where few tokens are far out; not a number for a constant channel"""
    energy: Tensor
    """[..., channels] float32: the channel's share of the sum of squares over all channels (of the same head); adds up
    to 1, or to 0 where everything is zero"""

    def to_frame(self) -> pd.DataFrame:
        """One row a channel: channel, absmax, kurtosis, energy; before them `head`, or `axis0`, ... for more axes."""
        *leading, channels = self.absmax.shape
        names = ["head"] if len(leading) == 1 else [f"axis{i}" for i in range(len(leading))]
        index = pd.MultiIndex.from_product([range(n) for n in (*leading, channels)], names=[*names, "channel"])
        columns = {name: getattr(self, name).flatten().numpy() for name in ("absmax", "kurtosis", "energy")}
        return pd.DataFrame(columns, index=index).reset_index()


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Channel statistics of several layers, whose shapes may differ."""

    layers: Mapping[int, ChannelStats]

    def to_frame(self) -> pd.DataFrame:
        """The rows of every layer, with a first column `layer`."""
        frames = {layer: stats.to_frame() for layer, stats in self.layers.items()}
        if not frames:
            return pd.DataFrame(columns=["layer", "channel", "absmax", "kurtosis", "energy"])
        return pd.concat(frames, names=["layer"]).reset_index("layer").reset_index(drop=True)


class MassiveActivation(NamedTuple):
    """One value far above all others."""

    token: int
    channel: int
    value: float


@dataclass(frozen=True)
class MassiveActivations:
    """Massive activations of one hidden state, the largest first."""

    found: tuple[MassiveActivation, ...]
    limit: float
    """the absolute value that these exceed"""

    def __iter__(self) -> Iterator[MassiveActivation]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def to_frame(self) -> pd.DataFrame:
        """One row an activation: token, channel, value."""
        return pd.DataFrame(self.found, columns=list(MassiveActivation._fields))


class Sink(NamedTuple):
    """A token that draws attention whatever the query."""

    head: int
    token: int
    share: float
    """mean attention that it gets from the queries that can see it, 0 to 1"""


@dataclass(frozen=True)
class Sinks:
    """Attention sinks of one layer, by head, the strongest first."""

    found: tuple[Sink, ...]
    threshold: float

    def __iter__(self) -> Iterator[Sink]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def to_frame(self) -> pd.DataFrame:
        """One row a sink: head, token, share."""
        return pd.DataFrame(self.found, columns=list(Sink._fields))


def channel_stats(x: Tensor) -> ChannelStats:
    """Per-channel statistics of x [..., tokens, channels], any dtype.

    Hidden states are [n, c]; the keys or values of a layer [k, n, d], each KV head for itself; a weight [out, in] gives
    the statistics of its input channels over its outputs (transpose it for the other way round).
    """
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"channel statistics need a non-empty [..., tokens, channels], not {list(x.shape)}")
    x = x.detach()
    chunk = _CUDA_CHUNK_BYTES if x.is_cuda else _CHUNK_BYTES
    width = max(1, chunk * x.shape[-1] // (8 * x.numel()))
    parts = [_moments(part.double()) for part in x.split(width, dim=-1)]
    absmax, kurtosis, squares = (torch.cat(part, dim=-1).cpu() for part in zip(*parts, strict=True))
    energy = squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return ChannelStats(absmax.float(), kurtosis.float(), energy.float())


def layer_stats(layers: Mapping[int, Tensor]) -> LayerStats:
    """`channel_stats` of each layer's tensor: keys or values [k, n, d], activations [n, c], weights [out, in]."""
    return LayerStats({layer: channel_stats(x) for layer, x in layers.items()})


def massive_activations(x: Tensor, ratio: float = 1000.0, floor: float = 100.0) -> MassiveActivations:
    """Values of a hidden state x [n, c] above `floor` and at least `ratio` times its median magnitude.

    The definition of Sun et al. 2024 (arXiv:2402.17762): magnitude above 100 and around 1,000 times the median.
    """
    if x.ndim != 2:
        raise InputError(f"massive activations are looked for in one hidden state [n, c], not {list(x.shape)}")
    arguments.number("ratio", ratio, low=0, above=True)
    arguments.number("floor", floor, low=0)
    magnitude = x.detach().float().abs()
    if magnitude.numel() == 0 or magnitude.max() <= floor:  # the usual case: no need for the median
        return MassiveActivations((), floor)
    limit = max(floor, ratio * magnitude.median().item())
    found = [
        MassiveActivation(token, channel, x[token, channel].item())
        for token, channel in ((magnitude > floor) & (magnitude >= limit)).nonzero().tolist()
    ]
    return MassiveActivations(tuple(sorted(found, key=lambda a: -abs(a.value))), limit)


def sinks(
    column_sums: Tensor,
    *,
    queries_per_key: Tensor | None = None,
    threshold: float = 0.3,
    min_queries: int = 16,
) -> Sinks:
    """Tokens that draw more than `threshold` of the attention of those who can see them, on average.

    column_sums: [h, nk], from `workbench.measure.attention.column_sums`.
    queries_per_key: [nk] or [k, nk], from the function of that name; by default that of plain causal attention, nk - j
    for key j.
    threshold: 0.3 as in Gu et al. 2024 (arXiv:2410.10781); sinks as such are from Xiao et al. 2023 (arXiv:2309.17453).
    min_queries: keys seen by fewer queries are left out, because the last tokens have hardly anybody but themselves to
    look at them; at most half of the prompt is left out so.
    """
    if column_sums.ndim != 2:
        raise InputError(f"column_sums must be [h, nk], not {list(column_sums.shape)}")
    arguments.number("threshold", threshold, 0, 1, above=True)
    arguments.whole("min_queries", min_queries, low=1)
    h, nk = column_sums.shape
    counts = torch.arange(nk, 0, -1)[None] if queries_per_key is None else queries_per_key.reshape(-1, nk).cpu()
    if h % counts.shape[0]:
        raise InputError(f"queries_per_key has {counts.shape[0]} rows for {h} heads: give [nk] or [k, nk]")
    counts = counts.repeat_interleave(h // counts.shape[0], dim=0)  # [h, nk]
    share = column_sums.detach().float().cpu() / counts.clamp_min(1)
    enough = counts >= min(min_queries, math.ceil(nk / 2))
    found = [
        Sink(head, token, share[head, token].item())
        for head, token in ((share > threshold) & enough & (counts > 0)).nonzero().tolist()
    ]
    return Sinks(tuple(sorted(found, key=lambda s: (s.head, -s.share))), threshold)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax, kurtosis and sum of squares over the tokens of x [..., tokens, channels] float64."""
    absmax = x.abs().amax(-2)
    mean = x.mean(-2, keepdim=True)
    powers = (x - mean).square_()
    variance = powers.mean(-2)
    fourth = powers.square_().mean(-2)
    squares = (variance + mean.squeeze(-2).square()) * x.shape[-2]
    # A constant channel has no shape: what is left of it after the mean is taken off is only rounding.
    constant = variance.sqrt() <= 1e-12 * absmax
    return absmax, fourth / variance.masked_fill(constant, torch.nan).square(), squares
