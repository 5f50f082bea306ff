"""What kinds of attention heads there are, and the statistics that tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from workbench import arguments
from workbench.errors import BadParameter, InputError
from workbench.formatting import Brief

HeadClass = Literal["retrieval", "sink", "local", "contextual", "structural"]


@dataclass(frozen=True)
class Thresholds:
    """From when on a head belongs to a class. Classes are tried in the order of these fields."""

    retrieval: float = 0.2
    """share of attention on tokens that followed the query's token before"""
    sink: float = 0.5
    """share of attention on the first tokens"""
    local: float = 0.5
    """share of attention on the most recent tokens"""
    contextual: float = 0.5
    """share of all heads, those whose attention differs least from query to query, that count as contextual (HACK);
    the others are structural. Only what no other class has taken is called either"""

    def __post_init__(self) -> None:
        for each in fields(self):
            arguments.number(f"the threshold {each.name}", getattr(self, each.name), 0, 1)


@dataclass(frozen=True, eq=False, repr=False)
class HeadStats(Brief):
    """Where the attention of heads goes, as means over the queries: of one layer [h], or of a model [l, h].

    Queries that see no key, because all of them were evicted, are left out of every mean.
    """

    entropy: Tensor
    """[..., h] in nats: 0 for heads that always look at one token"""
    sink: Tensor
    """[..., h] share that goes to the first `sinks` positions, of the queries after them (Xiao et al. 2023,
    arXiv:2309.17453); not a number where there is none"""
    local: Tensor
    """[..., h] share that goes less than `recent` tokens back, of the queries that have as many before them; not a
    number where there is none"""
    retrieval: Tensor
    """[..., h] share that goes to tokens right after an earlier occurrence of the query's own token, of the queries
    that see one: how much the head looks where induction would copy from, the prefix matching of Olsson et al. 2022
    (arXiv:2209.11895), on the prompt itself and not on repeated random tokens; not a number where no token occurs
    again"""
    distance: Tensor
    """[..., h] mean distance between query and key, in tokens"""
    variance: Tensor
    """[..., h] variance over probing queries of the attention that a position gets, summed over positions: HACK's
    measure (arXiv:2504.09261), small for heads that look at the same tokens from everywhere"""
    profile: Tensor
    """[..., h, bins] share of the attention by distance: in bin 0 the token itself, in bin b > 0 the distances from
    2 ** (b - 1) to 2 ** b - 1; adds up to 1"""

    @property
    def bins(self) -> list[tuple[int, int]]:
        """The distances of each bin of the profile, half-open: (0, 1), (1, 2), (2, 4), (4, 8), ..."""
        return [(0, 1), *((2 ** (b - 1), 2**b) for b in range(1, self.profile.shape[-1]))]

    def classes(self, thresholds: Thresholds | None = None) -> list[list[HeadClass]]:
        """The class of each head of a model, [l][h]: the first in the order of `Thresholds` that it meets.

        Retrieval heads are known here by how they read this prompt. HeadKV (`workbench.kv.methods.allocate.headkv`)
        measures whether a head copies the answers of needle tasks instead, which costs readings of their own, and is
        about the model, not the prompt.
        """
        if self.entropy.ndim != 2:
            raise InputError("classes are about all layers of a model: stack the layers' statistics first")
        limits = thresholds or Thresholds()
        vertical = contextual(self.variance, limits.contextual)
        layers, heads = self.entropy.shape
        classes: list[list[HeadClass]] = [
            ["contextual" if vertical[layer, head] else "structural" for head in range(heads)]
            for layer in range(layers)
        ]
        names: tuple[HeadClass, ...] = ("local", "sink", "retrieval")  # the first to be tried is the last to be written
        for name in names:
            for layer, head in (getattr(self, name) >= getattr(limits, name)).nonzero().tolist():
                classes[layer][head] = name
        return classes

    def to_frame(
        self,
        kv_heads: int | Sequence[int],
        thresholds: Thresholds | None = None,
        *,
        numbers: Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """One row a layer and query head: layer, head, kv_head, entropy, sink, local, retrieval, distance, class.

        kv_heads: how many KV heads each layer has, one number for all or one a layer. numbers: what the layers are
        called (default: from 0 on).
        """
        layers, heads = self.entropy.shape
        counts: list[Any] = list(kv_heads) if isinstance(kv_heads, list | tuple) else [kv_heads] * layers
        if len(counts) != layers:
            raise BadParameter(
                f"kv_heads has {len(counts)} numbers for {layers} layers: give one for each, or one for all"
            )
        for count in counts:
            if heads % arguments.whole("kv_heads", count, 1, heads):
                raise BadParameter(f"kv_heads is {count}: {heads} query heads cannot share so many KV heads")
        head = torch.arange(heads)
        columns = {name: getattr(self, name).flatten().numpy() for name in _COLUMNS}
        classes = [name for layer in self.classes(thresholds) for name in layer]
        return pd.DataFrame(
            {
                "layer": torch.tensor(list(numbers or range(layers))).repeat_interleave(heads).numpy(),
                "head": head.repeat(layers).numpy(),
                "kv_head": torch.cat([head // (heads // count) for count in counts]).numpy(),
                **columns,
                "class": classes,
            }
        )

    @classmethod
    def join(cls, parts: Sequence[HeadStats], how: Callable[[list[Tensor]], Tensor] = torch.stack) -> HeadStats:
        """The statistics of a model from its layers'; how: torch.cat for those of a layer from its heads'."""
        return cls(**{each.name: how([getattr(part, each.name) for part in parts]) for each in fields(cls)})


_COLUMNS = ("entropy", "sink", "local", "retrieval", "distance")


def contextual(variance: Tensor, share: float) -> Tensor:
    """Which heads are contextual: the `share` of all of them with the smallest variances, bool like `variance`.

    HACK (Qin et al. 2025, arXiv:2504.09261) calls contextual the heads whose attention forms vertical patterns, the
    same tokens from every query, and structural those with diagonal patterns.
    """
    number = round(arguments.number("share", share, 0, 1) * variance.numel())
    chosen = torch.zeros(variance.numel(), dtype=torch.bool)
    chosen[variance.cpu().flatten().argsort(stable=True)[:number]] = True
    return chosen.view(variance.shape)
