"""Keys without positions, quantised to the entries of a codebook in the metric that queries give them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.core.rope import Rotation
from workbench.kv.stores.low_rank import rotary_of
from workbench.trace import LayerTrace

_ROUNDS = 8
_FACTOR_BYTES = 4
_ENTRY_BYTES = 2


@dataclass(frozen=True)
class Codebook:
    """Of one layer's KV heads.

    entries float16 [k, c, d]: keys before rotary embedding, on the device. factor float32 [k, d, d], in host memory:
    L of the queries' second moment L L^T. distance: how far before a query its keys are taken to stand.
    """

    entries: Tensor
    factor: Tensor
    distance: int
    rotary: Rotation | None

    @classmethod
    def of(cls, layer: LayerTrace, codes: int, distance: int) -> Codebook:
        """The codebook of a layer's prompt. The same prompt gives the same."""
        positions = torch.arange(layer.tokens, device=layer.device)
        rotary = rotary_of(layer)
        keys = _unrotated(layer.keys.float(), positions, rotary)
        queries = _seen_from(layer.queries.float(), positions, rotary, distance)
        factor = query_factor(queries.reshape(layer.kv_heads, -1, queries.shape[2]))
        centres = k_means(keys @ factor, codes)
        entries = torch.linalg.solve_triangular(factor, centres, upper=False, left=False)  # centres L^-1
        most = torch.finfo(torch.float16).max
        return cls(entries.clamp(-most, most).to(torch.float16), factor.cpu(), distance, rotary)

    @staticmethod
    def nbytes(heads: int, codes: int, width: int) -> int:
        """Bytes of the entries."""
        return heads * codes * width * _ENTRY_BYTES

    @staticmethod
    def host_nbytes(heads: int, width: int) -> int:
        """Bytes of the factor."""
        return heads * width * width * _FACTOR_BYTES

    @staticmethod
    def code_dtype(codes: int) -> torch.dtype:
        return torch.uint8 if codes <= 256 else torch.int16

    def encode(self, keys: Tensor, positions: Tensor) -> Tensor:
        """The codes [k, e] of keys [k, e, d] at positions [k, e] or [e], as attention gets them."""
        plain = _unrotated(keys.float(), positions, self.rotary)
        return nearest(plain, self.entries, self.factor.to(keys.device))

    def scores(self, query: Tensor, positions: Tensor) -> Tensor:
        """Inner products [k, g * q, c] of query [h, q, d] at positions [q] with the entries, at the fixed distance."""
        moved = _seen_from(query.float(), positions, self.rotary, self.distance)
        moved = moved.reshape(len(self.entries), -1, query.shape[2])
        return moved @ self.entries.float().transpose(1, 2)


def query_factor(queries: Tensor) -> Tensor:
    """L [k, d, d] of the second moment L L^T of queries [k, t, d], which is first divided by its root mean square.

    A millionth of its largest number is added to the diagonal, so that directions without any query are harmless.
    """
    queries = queries.double()
    moment = queries.transpose(1, 2) @ queries
    size = moment.square().mean(dim=(1, 2), keepdim=True).sqrt()
    moment = torch.where(size > 0, moment / size.clamp_min(1e-300), 0)
    more = 1e-6 * moment.amax(dim=(1, 2), keepdim=True).clamp_min(1)
    width = moment.shape[1]
    factor: Tensor = torch.linalg.cholesky(moment + more * torch.eye(width, device=moment.device).double())
    return factor.float()


def k_means(x: Tensor, count: int) -> Tensor:
    """`count` centres [k, count, d] of x [k, n, d] after 8 rounds that begin at random vectors, always the same.

    A centre that is nearest to nothing takes the place of a vector that is far from its own.
    """
    heads, tokens, width = x.shape
    first = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count].to(x.device)
    centres, lengths = x[:, first], x.square().sum(dim=2)
    for _ in range(_ROUNDS):
        best = _apart(x, centres).min(dim=2)
        sums = torch.zeros_like(centres).scatter_add_(1, best.indices[..., None].expand(-1, -1, width), x)
        sizes = torch.zeros(heads, count, device=x.device).scatter_add_(1, best.indices, torch.ones_like(lengths))
        empty = sizes == 0
        furthest = (best.values + lengths).topk(count, dim=1).indices  # [k, count]
        instead = furthest.gather(1, (empty.cumsum(dim=1) - 1).clamp_min(0))
        moved = x.gather(1, instead[..., None].expand(-1, -1, width))
        centres = torch.where(empty[..., None], moved, sums / sizes.clamp_min(1)[..., None])
    return centres


def nearest(keys: Tensor, entries: Tensor, factor: Tensor) -> Tensor:
    """For keys [k, e, d] the number of the entry [k, c, d] nearest in the metric of factor [k, d, d], [k, e]."""
    codes = _apart(keys @ factor, entries.float() @ factor).argmin(dim=2)
    return codes.to(Codebook.code_dtype(entries.shape[1]))


def _apart(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [k, n, c] without what all centres have in common, |x|^2."""
    return torch.baddbmm(centres.square().sum(dim=2)[:, None], x, centres.transpose(1, 2), alpha=-2)


def _unrotated(x: Tensor, positions: Tensor, rotary: Rotation | None) -> Tensor:
    return x if rotary is None else rotary.undo(x, positions)


def _seen_from(queries: Tensor, positions: Tensor, rotary: Rotation | None, distance: int) -> Tensor:
    """Queries [h, q, d] at positions [q], as they see a key without position that is `distance` before them."""
    if rotary is None:
        return queries
    return rotary.apply(rotary.undo(queries, positions), torch.full_like(positions, distance))
