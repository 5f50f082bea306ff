"""Core tokens, each for a group of old tokens: made as a prompt is read and as it goes on, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.attention.token_groups import groups_behind, split
from workbench.attention.visible_scores import VisibleScores
from workbench.core.bisection import largest
from workbench.core.partial_softmax import ROWS, PartialSoftmax
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised
    from workbench.trace import LayerTrace


class CoreShape(NamedTuple):
    """Groups and window; whether everything is seen exactly; the entries a head computes, pooling included."""

    group: int
    window: int
    whole: bool
    entries: int

    @classmethod
    def of(cls, tokens: int, group: int, window: int, sinks: int) -> CoreShape:
        pairs = split(tokens, group, window, sinks)
        return cls(group, window, not pairs.groups, pairs.coarse + pairs.exact + pairs.groups * group)


def widest_shape(tokens: int, groups: Sequence[int], allowed: int, sinks: int) -> CoreShape:
    """The widest window with which no more entries are computed than allowed, of the first group that has one.

    Where no group has one, the fewest entries.
    """

    def fits(group: int, window: int) -> bool:
        return CoreShape.of(tokens, group, window, sinks).entries <= allowed

    for group in groups:
        width = largest(partial(fits, group), 0, tokens + 1)
        if width:
            return CoreShape.of(tokens, group, width, sinks)
    return min((CoreShape.of(tokens, group, 1, sinks) for group in groups), key=lambda shape: shape.entries)


def core_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    group: int,
    window: int,
    sinks: int,
    bias: float,
) -> Tensor:
    """Attention [h, n, dv] over the core tokens of old groups, what follows them, and the first `sinks` tokens.

    query [h, n, d], key [k, n, d], value [k, n, dv]; bias: added to the scores of core tokens.
    """
    tokens, device = query.shape[1], query.device
    out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=device)
    groups = split(tokens, group, window, sinks).groups
    cores = core_tokens(query, key, value, sinks, groups, group, scoring)
    for start in range(0, tokens, ROWS):
        at_row = torch.arange(start, min(start + ROWS, tokens), device=device)
        stop = start + len(at_row)
        rows = query[:, start:stop].float() * scoring.scale
        old = groups_behind(at_row, group, window, sinks)
        fresh = torch.where(old > 0, sinks + old * group, 0)  # the first token seen as it is, sinks apart
        low, most = int(fresh[0]), int(old[-1])
        near = torch.arange(low, stop, device=device)
        hidden = (near > at_row[:, None]) | (near < fresh[:, None])
        part = PartialSoftmax.over(rows, key[:, low:stop], value[:, low:stop], scoring, hidden=hidden)
        if most:
            hidden = torch.arange(most, device=device) >= old[:, None]
            keys, values = (x[:, :most] for x in cores)
            part = part.merged(PartialSoftmax.over(rows, keys, values, scoring, hidden=hidden, bias=bias))
        if most and sinks:
            hidden = (old == 0)[:, None]  # seen as neighbours
            part = part.merged(PartialSoftmax.over(rows, key[:, :sinks], value[:, :sinks], scoring, hidden=hidden))
        out[:, start:stop] = part.output(scoring)
    return out


def core_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: int,
    groups: int,
    group: int,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Keys [h, m, d] and values [h, m, dv] of the m groups that follow each other from position `first` on: their
    tokens' average, weighted by the attention that the group's last query gives to them.
    """
    span = slice(first, first + groups * group)
    last = query[:, span].float()[:, group - 1 :: group] * scoring.scale  # [h, m, d]
    last = last.unflatten(0, (key.shape[0], -1)).transpose(1, 2)  # [k, m, g, d]
    keys, values = (x[:, span].float().unflatten(1, (groups, group)) for x in (key, value))  # [k, m, c, d]
    weights = scoring.cap(last @ keys.transpose(2, 3)).softmax(dim=-1)  # [k, m, g, c]
    pooled = ((weights @ x).transpose(1, 2).flatten(0, 1) for x in (keys, values))
    return next(pooled), next(pooled)


class Cores(NamedTuple):
    """The core tokens of one layer that decoding has so far.

    groups int64 [m]: which groups they are of, ascending. keys [h, m, d] and values [h, m, dv]; sizes float32 [h, m]:
    of how many tokens they are made. recorded: the prompt, of whose groups those before `ready` have been made; they
    are made when they are needed, for until they lie behind the window nothing looks at them.
    """

    groups: Tensor
    keys: Tensor
    values: Tensor
    sizes: Tensor
    recorded: LayerTrace | None
    ready: int

    @classmethod
    def none(cls, device: torch.device, recorded: LayerTrace | None = None) -> Cores:
        empty = torch.empty(0, device=device)
        return cls(torch.empty(0, dtype=torch.long, device=device), empty, empty, empty, recorded, 0)

    def recalled(self, behind: int, group: int, sinks: int, dtype: torch.dtype) -> Cores:
        """With the core tokens of those of the prompt's whole groups that lie among the first `behind`."""
        layer = self.recorded
        if layer is None or (ready := min(behind, max(layer.tokens - sinks, 0) // group)) <= self.ready:
            return self
        more = ready - self.ready
        made = core_tokens(
            layer.queries,
            layer.keys,
            layer.values,
            sinks + self.ready * group,
            more,
            group,
            layer.scoring,
        )
        groups = torch.arange(self.ready, ready, device=layer.device)
        sizes = torch.full((layer.heads, more), float(group), device=layer.device)
        return self._with(groups, made[0].to(dtype), made[1].to(dtype), sizes)._replace(ready=ready)

    def passed(
        self,
        rows: Tensor,
        contents: Dequantised,
        seen: Tensor,
        at_row: Tensor,
        old: Tensor,
        group: int,
        sinks: int,
        scoring: Scoring,
        dtype: torch.dtype,
    ) -> tuple[Cores, VisibleScores, Tensor]:
        """With those of the groups that scaled rows [h, r, d] at positions [r] are the last of; the rows' scores on
        what they see as it is, and what that is, bool [k, r, m].

        seen: what of `contents` they could see; of the first `old` [r] groups that have core tokens they see these.
        """
        ends = (at_row + 1 - sinks) // group - 1  # the group that each query is the last of
        last = ((at_row + 1 - sinks) % group == 0) & (ends >= 0)
        known = torch.cat([self.groups, ends[last]])
        number = torch.div(contents.positions - sinks, group, rounding_mode="floor")  # [k or 1, m]
        coarse = (contents.positions >= sinks) & torch.isin(number, known)
        seen = seen & ~(coarse[:, None] & (number[:, None] < old[:, None]))
        near = VisibleScores.of(rows, contents, seen, scoring, at_row)
        return self.grown(near, contents, number, ends, last, dtype), near, seen

    def grown(
        self, near: VisibleScores, contents: Dequantised, number: Tensor, ends: Tensor, last: Tensor, dtype: torch.dtype
    ) -> Cores:
        """With those of the groups `ends` [r] where a query is the `last` [r] of its group.

        near: what the queries see of what is held; number int [k or 1, m]: the group of each slot held.
        """
        cores = self
        kv_heads, heads = len(near.slots), len(near.scores)
        inside = number.expand(kv_heads, -1).gather(1, near.slots)  # [k, c]
        for row in last.nonzero()[:, 0].tolist():
            scores = near.scores[:, row].view(kv_heads, -1, near.slots.shape[1])  # [k, g, c]
            members = (inside == ends[row])[:, None] & (scores > -torch.inf)
            weights = scores.masked_fill(~members, -torch.inf).softmax(dim=-1)
            keys = contents.keys.gather(1, near.slots[..., None].expand(-1, -1, contents.keys.shape[-1]))
            made = ((weights @ x.float()).flatten(0, 1)[:, None].to(dtype) for x in (keys, near.values))
            sizes = members.sum(dim=-1).float().reshape(heads, 1)
            cores = cores._with(ends[row : row + 1], next(made), next(made), sizes)
        return cores

    def _with(self, groups: Tensor, keys: Tensor, values: Tensor, sizes: Tensor) -> Cores:
        if not len(self.groups):
            return self._replace(groups=groups, keys=keys, values=values, sizes=sizes)
        order = torch.cat([self.groups, groups]).argsort()
        joined = (torch.cat(pair, dim=1)[:, order] for pair in ((self.keys, keys), (self.values, values)))
        return self._replace(
            groups=torch.cat([self.groups, groups])[order],
            keys=next(joined),
            values=next(joined),
            sizes=torch.cat([self.sizes, sizes], dim=1)[:, order],
        )

    def softmax(self, rows: Tensor, hidden: Tensor, bias: Tensor, scoring: Scoring) -> PartialSoftmax:
        """What scaled rows [h, r, d] get from those not hidden [r, m]; bias [h, m] is added to their scores."""
        most = int((~hidden).any(dim=0).sum())  # those seen come first, for they ascend
        keys, values = self.keys[:, :most], self.values[:, :most]
        scores = torch.bmm(rows, keys.float().transpose(1, 2))  # [h, r, m]
        scores = scoring.cap(scores)
        scores += bias[:, None, :most]
        return PartialSoftmax.of_scores(scores.masked_fill_(hidden[:, :most], -torch.inf), values)
