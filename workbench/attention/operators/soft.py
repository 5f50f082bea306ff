"""SOFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.attention.operators.base import Operator, check, chunks, hide_later, per_head
from workbench.attention.operators.landmarks import epochs, means
from workbench.registry import Fidelity, Paper, Preset, param, register

_RIDGE = 0.01  # put on the diagonal before inverting, as in the authors' code


@register
class SOFT(Operator):
    """Gaussian kernels in place of the softmax, at low rank through a few landmarks.

    The kernel is exp(-|q - k|^2 * scale / 2). Its matrix is approximated by K(q, l) K(l, l)^-1 K(l, k) over landmarks
    l (Nystroem), the inverse by `iterations` steps of Newton and Raphson (the paper's algorithm 1). The paper's queries
    are its keys; here landmarks are means of keys over segments, so that with as many landmarks as keys the kernel is
    whole. Rows may have negative entries.

    Causal form: a query uses landmarks of segments that are complete, at most `landmarks` of them, evenly over its past
    (see `landmarks.epochs`; the first key until there is one), and sums over the keys up to its own. The authors' code
    pools landmarks by a trained convolution, a norm and a GELU, and adds another convolution of the values: these have
    no values without training, and are left out. Its 20 Newton steps, where they begin, and its ridge are kept. Queries
    and keys of a language model lie so far apart that the kernel itself vanishes; with `normalise` each row is divided
    by its sum. In float64, on any device: flash-linear-attention has no kernel for it.
    """

    key = "soft"
    title = "SOFT"
    paper = Paper("SOFT: Softmax-free Transformer with Linear Complexity", "Lu et al. 2021", "2110.11945")
    claim = "linear complexity; no softmax, at the accuracy of vision transformers"
    fidelity = Fidelity(
        "untrained part of a trained method",
        "landmarks are means in place of a trained convolution; rows are divided by their sum; queries are not keys",
    )
    presets = (
        Preset(
            "soft",
            "fudan-zvg/SOFT, models/softmax_free_transformer.py (second stage: 784 tokens, ratio 4), d3febc3",
            landmarks=49,
            segment=16,
            iterations=20,
        ),
    )

    landmarks: int = param(49, ge=1, le=512, unit="tokens", help="landmarks at most")
    segment: int = param(16, ge=1, le=65536, unit="tokens", help="keys that a landmark is the mean of")
    iterations: int = param(20, ge=1, le=200, help="steps towards the inverse")
    normalise: bool = param(
        True,
        help="divide each row by its sum; the paper does not",
        own="queries and keys of a language model lie so far apart that the kernel itself vanishes",
    )

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        query, key = self._near(q[:, :stop], scale), self._near(per_head(k[:, :stop], len(q)), scale)
        weights = torch.zeros(len(q), stop - first, stop, device=q.device)
        for start, end, members in epochs(stop, self.segment, self.landmarks):
            if end <= first:
                continue
            low = max(start, first)
            marks = means(key, self.segment, members)
            part = self._asked(query[:, low:end], marks) @ _kernel(marks, key[:, :end])
            part = hide_later(part, low)
            if self.normalise:
                part = part / _nonzero(part.sum(-1, keepdim=True))
            weights[:, low - first : end - first, :end] = part.float()
        return weights

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        check(q, k, v)
        query, key = self._near(q, scale), self._near(per_head(k, len(q)), scale)
        value = per_head(pad(v, (0, 1), value=1.0), len(q)).double()  # the ones add up to the row's sum
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
        before: tuple[int, ...] = ()
        sums = value.new_zeros(len(q), 0, value.shape[-1])  # [h, m, dv + 1]
        for start, end, members in epochs(q.shape[1], self.segment, self.landmarks):
            marks = means(key, self.segment, members)
            stay = [before.index(member) for member in members if member in before]
            fresh = marks[:, len(stay) :]
            past = value.new_zeros(len(q), fresh.shape[1], value.shape[-1])
            for low, high in chunks(0, start if fresh.shape[1] else 0, self.chunk):
                past += _kernel(fresh, key[:, low:high]) @ value[:, low:high]
            sums = torch.cat([sums[:, stay], past], dim=1)
            inverse = newton_inverse(_kernel(marks, marks), self.iterations)
            for low, high in chunks(start, end, self.chunk):
                asked = self._ask(query[:, low:high], marks) @ inverse  # [h, c, m]
                near = _kernel(marks, key[:, low:high])  # [h, m, c]
                mixed = asked @ sums + (asked @ near).tril_() @ value[:, low:high]
                mixed = mixed[..., :-1] / _nonzero(mixed[..., -1:]) if self.normalise else mixed[..., :-1]
                out[:, low:high] = mixed.to(out.dtype)
                sums = sums + near @ value[:, low:high]
            before = members
        return out

    def _asked(self, query: Tensor, marks: Tensor) -> Tensor:
        return self._ask(query, marks) @ newton_inverse(_kernel(marks, marks), self.iterations)

    def _ask(self, query: Tensor, marks: Tensor) -> Tensor:
        """K(q, l), [h, n, m]; times what makes a row's largest 1 where rows are normalised anyway."""
        exponent = -0.5 * torch.cdist(query, marks).square()
        return (exponent - exponent.amax(-1, keepdim=True)).exp() if self.normalise else exponent.exp()

    @staticmethod
    def _near(x: Tensor, scale: float) -> Tensor:
        scaled: Tensor = x.double() * scale**0.5
        return scaled


def newton_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """The inverse of symmetric matrices [..., m, m] with ones on the diagonal and a little more put there.

    X <- 2 X - X A X, from a multiple of A that is small enough to converge.
    """
    lifted = matrix + _RIDGE * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    largest = matrix.sum(-1).amax(-1)[..., None, None]  # bounds the eigenvalues
    found = 1.8 / largest.square() * lifted
    for _ in range(iterations):
        found = 2 * found - found @ lifted @ found
    return found


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / 2) of x [h, n, d], y [h, m, d]: [h, n, m]."""
    return torch.cdist(x, y).square().mul_(-0.5).exp_()


def _nonzero(total: Tensor) -> Tensor:
    """Sums, kept away from zero."""
    return torch.where(total.abs() < 1e-12, 1e-12, total)
