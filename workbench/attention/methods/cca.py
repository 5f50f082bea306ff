"""Core context aware attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.core_tokens import Cores, CoreShape, core_attention, widest_shape
from workbench.attention.entry_budget import allowed_entries, windowed_attention
from workbench.attention.token_groups import groups_behind
from workbench.attention.visible_scores import VisibleScores
from workbench.core.causal_attention import causal_attention
from workbench.core.partial_softmax import ROWS
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
        context.state[self.key, context.layer] = Cores.none(layer.device, layer)

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        out = torch.empty(*query.shape[:2], contents.values.shape[-1], dtype=query.dtype, device=query.device)
        shape = self._shape(context.tokens)
        cores = context.state.get((self.key, context.layer)) or Cores.none(query.device)
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
            cores, near, seen = cores.passed(
                rows, contents, seen, at_row, old, shape.group, self.sinks, scoring, query.dtype
            )
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

    def _shape(self, tokens: int) -> CoreShape:
        """The groups and the window on a prompt of this length."""
        fixed = None if self.group == "auto" else self.group
        if self.budget is None:
            return CoreShape.of(tokens, fixed or 16, self.window, self.sinks)
        allowed = allowed_entries(self.budget, tokens)
        if allowed >= visible_entries(tokens):
            return CoreShape.of(tokens, fixed or 16, tokens, self.sinks)
        wanted = next((g for g in _GROUPS if g * _CORES * self.budget.amount >= 1), _GROUPS[-1])
        groups = (fixed,) if fixed else sorted(_GROUPS, key=lambda g: abs(math.log(g / wanted)))
        return widest_shape(tokens, groups, allowed, self.sinks)
