"""Core context aware attention."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.entry_budget import allowed_entries, windowed_attention
from workbench.attention.token_groups import groups_behind, split
from workbench.attention.visible_scores import VisibleScores
from workbench.core.bisection import largest
from workbench.core.causal_attention import causal_attention
from workbench.core.partial_softmax import ROWS, PartialSoftmax
from workbench.registry import Fidelity, Paper, param, register
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised
    from workbench.trace import LayerTrace

_GROUPS = (2, 4, 8, 16, 32, 64, 128, 256)
_CORES = 0.25  # of the entries that core tokens may take, where "auto" chooses the groups


@register
class CoreContext(AttentionMethod):
    """Let every query see its neighbourhood exactly, and of what is older one core token a group.

    Globality-aware pooling: the keys and values of a group are averaged with the weights that the query of the group's
    last token gives to the group's keys. Locality: a query sees the last `window` tokens as they are, and those before
    them up to the last whole group. One softmax runs over core tokens and neighbours together, so both are fused by
    differentiable weights (sections 3.2 to 3.4; keys are pooled after the rotary embedding, as the authors' code does).

    The paper trains the model for this. Without training two additions help a lot, and are made here: the first `sinks`
    tokens stay exact (0: as published), for attention sinks do not survive pooling, and a core token weighs as its
    whole group, log(group) being added to its score (`weight="token"`: as published). On the default model, with half
    of the entries, they bring the divergence from exact attention from 1.46 to 0.94 nats.

    With a budget the window is as wide as it allows; groups on "auto" are so large that core tokens take about a
    quarter of it.

    Decoding goes on so, with groups and window as they were for the prompt (a budget of 1: all is seen). Core tokens of
    old groups are held beside the cache, one for each query head, and counted as memory of attention: the cache is
    not made smaller here, and a KV method's budget does not include them. A group's last query gives its core token as
    it passes by, from scores that it computes anyway; of entries that a KV method has dropped by then nothing goes in.
    Core tokens of the prompt are those of its reading.
    """

    key = "cca"
    title = "Core context aware attention"
    paper = Paper(
        "Core Context Aware Transformers for Long Context Language Modeling", "Chen et al. 2024", "2412.12465"
    )
    claim = "5.7 times faster at 64k tokens"
    fidelity = Fidelity(
        "untrained part of a trained method", "the model was not trained with it; sinks and the size of groups count"
    )

    decodes: ClassVar[bool] = True
    follows_slopes: ClassVar[bool] = False  # a core token stands at no one position

    group: Literal["auto", 2, 4, 8, 16, 32, 64, 128, 256] = param(
        "auto",
        unit="tokens",
        help="tokens that one core token stands for: 16, or what suits the budget",
        own="the authors' code asks for it; 16 where nothing else says",
    )
    window: int = param(
        1024,
        ge=1,
        le=1_048_576,
        unit="tokens",
        help="how far back a query sees everything",
        own="the authors' code asks for it; with a budget it is as wide as that allows",
    )
    sinks: int = param(
        4,
        ge=0,
        le=4096,
        unit="tokens",
        help="first tokens that all see as they are",
        own="none as published: sinks do not survive pooling untrained (with `weight`: 1.46 nats become 0.94)",
    )
    weight: Literal["group", "token"] = param(
        "group",
        help="whether a core token weighs as its group or as one token",
        own="as published one token; untrained the size of its group counts (with `sinks`: 1.46 nats become 0.94)",
    )

    def entries(self, tokens: int, layers: int) -> int:
        return layers * self._shape(tokens).entries

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        shape = self._shape(query.shape[1])
        if scoring.window is not None:
            return windowed_attention(query, key, value, scoring, context, shape.entries)
        context.count(query.shape[0] * shape.entries)
        if shape.whole:
            return causal_attention(query, key, value, scoring)
        return core_attention(
            query,
            key,
            value,
            scoring,
            group=shape.group,
            window=shape.window,
            sinks=self.sinks,
            bias=math.log(shape.group) if self.weight == "group" else 0.0,
        )

    def begin(self, layer: LayerTrace, context: PassContext) -> None:
        context.state[self.key, context.layer] = _Cores.none(layer.device, layer)

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        out = torch.empty(*query.shape[:2], contents.values.shape[-1], dtype=query.dtype, device=query.device)
        shape = self._shape(context.tokens)
        cores = context.state.get((self.key, context.layer)) or _Cores.none(query.device)
        positions = context.positions.to(query.device)
        for start in range(0, query.shape[1], ROWS):
            stop = min(start + ROWS, query.shape[1])
            rows = query[:, start:stop].float() * scoring.scale
            seen, at_row = visible[:, start:stop], positions[start:stop]
            if self.whole:
                context.count_seen(len(query), seen)
                out[:, start:stop] = VisibleScores.of(rows, contents, seen, scoring, at_row).softmax().output(scoring)
                continue
            old = groups_behind(at_row, shape.group, shape.window, self.sinks)
            cores = cores.recalled(int(old[-1]), shape.group, self.sinks, query.dtype)
            ends = (at_row + 1 - self.sinks) // shape.group - 1  # the group that each query is the last of
            last = ((at_row + 1 - self.sinks) % shape.group == 0) & (ends >= 0)
            known = torch.cat([cores.groups, ends[last]])
            number = torch.div(contents.positions - self.sinks, shape.group, rounding_mode="floor")  # [k or 1, m]
            coarse = (contents.positions >= self.sinks) & torch.isin(number, known)
            seen = seen & ~(coarse[:, None] & (number[:, None] < old[:, None]))
            near = VisibleScores.of(rows, contents, seen, scoring, at_row)
            cores = cores.grown(near, contents, number, ends, last, query.dtype)
            context.count_seen(len(query), seen)
            part = near.softmax()
            hidden = cores.groups >= old[:, None]  # [r, m]
            if not bool(hidden.all()):
                bias = cores.sizes.log() if self.weight == "group" else torch.zeros_like(cores.sizes)
                part = part.merged(cores.softmax(rows, hidden, bias, scoring))
                context.count(len(query) * int((~hidden).sum()))
            out[:, start:stop] = part.output(scoring)
        context.state[self.key, context.layer] = cores
        return out

    def _shape(self, tokens: int) -> _Shape:
        """The groups and the window on a prompt of this length."""
        fixed = None if self.group == "auto" else self.group
        if self.budget is None:
            return self._with(tokens, fixed or 16, self.window)
        allowed = allowed_entries(self.budget, tokens)
        if allowed >= visible_entries(tokens):
            return self._with(tokens, fixed or 16, tokens)
        wanted = next((g for g in _GROUPS if g * _CORES * self.budget.amount >= 1), _GROUPS[-1])
        groups = (fixed,) if fixed else sorted(_GROUPS, key=lambda g: abs(math.log(g / wanted)))
        for group in groups:
            width = largest(partial(self._fits, tokens, group, allowed), 0, tokens + 1)
            if width:
                return self._with(tokens, group, width)
        return min((self._with(tokens, group, 1) for group in groups), key=lambda shape: shape.entries)

    def _fits(self, tokens: int, group: int, allowed: int, window: int) -> bool:
        return self._with(tokens, group, window).entries <= allowed

    def _with(self, tokens: int, group: int, window: int) -> _Shape:
        pairs = split(tokens, group, window, self.sinks)
        return _Shape(group, window, not pairs.groups, pairs.coarse + pairs.exact + pairs.groups * group)


class _Shape(NamedTuple):
    """Groups and window; whether everything is seen exactly; the entries a head computes, pooling included."""

    group: int
    window: int
    whole: bool
    entries: int


class _Cores(NamedTuple):
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
    def none(cls, device: torch.device, recorded: LayerTrace | None = None) -> _Cores:
        empty = torch.empty(0, device=device)
        return cls(torch.empty(0, dtype=torch.long, device=device), empty, empty, empty, recorded, 0)

    def recalled(self, behind: int, group: int, sinks: int, dtype: torch.dtype) -> _Cores:
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

    def grown(
        self, near: VisibleScores, contents: Dequantised, number: Tensor, ends: Tensor, last: Tensor, dtype: torch.dtype
    ) -> _Cores:
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

    def _with(self, groups: Tensor, keys: Tensor, values: Tensor, sizes: Tensor) -> _Cores:
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
