"""The softmax of attention: whole, over a part of the keys, and of parts merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.scoring import Scoring, by_head, with_sinks


def attention_weights(
    products: Tensor, scoring: Scoring, visible: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """The softmax over all keys of products q k [..., q, m], float32 or wider, which are overwritten.

    visible: bool, broadcastable to [..., q, m]; None: everything is seen. Every query must see a key, unless an
    indexer chose what it sees: it then gets zeros. offsets: see `Scoring.bent`.
    """
    return normalised(scoring.scores(products, visible, offsets), scoring)


def normalised(scores: Tensor, scoring: Scoring) -> Tensor:
    """The softmax over all keys of scores [..., q, m], which are overwritten; with sinks rows sum to less than 1."""
    if scoring.sinks is None:
        return torch.softmax(scores, dim=-1) if scoring.chosen is None else partial_softmax(scores)[0]
    return torch.exp(scores.sub_(log_sums(scores, scoring)))


def log_sums(scores: Tensor, scoring: Scoring) -> Tensor:
    """The log-sum-exp of each row of scores [..., q, m], the sinks with them: [..., q, 1]."""
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return lse if scoring.sinks is None else torch.logaddexp(lse, by_head(scoring.sinks, scores))


def partial_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over some of the keys: weights [..., m] that add up to 1, and the log-sum-exp [...] of their scores.

    Where all scores are minus infinity, weights are zeros and the log-sum-exp is minus infinity.
    """
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - torch.where(lse.isinf(), 0, lse)[..., None]), lse


def attention_state(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scoring: Scoring,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query [h, q, d] over keys [k, m, d], values [k, m, dv] where visible [k, 1 or q, m]; h = g * k.

    Of `scoring` the window is not looked at: `visible` says what is seen. offsets int [k or 1, m], where there are
    slopes: see `Scoring.offsets`; states are merged only if they are measured from one query. Computed in float32, or
    float64 if the query is. Returns the output [h, q, dv] in the query's dtype and its log-sum-exp [h, q], with which
    states over other keys are merged (`merge_states`); a query that sees nothing gets zeros and minus infinity. Sinks
    are one key more of this state: of states that are merged let one have them (`Scoring.without_sinks`).
    """
    heads, count, width = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(dtype).reshape(keys.shape[0], -1, count, width)
    products = torch.einsum("kgqd,kmd->kgqm", grouped, keys.to(dtype))
    at = None if offsets is None else offsets[:, None, None]
    weights, lse = partial_softmax(scoring.scores(products, visible[:, None], at))
    out = torch.einsum("kgqm,kmd->kgqd", weights, values.to(dtype))
    return with_sinks(out.reshape(heads, count, -1), lse.reshape(heads, count), scoring, query.dtype)


def _takes_few(states: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return 1 < len(states) <= 4 and on_gpu(*(x for state in states for x in state))


@with_kernel("gpu.merge:merge_states", when=_takes_few)
def merge_states(states: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention [h, q, dv] over all keys, of its states over disjoint sets of them: outputs and log-sum-exps [h, q].

    Each query must see something in one of them.
    """
    first, _ = states[0]
    if len(states) == 1:
        return first
    shares = torch.softmax(torch.stack([lse for _, lse in states]), dim=0).to(first.dtype)
    parts = (out * share[..., None] for (out, _), share in zip(states, shares, strict=True))
    return sum(parts, torch.zeros_like(first))
