"""Keys and values as coefficients in a low-rank space: few numbers a token, and a basis for each KV head or for all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from workbench.core.rope import Rotation
from workbench.errors import NoRotation
from workbench.kv.stores.capabilities import Capturable, Part, Place
from workbench.kv.stores.dense import whole_rows
from workbench.kv.stores.format import INDEX_BYTES, Format, Shape, index_nbytes
from workbench.kv.stores.packed import PackedRows, first_of
from workbench.kv.stores.parts import PartedStore
from workbench.kv.stores.positioned import PositionedStore, positions_in
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Store, seen_by, state
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.decode_lowrank import decode_lowrank
from workbench_kernels.projected import project_newest
from workbench_kernels.rotary import LOW, RotaryTable, Turns
from workbench_kernels.rows import Ragged
from workbench_kernels.softmax import attention_weights

_ROWS_BYTES = 64 << 20  # score rows are worked on in blocks of about this size
_BLOCK = 32  # tokens that wait in captured steps where they are projected at once otherwise
_SCALE_BYTES = 4  # a float16 scale and a float16 zero


class Spaces(NamedTuple):
    """The directions in which a layer's keys and values are largest, largest first, float32 [k, d, d], [k, dv, dv].

    A direction is a row, as long as the root mean square of the coefficients along it; so coefficients, in units of
    their row, have the root mean square 1 whatever the direction. energy_keys, energy_values float32 [k, d]: what each
    adds to the squared norm of all vectors it was found on. rotary: how keys are rotated after they left the space;
    None where the space is that of the keys as they are attended to.

    joint: there is one space for the vectors of all heads side by side. A direction is then each head's part of it,
    [k, k * d, d], of which all parts together are that long, and energies are [1, k * d].
    """

    keys: Tensor
    values: Tensor
    energy_keys: Tensor
    energy_values: Tensor
    rotary: Rotation | None
    joint: bool = False


class Ranks(NamedTuple):
    """How many directions the keys and the values of a layer keep for each of its heads."""

    keys: int
    values: int


def spaces_of(layer: LayerTrace, queries: bool = False, *, joint: bool = False) -> Spaces:
    """The spaces of a layer, found on all that was read of the prompt, and remembered with it.

    By singular value decomposition of the n vectors of each KV head, without centring. Keys are taken before rotary
    embedding, where they fill fewer directions. queries: find the keys' space on keys and the queries of their group
    together where the model does not rotate; where it does, on keys alone. joint: one space for all heads, of keys
    alone.
    """

    def compute() -> Spaces:
        keys, rotary = layer.keys.float(), rotary_of(layer)
        if rotary is not None:
            keys = rotary.undo(keys, torch.arange(layer.tokens, device=layer.device))
        elif queries and not joint:
            keys = torch.cat([keys, layer.queries.float().unflatten(0, (layer.kv_heads, -1)).flatten(1, 2)], dim=1)
        principal = _principal_of_all if joint else _principal
        basis_keys, energy_keys = principal(keys)
        basis_values, energy_values = principal(layer.values.float())
        return Spaces(basis_keys, basis_values, energy_keys, energy_values, rotary, joint)

    return layer.once(("spaces", queries, joint), compute)


def rotary_of(layer: LayerTrace) -> Rotation | None:
    """How the layer rotates; None where it does not, or positions enter in another way."""
    try:
        return layer.rotation if layer.rotation.width else None
    except NoRotation:
        return None


def rotary_table_of(rotary: Rotation, longest: int, channels: int, device: torch.device) -> RotaryTable | None:
    """The rotary embedding of `channels` channels as kernels take it, at all positions below `longest`, rounded up to
    256; remembered with it. None where they cannot.
    """
    count = -(-longest // LOW) * LOW
    key = (count, channels, device)
    return rotary.latest("kernel table", key, lambda: RotaryTable.of(rotary, *key))


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors of x [k, n, d] as rows [k, d, d] scaled by s / sqrt(n), and the squares of s, [k, d]."""
    x = x.double()
    energy, vectors = torch.linalg.eigh(x.transpose(1, 2) @ x)  # ascending; the squares of the singular values
    energy, vectors = energy.flip(-1).clamp_min(0), vectors.flip(-1).transpose(1, 2)
    # Which way a vector points is arbitrary; its largest number is made positive.
    sign = vectors.gather(2, vectors.abs().argmax(dim=2, keepdim=True)).sign()
    length = (energy / x.shape[1]).sqrt()
    length = torch.where(energy > 1e-10 * energy[:, :1], length, 1.0)  # nothing lies along these
    return (vectors * sign * length[..., None]).float(), energy.float()


def _principal_of_all(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the vectors of all heads side by side: each head's part of the rows [k, k * d, d], and the squares
    [1, k * d].
    """
    basis, energy = _principal(x.transpose(0, 1).flatten(1)[None])
    return basis[0].unflatten(1, (x.shape[0], -1)).transpose(0, 1).contiguous(), energy


def project(x: Tensor, basis: Tensor, *, joint: bool = False) -> Tensor:
    """Coefficients [k, m, r] of x [k, m, d] in units of the rows of basis [k, r, d], which are orthogonal; [1, m, r]
    where each row has a part for every head.
    """
    basis = basis.float()
    squares = basis.square().sum(dim=-1, keepdim=True)
    if joint:
        return torch.einsum("kmd,krd->mr", x.float(), basis / squares.sum(dim=0))[None]
    return x.float() @ (basis / squares).transpose(1, 2)


class LowRankStore(PositionedStore, PartedStore):
    """An older part held as coefficients, at full precision or packed, and a newer part held whole.

    New tokens enter the newer part. Once they have attended, whatever is more than its `window` leaves it, oldest first
    and `group` tokens at a time, is projected and joins the older part; while heads are unequally long, the shortest
    decides. Without a window tokens are projected at once. Slots are those of the older part, then those of the newer.

    Values are weighted in their space and the sum leaves it. Keys are attended to in theirs, by queries projected into
    it, unless they have to be rotated to their positions first.

    In a joint space a token has one row of coefficients for all heads, so that these hold the same tokens.
    """

    def __init__(
        self,
        bases: tuple[Tensor, Tensor],
        older: tuple[Rows | PackedRows, Rows | PackedRows],
        newer: tuple[Rows, Rows],
        positions: tuple[Rows, Rows] | None,
        rotary: Rotation | None,
        window: int,
        group: int,
    ) -> None:
        """bases [k, r, d] of keys and [k, r, dv] of values; older: their coefficients, of one head where the space is
        joint; newer: keys and values; positions of both parts, or None if every position from 0 on is held.
        """
        super().__init__(*positions or ())
        self.bases, self.older, self.newer = bases, older, newer
        self.joint = _rows(older[0]).heads < newer[0].heads
        self.rotary, self.window, self.group = rotary, window, group

    @classmethod
    def where(
        cls,
        layer: LayerTrace,
        keep: Tensor,
        spaces: Spaces,
        ranks: Ranks,
        dtype: torch.dtype,
        *,
        window: int,
        bits: int | None,
        group: int,
    ) -> LowRankStore:
        """The entries of the layer at which keep [k, n] is True; coefficients at `bits` bits, None: at `dtype`."""
        everywhere = torch.arange(layer.tokens, device=layer.device)
        keys, values = layer.keys, layer.values
        together = layer.kv_heads if spaces.joint else 1
        bases = (
            spaces.keys[:, : ranks.keys * together].to(dtype, copy=True).contiguous(),
            spaces.values[:, : ranks.values * together].to(dtype, copy=True).contiguous(),
        )
        plain = keys.float() if spaces.rotary is None else spaces.rotary.undo(keys.float(), everywhere)
        lengths = keep.sum(dim=1)
        old = first_of(keep, older_of(lengths, window, group))
        new = keep & ~old

        held = old[:1] if spaces.joint else old

        def older_rows(x: Tensor, basis: Tensor, per_channel: bool) -> Rows | PackedRows:
            coefficients = project(x, basis, joint=spaces.joint)
            if bits is None:
                return Rows.where(coefficients, held, dtype)
            counts, rank = held.sum(dim=1), coefficients.shape[-1] // together
            if per_channel:
                return PackedRows.of(coefficients[held], counts, bits, group, "channel")
            return PackedRows.of(coefficients[held], counts, bits, rank, "token")

        return cls(
            bases,
            (older_rows(plain, bases[0], True), older_rows(values, bases[1], False)),
            (Rows.where(keys, new, dtype), Rows.where(values, new, dtype)),
            positions_in(keep, old, new),
            spaces.rotary,
            window,
            group,
        )

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        if self.at_once:
            self._settle()  # what captured steps left waiting
            self._project(keys.float(), values.float(), positions.expand(keys.shape[0], -1))
            return
        self._settle()  # where another store attended for this one
        self.newer[0].append(keys)
        self.newer[1].append(values)
        self._append_positions(positions)

    def _settle(self) -> None:
        """Project what is more than the window."""
        tokens = int(older_of(torch.tensor(self.newer[0].shortest), self.window, self.group))
        if not tokens:
            return
        if not self._positions:
            start = _rows(self.older[0]).longest
            where = torch.arange(start, start + tokens, device=self.newer[0].data.device)[None]
        else:
            where = self._positions[1].cut_front(tokens)[..., 0].long()
        keys, values = (rows.cut_front(tokens).float() for rows in self.newer)
        self._project(keys, values, where)

    def _project(self, keys: Tensor, values: Tensor, where: Tensor) -> None:
        """Add keys [k, q, d], values [k, q, dv] at positions [k or 1, q] to the older part."""
        if self.rotary is not None:
            keys = self.rotary.undo(keys, where)
        self.older[0].append(project(keys, self.bases[0], joint=self.joint))
        self.older[1].append(project(values, self.bases[1], joint=self.joint))
        if self._positions:
            self._positions[0].append(where.to(torch.int32)[..., None])

    def reserve(self, tokens: int) -> None:
        if self.window or self.group > 1:
            for rows in (*self.newer, *self._positions[1:]):
                rows.reserve(min(tokens, self.window + self.group))
        for part in (*self.older, *self._positions[:1]):
            if isinstance(part, Rows):
                part.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.newer[0].heads

    @property
    def device(self) -> torch.device:
        return self.newer[0].data.device

    @property
    def _complete_length(self) -> int:
        return _rows(self.older[0]).longest + self.newer[0].longest

    def _older_keys(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The older keys [k, m, d] at their positions [k or 1, all slots], out of their space."""
        keys = _view(self.older[0], torch.float32) @ self.bases[0].float()
        if self.rotary is not None:
            keys = self.rotary.apply(keys, positions[:, : keys.shape[1]].long())
        return keys.to(dtype)

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        positions, _ = self.slots()
        older = self._older_keys(positions, dtype), _view(self.older[1], torch.float32) @ self.bases[1].float()
        keys, values = (
            torch.cat([old.to(dtype), _view(new, dtype)], dim=1) for old, new in zip(older, self.newer, strict=True)
        )
        return keys, values

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        out = None if weights else self.by_kernel(query, query_positions, scoring)
        if out is not None:
            self._settle()
            return out, None
        positions, valid = self.slots()
        visible = seen_by(query_positions, positions, valid, scoring)
        offsets = scoring.offsets(query_positions, positions[:, None, None])
        key_basis, value_basis = (basis.to(query.dtype) for basis in self.bases)
        whole, values = (_view(rows, query.dtype) for rows in self.newer)
        coefficients = _view(self.older[1], query.dtype)  # [k or 1, older, r]
        in_space = self.rotary is None
        old_keys = _view(self.older[0], query.dtype) if in_space else self._older_keys(positions, query.dtype)
        kv_heads, older = self.kv_heads, coefficients.shape[1]
        heads, count = query.shape[:2]
        grouped = query.reshape(kv_heads, heads // kv_heads, count, -1)  # [k, g, q, d]
        slots = older + whole.shape[1]
        outs, rows = [], []
        for part in torch.arange(count).split(max(1, _ROWS_BYTES // (4 * heads * max(slots, 1)))):
            asked = grouped[:, :, part]
            flat = asked.flatten(1, 2)  # [k, g*q, d]
            old = (flat @ key_basis.transpose(1, 2) if in_space else flat) @ old_keys.transpose(1, 2)
            products = torch.cat([old, flat @ whole.transpose(1, 2)], dim=-1).float()  # [k, g * q, m]
            seen = visible if visible is None or visible.shape[1] == 1 else visible[:, part]
            probs = attention_weights(
                products.unflatten(1, asked.shape[1:3]), scoring, None if seen is None else seen[:, None], offsets
            )  # [k, g, q, m]
            share = probs.flatten(1, 2).to(query.dtype)
            out = share[..., :older] @ coefficients @ value_basis + share[..., older:] @ values
            outs.append(out.view(heads, part.numel(), -1))
            rows.append(probs)
        self._settle()
        return torch.cat(outs, dim=1), torch.cat(rows, dim=2) if weights else None

    # -- attention part by part, without anything leaving its space in memory

    @property
    def capturable(self) -> Capturable | None:
        keys, values = self.older
        if not isinstance(keys, Rows) or not isinstance(values, Rows):
            return None  # no kernel reads packed coefficients
        width = self.newer[0].data.shape[1]
        turns = self.rotary is None or rotary_table_of(self.rotary, 1, width, self.device) is not None
        return self if turns else None

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.newer

    @property
    def at_once(self) -> bool:
        """Whether tokens are projected before they attend."""
        return self.window == 0 and self.group == 1

    @property
    def period(self) -> int:
        return _BLOCK if self.at_once else self.group

    @property
    def _limit(self) -> int:
        """How long the newer part of the shortest head becomes before captured steps settle it."""
        return _BLOCK if self.at_once else self.window + self.group

    @property
    def steps_until_settled(self) -> int:
        return max(self._limit - self.newer[0].shortest, 1)

    def settle(self) -> None:
        self._settle()
        if self._first is not None:
            self._first.fill_(self._end - self.newer[0].longest - self._begin)

    def advance(self, positions: Tensor) -> None:
        self._grown(self.newer, positions)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        more = self.newer[0].longest + steps if steps else 0
        older = [(_rows(part), more) for part in (*self.older, *self._positions[:1])]
        newer = min(steps, _BLOCK) if self.at_once else steps
        return [*((rows, newer) for rows in (*self.newer, *self._positions[1:])), *older]

    @property
    def _end(self) -> int:
        """The position behind all that is held."""
        positions, valid = self.slots()
        if not self._positions:
            return positions.shape[1]
        real = positions if valid is None else positions.masked_fill(~valid, -1)
        return int(real.max()) + 1 if real.numel() else 0

    _first: Tensor | None = None  # how far behind `_begin` the newer part begins, int32 [1], while steps are captured
    _begin = 0  # the position at which it began when they were

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        more = self.newer[0].longest + steps if steps else 0
        old_keys, old_values = (pin(_rows(rows), _rows(rows).longest + more) for rows in self.older)
        where = pin(self._positions[0], self._positions[0].longest + more) if self._positions else None
        key_basis, value_basis, table = self.bases[0], self.bases[1], None
        turned = self.rotary
        if turned is not None:
            longest = self._end + steps
            table = rotary_table_of(turned, longest, self.newer[0].data.shape[1], self.device)
            key_basis = turned.halved(key_basis)  # as kernels pair channels

        def older(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            asked = query if turned is None else turned.halved(query)
            keys, values = (self._of_all_heads(rows) for rows in (old_keys, old_values))
            return state(
                decode_lowrank(
                    asked, keys, values, key_basis, value_basis, scoring, positions=where, rotary=table, lse=True
                )
            )

        newer = whole_rows(keys, values)
        if self.at_once:
            return [older, self._as_projected(keys, values, steps)] if steps else [older]
        return [older, newer] if steps or self.newer[0].longest else [older]

    def _of_all_heads(self, rows: Ragged) -> Ragged:
        """Rows of a joint space as those of every head."""
        if not self.joint:
            return rows
        starts, lengths = torch.stack([rows.starts, rows.lengths]).repeat(1, self.kv_heads)
        return Ragged(rows.data, starts, lengths, rows.longest)

    def _as_projected(self, keys: Ragged, values: Ragged, steps: int) -> Part:
        """Attention over the newer rows as they will be once they are projected."""
        into = torch.zeros_like(keys.data), torch.zeros_like(values.data)
        first = self._end - self.newer[0].longest
        self._first = torch.tensor([0], dtype=torch.int32, device=self.device)
        self._begin = first
        turns = None
        if self.rotary is not None:
            where = torch.arange(first, first + self.newer[0].longest + steps, device=self.device)
            turns = Turns.of(*self.rotary(where), keys.data.shape[1], self.rotary.unhalved)
        projected = whole_rows(keys._replace(data=into[0]), values._replace(data=into[1]))

        def newer(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            assert self._first is not None
            project_newest(keys, values, *self.bases, turns, self._first, *into)
            return projected(query, scoring)

        return newer

    def tensors(self) -> dict[str, list[Tensor]]:
        exact = str(self.bases[0].dtype).removeprefix("torch.")
        newer = [tensor for rows in self.newer for tensor in rows.tensors()]
        by_precision = {exact: [*self.bases, *newer, *self._position_tensors()]}
        for part in self.older:
            name = f"{part.bits}-bit" if isinstance(part, PackedRows) else exact
            by_precision.setdefault(name, []).extend(part.tensors())
        return by_precision

    def clone(self) -> Self:
        twin = super().clone()
        twin.bases = self.bases[0].clone(), self.bases[1].clone()
        twin.older = self.older[0].clone(), self.older[1].clone()
        twin.newer = self.newer[0].clone(), self.newer[1].clone()
        return twin


@dataclass(frozen=True)
class LowRankFormat(Format):
    """Kept entries as coefficients in the spaces of `spaces_of`, all but the newest `window` or a few more.

    ranks: by number of layer, or one pair for all layers. bits: of a coefficient, keys grouped over `group` tokens of a
    direction and values over as many directions of a token as their rank; None: at `dtype`. queries: see `spaces_of`.
    joint: one space for all heads of a layer, unless these may hold different tokens because some were dropped.
    """

    dtype: torch.dtype
    ranks: Mapping[int, Ranks] | Ranks = field(hash=False)
    window: int = 0
    bits: int | None = None
    group: int = 1
    queries: bool = False
    joint: bool = False

    def kind(self, shape: Shape) -> Hashable:
        return None if isinstance(self.ranks, Ranks) else shape.layer

    def ranks_of(self, layer: int) -> Ranks:
        """The ranks of one layer."""
        return self.ranks if isinstance(self.ranks, Ranks) else self.ranks[layer]

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        name = str(self.dtype).removeprefix("torch.") if self.bits is None else f"{self.bits}-bit"
        every = [self.ranks] if isinstance(self.ranks, Ranks) else list(self.ranks.values())
        keys, values = _span([ranks.keys for ranks in every]), _span([ranks.values for ranks in every])
        return (f"{name}, keys of rank {keys}, values of rank {values}",)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        older = older_of(selected, self.window, self.group)
        newer = selected - older
        partial = (selected < shape.tokens).any(dim=1)  # these need positions
        whole, positions = int(newer.sum()) * shape.entry_nbytes, int(selected[partial].sum()) * INDEX_BYTES
        indices = 2 * index_nbytes(newer) + index_nbytes(older[partial]) + index_nbytes(newer[partial])
        together = older[~partial, :1] if self.joint else older[:0]
        in_spaces = self._in_spaces(shape, together, shape.kv_heads)
        in_spaces += self._in_spaces(shape, older[partial] if self.joint else older, 1)
        return in_spaces + whole + positions + indices

    def _in_spaces(self, shape: Shape, older: Tensor, heads: int) -> int:
        """The bytes of bases, and of coefficients of which older [l, s] rows lie in each space of so many heads."""
        keys, values = (rank * heads for rank in self.ranks_of(shape.layer))
        numbers = heads * (keys * shape.key_width + values * shape.value_width)
        bases, rows = older.numel() * numbers * shape.itemsize, int(older.sum())
        if self.bits is None:
            return bases + rows * (keys + values) * shape.itemsize + 2 * index_nbytes(older)
        codes = -(-keys * self.bits // 8) + -(-values * self.bits // 8)
        scales = _SCALE_BYTES * (rows // self.group * keys + rows * heads)
        return bases + rows * codes + scales + 6 * index_nbytes(older)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        keep = tiers > 0
        spaces = spaces_of(layer, self.queries, joint=self.joint and bool(keep.all()))
        ranks = self.ranks_of(layer.index)
        return LowRankStore.where(
            layer, keep, spaces, ranks, self.dtype, window=self.window, bits=self.bits, group=self.group
        )


def older_of(lengths: Tensor, window: int, group: int) -> Tensor:
    """How many of each head's rows are held as coefficients when `lengths` are held: whole groups beyond the window."""
    return (lengths - window).clamp_min(0) // group * group


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _rows(part: Rows | PackedRows) -> Rows:
    return part if isinstance(part, Rows) else part.codes


def _view(part: Rows | PackedRows, dtype: torch.dtype) -> Tensor:
    """What is held as [k, longest, w]; zeros where a head is shorter, for the room reserved there may hold anything."""
    rows = _rows(part)
    if isinstance(part, Rows):
        view = part.view().to(dtype)
    else:
        whole = part.dequantised(dtype)
        view = whole[rows.slots()] if whole.shape[0] else whole.new_zeros(rows.heads, 0, part.channels)
    valid = rows.valid()
    return view if valid is None else view.masked_fill(~valid[..., None], 0.0)
