"""What compression cost: how far logits, tokens and attention outputs are from the uncompressed run's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError

# Two float64 log-softmaxes and their product live at a time.
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Quality:
    """A run against the reference, both teacher-forced on the same continuation of `tokens` tokens."""

    tokens: int
    kl: float
    """mean KL(reference || run), nats a token"""
    kl_max: float
    """the worst token's"""
    top1_agreement: float
    """share of tokens where both would choose the same next token, 0 to 1"""
    nll_reference: float
    """mean negative log-likelihood of the targets, nats a token"""
    nll: float
    first_divergence: int | None = None
    """index of the first generated token that differs; None where they agree throughout or were not compared"""

    @property
    def nll_difference(self) -> float:
        """How much worse the targets became, nats a token; negative where the run happens to do better."""
        return self.nll - self.nll_reference

    @property
    def perplexity_reference(self) -> float:
        return _exp(self.nll_reference)

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)

    def __str__(self) -> str:
        where = "same tokens" if self.first_divergence is None else f"differs from token {self.first_divergence + 1}"
        worse = f"{self.nll_difference:+.2f} NLL"
        return f"KL {self.kl:.3f}, {self.top1_agreement:.0%} of top tokens agree, {worse}, {where}"

    def to_dict(self) -> dict[str, Any]:
        """All figures, the derived ones too, ready for JSON."""
        derived = ("nll_difference", "perplexity_reference", "perplexity")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def compare_logits(
    reference: Tensor,
    logits: Tensor,
    targets: Tensor,
    *,
    reference_tokens: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Quality:
    """Compare the logits of a run with the reference's, token by token.

    reference, logits: [t, v], any dtype; row i predicts targets[i]. targets: [t] token ids. Probabilities are computed
    in float64, a few rows at a time, so memory does not grow with t.
    reference_tokens, tokens: what both runs generated greedily, for `first_divergence`. device: where to compute, by
    default where the reference lies.
    """
    if reference.ndim != 2 or reference.shape != logits.shape or targets.shape != reference.shape[:1]:
        raise InputError(
            f"logits must be [t, v] twice with targets [t], not {list(reference.shape)}, {list(logits.shape)} and "
            f"{list(targets.shape)}"
        )
    t, v = reference.shape
    if t == 0:
        raise InputError("quality needs at least one token to predict; give a longer continuation")
    if not bool(((targets >= 0) & (targets < v)).all()):
        raise InputError(f"targets must be token ids from 0 to {v - 1}")

    kl = torch.empty(t, dtype=torch.float64)
    nll = torch.empty(2, t, dtype=torch.float64)
    agreed = 0
    step = max(1, _CHUNK_BYTES // (3 * 8 * v))
    for start in range(0, t, step):
        rows = slice(start, start + step)
        p = torch.log_softmax(
            reference[rows].detach().to(device or reference.device), dim=-1, dtype=torch.float64
        )  # [step, v]
        q = torch.log_softmax(logits[rows].detach().to(p.device), dim=-1, dtype=torch.float64)
        target = targets[rows].to(p.device)[:, None]
        nll[0, rows] = -p.gather(1, target)[:, 0].cpu()
        nll[1, rows] = -q.gather(1, target)[:, 0].cpu()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        kl[rows] = divergence(p, q).cpu()
    return Quality(
        tokens=t,
        kl=kl.mean().item(),
        kl_max=kl.max().item(),
        top1_agreement=agreed / t,
        nll_reference=nll[0].mean().item(),
        nll=nll[1].mean().item(),
        first_divergence=None
        if reference_tokens is None or tokens is None
        else first_divergence(reference_tokens, tokens),
    )


def first_divergence(reference: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Index of the first token that differs; None for equal sequences.

    Where one is only longer than the other, that is the length of the shorter one: there it stopped and the other did
    not.
    """
    for i, (a, b) in enumerate(zip_longest(reference, tokens)):
        if a is None or b is None or int(a) != int(b):
            return i
    return None


def output_error(reference: Tensor, other: Tensor) -> Tensor:
    """Relative L2 error of each head's output: [h] float32, for outputs [h, t, d] of any dtype.

    The norm of the difference over the norm of the reference, both over all tokens and channels of the head. Where the
    reference is zero: 0 if the other is zero too, else infinity. Heads that weight methods made narrower or wider have
    no common channels: their error is not a number.
    """
    if reference.ndim != 3 or other.ndim != 3 or reference.shape[:2] != other.shape[:2]:
        raise InputError(f"outputs must both be [h, t, d], not {list(reference.shape)} and {list(other.shape)}")
    if reference.shape[2] != other.shape[2]:
        return torch.full((len(reference),), torch.nan, device=reference.device)
    reference, other = reference.detach().float(), other.detach().float()
    error = torch.linalg.vector_norm(other - reference, dim=(1, 2))
    size = torch.linalg.vector_norm(reference, dim=(1, 2))
    return torch.where(error == 0, error, error / size)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [t, v]: [t]. Overwrites q."""
    chance = p.exp()
    # A token that p rules out adds nothing, whatever q says (0 * inf would not be a number).
    gap = torch.sub(p, q, out=q).masked_fill_(chance == 0, 0.0)
    return gap.mul_(chance).sum(-1).clamp_min_(0.0)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
