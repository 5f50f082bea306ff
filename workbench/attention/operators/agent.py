"""Agent Attention."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attention.operators.base import Operator, check, chunks, hide_later, per_head
from workbench.attention.operators.landmarks import epochs, means
from workbench.core.partial_softmax import PartialSoftmax
from workbench.registry import Fidelity, Paper, Preset, param, register

_GROWTH = 600.0  # exp(709) is the largest number


@register
class AgentAttention(Operator):
    """Let a few agents attend to all tokens, and every token only to the agents.

    Agents are queries averaged over segments. Each takes a softmax over the keys, each query a softmax over the
    agents, and the implied map is the product of both (the paper's equation 4). Rows sum to 1.

    The paper is bidirectional and pools all queries into `agents` tokens. Causal form: a query uses the agents of
    segments that are complete, and their softmax runs over the keys up to the query; a running sum for each agent
    carries it on. As the past grows, agents are thinned out so that at most `agents` lie evenly over it (see
    `landmarks.epochs`): time is linear in the length. Until the first segment is complete, the first query is the
    agent. Biases (eight small tables
    of positions, which the authors' code draws with a deviation of 0.02 and interpolates to the image) stand at zero:
    untrained they say nothing. The depthwise convolution of the values, trained too, is left out. In float64, on
    any device: flash-linear-attention has no kernel for it.
    """

    key = "agent-attention"
    title = "Agent Attention"
    paper = Paper(
        "Agent Attention: On the Integration of Softmax and Linear Attention", "Han et al. 2023", "2312.08874"
    )
    claim = "linear complexity with a global receptive field; faster and more accurate vision models"
    fidelity = Fidelity(
        "untrained part of a trained method",
        "biases stand at zero, the values' convolution is absent: both are trained; pooling is made causal",
    )
    presets = (
        Preset("deit", "LeapLabTHU/Agent-Attention, agent_transformer/cfgs/agent_deit_t.yaml, 207ce3e", agents=49),
    )

    agents: int = param(49, ge=1, le=4096, unit="tokens", help="agents at most")
    segment: int = param(
        16,
        ge=1,
        le=65536,
        unit="tokens",
        help="queries that an agent is the mean of",
        own="the paper pools an image of known size into its agents; a causal pool has to choose a width",
    )

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        query, key = q[:, :stop].double() * scale, per_head(k[:, :stop], len(q)).double()
        weights = torch.zeros(len(q), stop - first, stop, device=q.device)
        for start, end, members in epochs(stop, self.segment, self.agents):
            if end <= first:
                continue
            low = max(start, first)
            agents = means(query, self.segment, members)  # [h, a, d]
            scores = agents @ key[:, :end].transpose(1, 2)  # [h, a, end]
            total = scores.logcumsumexp(-1)  # of the keys up to each query
            asked = _ask(query[:, low:end], agents, scale)  # [h, r, a]
            for begin, to in _steady(total[..., low:]):
                rows, size = slice(low + begin, low + to), total[..., low + to - 1 : low + to]
                part = asked[:, begin:to] * (size - total[..., rows]).exp().transpose(1, 2)
                part = hide_later(part @ (scores[..., : rows.stop] - size).exp(), rows.start)
                weights[:, rows.start - first : rows.stop - first, : rows.stop] = part.float()
        return weights

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        check(q, k, v)
        query, key = q.double() * scale, per_head(k, len(q)).double()
        value = per_head(torch.nn.functional.pad(v, (0, 1), value=1.0), len(q)).double()  # the ones count the weights
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
        before: tuple[int, ...] = ()
        highest, sums = _past(query[:, :0], key[:, :0], value[:, :0], self.chunk)
        for start, end, members in epochs(q.shape[1], self.segment, self.agents):
            agents = means(query, self.segment, members)
            stay = [before.index(member) for member in members if member in before]
            fresh = _past(agents[:, len(stay) :], key[:, :start], value[:, :start], self.chunk)
            highest = torch.cat([highest[:, stay], fresh[0]], dim=1)  # [h, a, 1]
            sums = torch.cat([sums[:, stay], fresh[1]], dim=1)  # [h, a, dv + 1]
            for low, high in chunks(start, end, self.chunk):
                scores = agents @ key[:, low:high].transpose(1, 2)  # [h, a, c]
                total = torch.logaddexp(highest + sums[..., -1:].log(), scores.logcumsumexp(-1))
                asked = _ask(query[:, low:high], agents, scale)  # [h, c, a]
                for begin, to in _steady(total):
                    part, rows, size = slice(begin, to), slice(low + begin, low + to), total[..., to - 1 : to]
                    sums, highest = sums * (highest - size).exp(), size
                    lifted, near = (scores[..., part] - size).exp(), value[:, rows]
                    share = asked[:, part] * (size - total[..., part]).exp().transpose(1, 2)
                    mixed = share @ sums[..., :-1] + (share @ lifted).tril_() @ near[..., :-1]
                    out[:, rows] = mixed.to(out.dtype)
                    sums = sums + lifted @ near
            before = members
        return out


def _ask(query: Tensor, agents: Tensor, scale: float) -> Tensor:
    """Each query's softmax over the agents, [h, n, a]; both come scaled."""
    return (query @ agents.transpose(1, 2) / scale).softmax(-1)


def _steady(total: Tensor) -> list[tuple[int, int]]:
    """Ranges of queries within which no agent's sum of exponentials, whose logarithms [h, a, r] ascend, grows by more
    than float64 can hold; one, unless scores are very large.
    """
    ranges, left = [], [(0, total.shape[-1])]
    while left:
        low, high = left.pop()
        if high - low == 1 or float((total[..., high - 1] - total[..., low]).max()) < _GROWTH:
            ranges.append((low, high))
        else:
            middle = (low + high) // 2
            left += [(middle, high), (low, middle)]
    return ranges


def _past(agents: Tensor, key: Tensor, value: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """What each agent has gathered from the keys: its highest score [h, a, 1] and the sums of values, [h, a, dv + 1],
    weighted by exp(score - highest).
    """
    softmax = PartialSoftmax.over_nothing(agents, value.shape[-1])
    for low, high in chunks(0, key.shape[1] if agents.shape[1] else 0, chunk):
        softmax = softmax.extended(agents @ key[:, low:high].transpose(1, 2), value[:, low:high])
    return softmax.maximum, softmax.weighted
