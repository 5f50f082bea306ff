"""A graph over keys in which queries find those they attend to most, seeing only a part of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kv.stores.format import INDEX_BYTES
from workbench.models.fetch import cache_dir
from workbench_kernels.cpu.library import library
from workbench_kernels.cpu.search import search

ENTRIES = 16  # keys from which every search begins
_ADJACENT = 2  # links of each key to the keys before and after it, so that every key can be reached
_AT_ONCE = (4, 16)  # least and most keys of the beam whose links are followed together: an eighth of it


@dataclass
class Found:
    """The best keys of each query, int64 [k, b, c] best first, their inner products [k, b, c] (-inf where fewer were
    found), and how many keys were looked at, int64 [k, b].
    """

    keys: Tensor
    scores: Tensor
    visited: Tensor


@dataclass
class Graph:
    """keys float32 [k, m, d]; links int32 [k, m, r], -1 where a key has fewer; entries int32 [k, e].

    Heads with fewer keys are padded with keys that nothing links to.
    """

    keys: Tensor
    links: Tensor
    entries: Tensor

    @classmethod
    def guided_by(cls, guides: Tensor, keys: Tensor, lengths: Tensor, neighbours: int, degree: int) -> Graph:
        """The graph over keys [k, m, d], of which lengths [k] are real, that guides [k, t, d] suggest.

        Every guide and its `neighbours` keys of largest inner product make a bipartite graph, which is projected onto
        the keys: the nearest of a guide's keys is linked with all others, and each of them with the next. Of a key's
        links those that most guides suggest stay, `degree` in all, two of them to the keys beside it in the text.
        The graph lies in host memory, wherever the keys do.
        """
        heads, count, _ = keys.shape
        device = keys.device
        real = torch.arange(count, device=device) < lengths[:, None]  # [k, m]
        products = (guides @ keys.transpose(1, 2)).masked_fill_(~real[:, None], -torch.inf)
        near = products.topk(min(neighbours, count), dim=-1)
        lists, sound = near.indices, near.values > -torch.inf  # [k, t, c]
        links = _projected(lists, sound, count, degree - _ADJACENT)
        before = torch.arange(-1, count - 1, device=device).expand(heads, -1)
        after = torch.where(before + 2 < lengths[:, None], before + 2, -1)
        beside = torch.stack([before, after], dim=-1).masked_fill_(~real[..., None], -1)
        votes = torch.zeros(heads, count, device=device).scatter_add_(1, lists[..., 0], sound[..., 0].float())
        votes = votes.masked_fill_(~real, -1)
        entries = votes.topk(min(ENTRIES, count), dim=1)
        every = torch.cat([links, beside], dim=-1).to("cpu", torch.int32)
        begin = entries.indices.masked_fill(entries.values < 0, -1).to("cpu", torch.int32)
        return cls(keys.cpu().contiguous(), every.contiguous(), begin.contiguous())

    @staticmethod
    def nbytes(heads: int, count: int, width: int, degree: int) -> int:
        """Bytes of a graph over `count` keys of this width in each head."""
        return heads * (count * (4 * width + INDEX_BYTES * degree) + INDEX_BYTES * min(ENTRIES, count))

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.links, self.entries]

    def search(self, query: Tensor, wanted: int, beam: int) -> Found:
        """The `wanted` keys of largest inner product with each query [k, b, d], as far as a beam search finds them.

        It holds the best `beam` keys seen (at least `wanted`), and follows the links of the best of them that it has
        not followed yet until none is left.
        """
        count = self.keys.shape[1]
        beam = min(max(beam, wanted), count)
        together = min(max(beam // 8, _AT_ONCE[0]), _AT_ONCE[1], beam)
        compiled = library(str(cache_dir() / "compiled")) if self.entries.numel() else None
        if compiled is not None:
            wanted = min(wanted, count)
            graph = self.keys, self.links, self.entries
            return Found(*search(*graph, query, wanted=wanted, beam=beam, together=together, library=compiled))
        return self.searched(query, wanted, beam, together)

    def searched(self, query: Tensor, wanted: int, beam: int, together: int) -> Found:
        """The same where nothing was compiled, following the links of so many keys together."""
        heads, count, _ = self.keys.shape
        each = query.shape[1]
        head = torch.arange(heads).repeat_interleave(each)[:, None]  # [k * b, 1]
        flat = query.reshape(len(head), -1, 1)
        seen = torch.zeros(len(head), count + 1, dtype=torch.bool)  # the last place stands for no key
        seen[:, count] = True
        turn = torch.empty(len(head), count + 1, dtype=torch.int64)
        best = torch.full((len(head), beam), -torch.inf)
        beamed = torch.full((len(head), beam), count)
        unfollowed = torch.zeros(len(head), beam, dtype=torch.bool)
        new = self._numbers(self.entries[head[:, 0]])
        while True:
            order = torch.arange(new.shape[1]).expand_as(new)
            turn.scatter_(1, new, order)  # of several links to one key one counts
            fresh = (turn.gather(1, new) == order) & ~seen.gather(1, new)
            seen.scatter_(1, new, True)
            scores = (self.keys[head, new.clamp_max(count - 1)] @ flat)[..., 0].masked_fill_(~fresh, -torch.inf)
            top = torch.cat([best, scores], dim=1).topk(beam, dim=1)
            best, beamed = top.values, torch.cat([beamed, new], dim=1).gather(1, top.indices)
            unfollowed = torch.cat([unfollowed, fresh], dim=1).gather(1, top.indices)
            follow = best.masked_fill(~unfollowed, -torch.inf).topk(together, dim=1)
            going = follow.values > -torch.inf
            if not bool(going.any()):
                break
            unfollowed.scatter_(1, follow.indices, False)
            links = self.links[head, beamed.gather(1, follow.indices).clamp_max(count - 1)]  # [k * b, a, r]
            new = self._numbers(links.masked_fill(~going[..., None], -1).flatten(1))
        wanted = min(wanted, count)
        return Found(
            beamed[:, :wanted].view(heads, each, wanted),
            best[:, :wanted].view(heads, each, wanted),
            seen[:, :-1].sum(dim=1).view(heads, each),
        )

    def _numbers(self, links: Tensor) -> Tensor:
        """int64, with the place behind the last key for no key."""
        return torch.where(links < 0, self.keys.shape[1], links.long())


def _projected(lists: Tensor, sound: Tensor, count: int, room: int) -> Tensor:
    """For each of `count` keys the `room` that lists [k, t, c] of keys suggest most, int64 [k, count, room] or -1."""
    heads = len(lists)
    device = lists.device
    first = torch.arange(heads, device=device)[:, None, None] * count
    nearest, others = lists[..., :1].expand_as(lists[..., 1:]), lists[..., 1:]
    pairs = [(nearest, others), (others, nearest), (lists[..., :-1], others), (others, lists[..., :-1])]
    usable = sound[..., 1:]  # a list is in order, so what comes before is sound too
    codes = torch.cat([((first + one) * count + other)[usable] for one, other in pairs])
    codes, votes = codes.unique(return_counts=True)  # ascending: by head, key, linked key
    most = int(votes.max()) if len(votes) else 0
    source = codes // count
    order = torch.argsort(source * (most + 1) + most - votes, stable=True)
    source, target = source[order], (codes % count)[order]
    begins = torch.searchsorted(source, torch.arange(heads * count, device=device))
    place = torch.arange(len(source), device=device) - begins[source]
    kept = place < room
    links = torch.full((heads * count, room), -1, device=device)
    links[source[kept], place[kept]] = target[kept]
    return links.view(heads, count, room)
