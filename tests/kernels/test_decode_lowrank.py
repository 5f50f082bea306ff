"""Decode attention over coefficients: the reference attends to what they stand for, the kernels do as it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.support import interpreted
from workbench.core.rope import Rotation
from workbench.kv.stores import store as store_module
from workbench.kv.stores.low_rank import LowRankStore, Ranks, spaces_of
from workbench.trace import LayerTrace
from workbench_kernels import decode, softmax
from workbench_kernels import decode_lowrank as kernels_lowrank
from workbench_kernels.decode_lowrank import decode_lowrank, decode_rotated
from workbench_kernels.rotary import LOW, RotaryTable, rotate
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state

SCALE = 0.2
PAIRS = (*range(8, 20, 2), *range(9, 20, 2), *range(8))  # the last 12 of 20 channels, neighbours paired
SHAPES = ((2, 20), (2, 18), (4, 20))  # heads and widths of keys, values and queries


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotary_of(width: int, size: float = 1.0, base: float = 1e4) -> Any:
    """Rotary embedding of the first `width` channels, which also scales by `size`, as YaRN does."""

    def table(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * base ** -(torch.arange(width // 2) * 2 / width).repeat(2)
        return size * angles.cos(), size * angles.sin()

    return table


def ragged(lengths: list[int], width: int, seed: int, dtype: torch.dtype) -> Ragged:
    """Rows with some unused room between heads, full of NaN."""
    room = [length + 3 for length in lengths]
    data = torch.full((sum(room), width), torch.nan, dtype=dtype)
    starts = torch.tensor([0, *room[:-1]]).cumsum(0)
    for head, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        data[start : start + length] = numbers(length, width, seed=seed + head, dtype=dtype)
    return Ragged(data, starts.int(), torch.tensor(lengths, dtype=torch.int32), max(lengths))


def places_of(lengths: list[int], largest: int) -> Ragged:
    """For each row a position, ascending within its head, the last of a head `largest` or less."""
    parts = [torch.randperm(largest, generator=torch.Generator().manual_seed(n))[:n].sort().values for n in lengths]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return Ragged(torch.cat(parts).int()[:, None], starts.int(), torch.tensor(lengths, dtype=torch.int32), max(lengths))


CASES: list[dict[str, Any]] = [
    {},
    {"g": 3, "rk": 20, "rv": 24, "d": 32},
    {"g": 4, "q": 3, "lengths": [70, 200, 5], "masked": True},
    {"g": 1, "lengths": [64, 0], "rk": 7, "rv": 33},
    {"placed": True, "lengths": [130, 65], "size": 1.2},
    {"placed": True, "q": 2, "masked": True, "turned": 24, "d": 48, "g": 2},
    {"turned": 16, "d": 24, "size": 1.3, "softcap": 5.0},
    {"g": 5, "q": 4, "masked": True},
    {"lengths": [700], "g": 8, "tile": 128},
]


def case(
    g: int = 2,
    q: int = 1,
    d: int = 16,
    rk: int = 16,
    rv: int = 8,
    lengths: list[int] | None = None,
    placed: bool = False,
    masked: bool = False,
    turned: int | None = None,
    size: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float16,
    **_: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lengths = lengths or [100, 129]
    k, largest = len(lengths), 3000 if placed else max(lengths)
    turns = RotaryTable.of(rotary_of(turned or d, size), largest, d, torch.device("cpu"))
    assert turns is not None
    positions = None
    if placed:
        positions = places_of(lengths, largest)
    tensors = (
        numbers(g * k, q, d, seed=5, dtype=dtype),
        ragged(lengths, rk, 10, dtype),
        ragged(lengths, rv, 20, dtype),
        numbers(k, rk, d, seed=6, dtype=dtype) * rk**-0.5,
        numbers(k, rv, d, seed=7, dtype=dtype),
    )
    asked = torch.arange(q) + largest - q - 20 if masked else None
    scoring = Scoring(SCALE, softcap=softcap)
    how = {"scoring": scoring, "query_positions": asked, "positions": positions, "rotary": turns}
    return tensors, how


@pytest.mark.parametrize("given", CASES, ids=str)
def test_reference_is_attention_over_the_rotated_keys(given: dict[str, Any]) -> None:
    (query, keys, values, key_basis, value_basis), how = case(**given, dtype=torch.float64)
    out, lse = decode_lowrank(query, keys, values, key_basis, value_basis, lse=True, **how)
    group, d = len(query) // len(key_basis), query.shape[2]
    table = rotary_of(given.get("turned") or d, given.get("size", 1.0))
    for head in range(len(query)):
        kv = head // group
        start, length = int(keys.starts[kv]), int(keys.lengths[kv])
        places = torch.arange(length)
        if how["positions"] is not None:
            begin = int(how["positions"].starts[kv])
            places = how["positions"].data[begin : begin + length, 0].long()
        cos, sin = table(places)
        key = rotate(keys.data[start : start + length] @ key_basis[kv], cos.double(), sin.double())
        value = values.data[start : start + length] @ value_basis[kv]
        score = query[head] @ key.T * SCALE
        if cap := how["scoring"].softcap:
            score = cap * torch.tanh(score / cap)
        if how["query_positions"] is not None:
            score = score.masked_fill(places > how["query_positions"][:, None], -torch.inf)
        # The table is float32, so its angles are.
        torch.testing.assert_close(out[head], score.softmax(1).nan_to_num() @ value, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(lse[head], score.logsumexp(1), atol=5e-3, rtol=5e-3)


@interpreted
@pytest.mark.parametrize("given", CASES, ids=str)
def test_kernel_does_as_the_reference(given: dict[str, Any]) -> None:
    from workbench_kernels.gpu.lowrank_decode import Config
    from workbench_kernels.gpu.lowrank_decode import decode_rotated as kernel

    (query, keys, values, key_basis, _), how = case(**given)
    config = Config(4, given.get("tile", 64), 2, 1)
    found, sums = kernel(query, keys, values, key_basis, lse=True, config=config, **how)
    (query, keys, values, key_basis, _), how = case(**given)
    exact, wanted = decode_rotated.reference(
        query.double(), keys._replace(data=keys.data.double()), values._replace(data=values.data.double()),
        key_basis.double(), lse=True, **how,
    )  # fmt: skip
    assert found.dtype == query.dtype and sums is not None and sums.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(sums.double(), wanted, atol=4e-3, rtol=4e-3)


def test_queries_are_projected_where_nothing_is_rotated() -> None:
    (query, keys, values, key_basis, value_basis), how = case(g=3, q=2, lengths=[40, 17], masked=True)
    query, key_basis, value_basis = query.double(), key_basis.double(), value_basis.double()
    keys, values = (x._replace(data=x.data.double()) for x in (keys, values))
    how["rotary"] = None
    found, sums = decode_lowrank(query, keys, values, key_basis, value_basis, lse=True, **how)
    (key, real), (value, _) = keys.padded(), values.padded()
    visible = real[:, None] & how["scoring"].visible(how["query_positions"], torch.arange(key.shape[1]))
    exact, wanted = attention_state(query, key @ key_basis, value @ value_basis, visible, how["scoring"])
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(sums, wanted)


@pytest.mark.parametrize("longest", [1, LOW, LOW + 1, 5000])
def test_turns_multiply_to_every_position(longest: int) -> None:
    table = rotary_of(32, 1.5)
    turns = RotaryTable.of(table, longest, 32, torch.device("cpu"))
    assert turns is not None and turns.order is None and turns.positions >= longest
    cos, sin = turns.at(torch.arange(longest))
    torch.testing.assert_close(cos, table(torch.arange(longest))[0][:, :16], atol=2e-3, rtol=0)
    torch.testing.assert_close(sin, table(torch.arange(longest))[1][:, :16], atol=2e-3, rtol=0)


def test_what_is_no_rotation_by_proportional_angles_has_no_turns() -> None:
    def bent(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = (positions.float() ** 1.1)[:, None] * torch.tensor([0.3, 0.01]).repeat(2)
        return angles.cos(), angles.sin()

    def neighbours(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * torch.tensor([0.3, 0.3, 0.01, 0.01])
        return angles.cos(), angles.sin()

    assert RotaryTable.of(bent, 1000, 4, torch.device("cpu")) is None
    assert RotaryTable.of(neighbours, 1000, 4, torch.device("cpu")) is None


def layer_of(rotation: Rotation | None) -> LayerTrace:
    keys, values, queries = numbers(2, 60, 20), numbers(2, 60, 18, seed=1), numbers(4, 60, 20, seed=2)
    found = rotation and (lambda read: rotation)
    return LayerTrace(0, keys, values, queries, torch.device("cpu"), Scoring(SCALE), rotary=found)


@interpreted
@pytest.mark.parametrize(
    "rotation",
    [Rotation(rotary_of(12, 1.2)), Rotation(rotary_of(12, 1.2), PAIRS), None],
    ids=["halves", "pairs", "plain"],
)
@pytest.mark.parametrize("counts", [[60, 60], [5, 52], [0, 60]], ids=str)
@pytest.mark.parametrize("window", [0, 8])
def test_store_attends_by_kernels_as_without(
    rotation: Rotation | None, counts: list[int], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, keep = layer_of(rotation), torch.zeros(2, 60, dtype=torch.bool)
    for head, count in enumerate(counts):
        keep[head, torch.randperm(60, generator=torch.Generator().manual_seed(1))[:count]] = True
    store = LowRankStore.where(
        layer, keep, spaces_of(layer), Ranks(14, 12), torch.float16, window=window, bits=None, group=1
    )
    twin, begin, calls = store.clone(), 60, []
    whole = LowRankStore.by_kernel

    def counted(self: LowRankStore, *given: Any) -> Tensor | None:
        calls.append(whole(self, *given))
        return calls[-1]

    monkeypatch.setattr(LowRankStore, "by_kernel", counted)
    for count in (1, 1, 1):
        positions = torch.arange(begin, begin + count)
        keys, values, query = (numbers(h, count, w, seed=begin + w, dtype=torch.float16) for h, w in SHAPES)
        store.append(keys, values, positions)
        wanted, _ = store.attend(query, positions, Scoring(SCALE, softcap=9.0))
        assert calls.pop() is None
        twin.append(keys, values, positions)
        with monkeypatch.context() as patched:
            for module in (store_module, decode, kernels_lowrank, softmax):
                patched.setattr(module, "on_gpu", lambda *_: True)
            found, _ = twin.attend(query, positions, Scoring(SCALE, softcap=9.0))
            assert calls.pop() is found
        torch.testing.assert_close(found, wanted, atol=3e-3, rtol=3e-3)
        begin += count
    assert store.nbytes == twin.nbytes
