"""What kind each attention head is: where its attention goes over a whole prompt, in one streamed pass a layer.

Arguments shared with `workbench.core.attention_rows.row_blocks` are explained there. Memory is that of a few blocks of
rows, never n x n; all sums of weights are float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench import arguments
from workbench.core.attention_rows import head_groups, row_blocks, token_positions, visible_keys
from workbench.errors import InputError
from workbench.measure.attention import column_sums
from workbench.measure.head_classes import HeadStats
from workbench.measure.head_queries import earlier, probe_positions
from workbench.measure.head_rows import read_heads
from workbench.measure.whole_prompts import is_whole, reads_kept
from workbench.progress import Progress
from workbench_kernels import Scoring, read_attention

SINKS = 4  # first tokens that count as sinks
RECENT = 32  # tokens, the query's own included, that count as local
PROBES = 32  # queries by which contextual heads are told from structural ones


def head_stats(
    queries: Tensor,
    keys: Tensor,
    ids: Tensor,
    scoring: Scoring,
    *,
    sinks: int = SINKS,
    recent: int = RECENT,
    probes: int = PROBES,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> tuple[HeadStats, Tensor]:
    """The statistics of one layer's query heads [h], and what each key receives from each head's queries [h, nk].

    queries: [h, nq, d]; keys: [k, nk, d]; ids: the prompt's tokens [n], from which those at the positions of queries
    and keys are taken. sinks, recent: how many first and last tokens count. probes: how many queries, spread evenly
    over the second half, the variance is over.

    All float32 on the CPU. The column sums are those of `workbench.measure.column_sums`.
    """
    for name, count in (("sinks", sinks), ("recent", recent), ("probes", probes)):
        arguments.whole(name, count, low=1)
    (k, nk, _), (at, held) = keys.shape, _positions(queries, keys, ids, query_positions, key_positions)
    if scoring.in_kernels and reads_kept(queries, keys, at, held):
        queries, keys = queries.detach(), keys.detach()
        judged, lse = read_heads(queries, keys, ids, scoring, at, held, sinks=sinks, recent=recent, probes=probes)
        if is_whole(at, held):
            sums = read_attention(queries, keys, scoring.without_sinks(), lse=lse).sums
            assert sums is not None
        else:
            sums = column_sums(queries, keys, scoring, query_positions=at, key_positions=held, progress=progress)
        return judged, sums.cpu()
    visible_keys(len(at), nk, at, held, kv_heads=k)  # complains about positions that do not fit
    stats, received = [], []
    for part in head_groups(queries, keys, held, progress):
        here = held if part.key_positions is None else part.key_positions.view(-1, nk)
        passed = HeadSums(
            len(part.queries),
            len(part.keys),
            queries.device,
            at,
            here,
            ids.cpu(),
            scoring,
            sinks=sinks,
            recent=recent,
            probes=probes,
            whole=scoring.sinks is None,
        )
        for rows, slots, probs in row_blocks(
            part.queries,
            part.keys,
            scoring.of(part.heads),
            query_positions=at,
            key_positions=here,
            block_bytes=block_bytes,
            progress=part.progress,
        ):
            if probs.shape[2]:
                passed.add(rows, slots, probs)
            del probs
        stats.append(passed.stats())
        received.append(passed.received.cpu())
    return HeadStats.join(stats, torch.cat), torch.cat(received)


def judge(
    queries: Tensor,
    keys: Tensor,
    ids: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    progress: Progress | None = None,
) -> HeadStats:
    """The statistics of `head_stats` alone: where kernels read them, what the keys receive takes a pass of its own."""
    at, held = _positions(queries, keys, ids, query_positions, key_positions)
    if scoring.in_kernels and reads_kept(queries, keys, at, held):
        how = {"sinks": SINKS, "recent": RECENT, "probes": PROBES}
        return read_heads(queries.detach(), keys.detach(), ids, scoring, at, held, **how)[0]
    return head_stats(queries, keys, ids, scoring, query_positions=at, key_positions=held, progress=progress)[0]


def _positions(
    queries: Tensor, keys: Tensor, ids: Tensor, query_positions: Tensor | None, key_positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where queries [nq] and keys [k or 1, nk] stand. Raises InputError where there are none, or their ids are not."""
    nq, nk = queries.shape[1], keys.shape[1]
    if nq == 0 or nk == 0:
        raise InputError(f"heads are judged by at least one query and one key, not {nq} and {nk}")
    at, held = token_positions(nq, nk, query_positions, key_positions)
    if int(at[-1]) >= len(ids):
        raise InputError(f"a query stands at position {int(at[-1])}, but there are {len(ids)} token ids")
    return at, held


class HeadSums:
    """The sums that one pass over a layer's attention makes: `add` its blocks, then take its `stats` and `received`.

    heads, kv_heads: how many query heads on how many KV heads. at: positions of the queries [nq]; held: of the keys
    [k or 1, nk]; ids, scoring, sinks, recent, probes: as in `head_stats`. whole: whether every block holds all there is
    of its rows, each of which adds up to 1; otherwise blocks may divide rows, and rows add up to whatever they do.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        device: torch.device,
        at: Tensor,
        held: Tensor,
        ids: Tensor,
        scoring: Scoring,
        *,
        sinks: int = SINKS,
        recent: int = RECENT,
        probes: int = PROBES,
        whole: bool = True,
    ) -> None:
        nq, nk = len(at), held.shape[1]
        self.whole = whole
        self.heads, self.kv_heads, self.sinks, self.recent = heads, kv_heads, sinks, recent
        self.at, self.held = at, held  # [nq], [k or 1, nk]
        self.at_there, self.held_there = at.to(device), held.to(device)
        first, stop = visible_keys(nq, nk, at, held, scoring.window, kv_heads=kv_heads, chunk=scoring.chunk)
        self.seeing = first < stop  # [k or 1, nq]
        self.first_sinks = int((held < sinks).sum(dim=1).max())  # slots that may hold sinks
        self.probed = probe_positions(nq, probes)  # slots of queries
        bins = 1 + int(at[-1]).bit_length()
        self.bounds = [*(2**b for b in range(bins)), recent]  # distances below which mass is summed up

        # What each query is, and what came before each key; -1 where nothing did, and for slots that hold nothing.
        # Token ids are exact in float32, in which comparing yields factors at once.
        own = ids[at]
        before = ids[(held - 1).clamp(0, len(ids) - 1)].masked_fill((held < 1) | (held >= len(ids)), -1)
        self.own, self.before = own.to(device, torch.float32), before.to(device, torch.float32)
        self.retrieving, self.itself = earlier(own, at, before, held, scoring.begin(at))  # [k or 1, nq] each
        self.itself_slot = torch.searchsorted(held, at.expand(len(held), -1).contiguous()).clamp(max=nk - 1)

        self.received = torch.zeros(heads, nk, device=device)
        self.entropy, self.sink, self.retrieval, self.distance, self.squares = torch.zeros(
            5, heads, dtype=torch.float64, device=device
        )
        self.within = torch.zeros(heads, len(self.bounds), dtype=torch.float64, device=device)  # mass below bounds
        self.probe_sums = torch.zeros(heads, nk, dtype=torch.float64, device=device)
        self.scratch = torch.empty(0, device=device)

    def add(self, rows: slice, slots: slice, probs: Tensor) -> None:
        """Add a block of rows: probs [h, r, c]."""
        at = self.at[rows]
        # Once, where rows are whole: later blocks have no more rows, and more keys only up to all.
        most = probs.shape[0] * probs.shape[1] * self.held.shape[1] if self.whole else probs.numel()
        if self.scratch.numel() < most:
            self.scratch = torch.empty(most, device=probs.device)
        sums = probs.sum(1)  # [h, c]
        self.received[:, slots] += sums
        # Queries that have fewer tokens before them than are recent say nothing about how local a head is.
        late = int(torch.searchsorted(at, self.recent - 1))
        if late == 0:
            self.within += self._below(probs, sums, at, slots, self.bounds)
        else:
            self.within[:, :-1] += self._below(probs, sums, at, slots, self.bounds[:-1])
            if late < len(at):
                part = probs[:, late:]
                self.within[:, -1:] += self._below(part, part.sum(1), at[late:], slots, self.bounds[-1:])
        self._add_sinks(probs, sums, at, slots)
        self._add_retrieval(probs, rows, slots)
        self._add_probes(probs, rows, slots)
        self._add_distance(probs, sums, rows, slots)
        self._add_entropy(probs)

    def _below(self, probs: Tensor, sums: Tensor, at: Tensor, slots: slice, bounds: list[int]) -> Tensor:
        """The mass at distances below each of `bounds`: float64 [h, bounds]; probs [h, r, c], sums over r [h, c].

        Where a distance ends lies at another key for every row, but for most keys all rows agree on whether they are
        within: only the few where rows differ are looked at row by row.
        """
        total = sums.double().cumsum(1)
        before = torch.nn.functional.pad(total, (1, 0))  # [h, c + 1]: the mass of so many first slots
        limits = torch.tensor(bounds)
        rows = self.at_there[self._slots_of(at)]
        found = []
        for kv, held in enumerate(self.held[:, slots]):
            mine = slice(None) if len(self.held) == 1 else slice(kv * self._group, (kv + 1) * self._group)
            ends = torch.searchsorted(held, torch.stack([at[0] - limits, at[-1] - limits]), right=True)  # [2, bounds]
            below = total[mine, -1:] - before[mine, ends[1].to(sums.device)]
            there = self.held_there[kv, slots]
            for bound, (limit, low, high) in enumerate(zip(bounds, *ends.tolist(), strict=True)):
                if low < high:
                    near = rows[:, None] - there[low:high] < limit  # [r, some]
                    below[:, bound] += (probs[mine, :, low:high] * near).sum((1, 2))
            found.append(below)
        return torch.cat(found)

    def _slots_of(self, at: Tensor) -> slice:
        """Which queries stand at positions `at`, a run of them."""
        begin = int(torch.searchsorted(self.at, at[0]))
        return slice(begin, begin + len(at))

    @property
    def _group(self) -> int:
        return self.heads // self.kv_heads

    def _add_sinks(self, probs: Tensor, sums: Tensor, at: Tensor, slots: slice) -> None:
        after = int(torch.searchsorted(at, self.sinks))
        most = self.first_sinks - slots.start
        if most <= 0 or after == len(at):
            return
        part = (sums if after == 0 else probs[:, after:].sum(1))[:, :most]  # [h, some]
        there = self.held_there[:, slots][:, :most] < self.sinks  # [k or 1, some]
        self.sink += (part * self._heads_of(there)).sum(1)

    def _add_retrieval(self, probs: Tensor, rows: slice, slots: slice) -> None:
        per_kv = probs.flatten(1).unflatten(0, (len(self.before), -1))  # [k or 1, its heads, r * c]
        follows = self._room(probs[0].numel()).view(1, *probs.shape[1:])
        for kv, weights in enumerate(per_kv):
            if not bool(self.retrieving[kv, rows].any()):
                continue
            mine = slice(kv * len(weights), (kv + 1) * len(weights))
            torch.eq(self.own[rows, None], self.before[kv, None, slots], out=follows[0])
            self.retrieval[mine] += weights @ follows.flatten()
            twice = self.itself[kv, rows].nonzero()[:, 0]  # those also follow themselves
            slot = self.itself_slot[kv, rows][twice] - slots.start
            here = (slot >= 0) & (slot < probs.shape[2])
            twice, slot = twice[here], slot[here]
            if len(twice):
                self.retrieval[mine] -= probs[mine, twice.to(probs.device), slot.to(probs.device)].sum(1)

    def _add_probes(self, probs: Tensor, rows: slice, slots: slice) -> None:
        begin, end = torch.searchsorted(self.probed, torch.tensor([rows.start, rows.stop])).tolist()
        if begin == end:
            return
        chosen = probs[:, (self.probed[begin:end] - rows.start).to(probs.device)].double()
        self.probe_sums[:, slots] += chosen.sum(1)
        self.squares += chosen.square().sum((1, 2))

    def _add_distance(self, probs: Tensor, sums: Tensor, rows: slice, slots: slice) -> None:
        """Add up distances by rows and by columns; of whole rows the first is known, for they add up to 1."""
        start = int(self.at[rows.start])  # distances are differences: of small numbers, where attention is local
        at = self.at[rows] - start
        if self.whole:
            from_rows = self._each((self.seeing[:, rows] * at).sum(dim=1))
        else:
            from_rows = probs.sum(2).double() @ at.to(probs.device, torch.float64)
        behind = (self.held_there[:, slots] - start).double()  # [k or 1, c]
        self.distance += from_rows - (sums * self._heads_of(behind)).sum(1)

    def _add_entropy(self, probs: Tensor) -> None:
        logs = torch.log(probs, out=self._room(probs.numel()).view(probs.shape))
        logs.clamp_(min=-1e4)  # 0 * log 0 is 0
        self.entropy -= torch.stack(
            [torch.dot(log, weights) for log, weights in zip(logs.flatten(1), probs.flatten(1), strict=True)]
        )

    def _room(self, numbers: int) -> Tensor:
        """So many float32 numbers to write on, the same memory each time."""
        return self.scratch[:numbers]

    def stats(self) -> HeadStats:
        """The means, once all rows were added."""
        seeing = self.seeing.sum(dim=1)  # [k or 1]
        after, late = ((self.seeing & (self.at >= least)).sum(dim=1) for least in (self.sinks, self.recent - 1))
        below = self.within[:, :-1] / self._each(seeing)[:, None]
        profile = torch.cat([below[:, :1], below.diff(dim=1)], dim=1)
        number = len(self.probed)
        mean = self.probe_sums / number
        figures = {
            "entropy": (self.entropy / self._each(seeing)).clamp(min=0.0),
            "sink": self.sink / self._each(after),
            "local": self.within[:, -1] / self._each(late),
            "retrieval": (self.retrieval / self._each(self.retrieving.sum(dim=1))).clamp(min=0.0),
            "distance": (self.distance / self._each(seeing)).clamp(min=0.0),
            "variance": self.squares / number - mean.square().sum(1),
            "profile": profile.clamp(min=0.0),
        }
        return HeadStats(**{name: each.float().cpu() for name, each in figures.items()})

    def _each(self, counts: Tensor) -> Tensor:
        """Counts [k or 1] of KV heads as those of their query heads, float64 [h]."""
        return self._heads_of(counts.to(self.received.device, torch.float64))

    def _heads_of(self, x: Tensor) -> Tensor:
        """What is of KV heads [k or 1, ...], for each query head [h, ...]."""
        return x.repeat_interleave(self.heads // len(x), dim=0)
