"""Stores hold what they say, in the bytes they say, whatever is appended, evicted or copied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kv.support import numbers
from workbench.kv.stores import DenseStore, PackedStore, SlidingStore, SplitStore, Store
from workbench.kv.stores.rows import Rows
from workbench_kernels import Scoring, dequantise, pack, quantise, unpack

settings.register_profile("stores", deadline=None, max_examples=40)
settings.load_profile("stores")

D = 16


def some_of(heads: int, tokens: int, seed: int, *, uniform: bool) -> Tensor:
    """Which entries to keep, bool [k, n]: equally many in every head, or any number, zero and all included."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(heads, tokens, generator=generator).argsort(dim=1)
    counts = torch.randint(0, tokens + 1, (1 if uniform else heads, 1), generator=generator)
    return order < counts


def entries(store: Store) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """What each head really holds: position -> (key, value)."""
    held = store.contents(torch.float32)
    rows = held.positions.expand(held.keys.shape[0], -1)
    valid = torch.ones(held.keys.shape[:2], dtype=torch.bool) if held.valid is None else held.valid
    found = []
    for head in range(held.keys.shape[0]):
        slots = valid[head].nonzero()[:, 0].tolist()
        found.append({int(rows[head, s]): (held.keys[head, s], held.values[head, s]) for s in slots})
        assert len(found[-1]) == len(slots), "a position is held twice"
    return found


def packed(
    keys: Tensor, values: Tensor, keep: Tensor, *, bits: int = 4, residual: int = 16, group: int = 8
) -> PackedStore:
    return PackedStore.where(keys, values, keep, torch.float32, bits=bits, group=group, residual=residual)


# -- bits


@given(st.sampled_from([2, 4, 8]), st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**31))
def test_packed_codes_come_back_as_they_were(bits: int, channels: int, rows: int, seed: int) -> None:
    codes = torch.randint(
        0, 2**bits, (rows, channels), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed_codes = pack(codes, bits)
    assert packed_codes.shape == (rows, -(-channels * bits // 8))
    assert torch.equal(unpack(packed_codes, bits, channels), codes)


@given(st.sampled_from([2, 4, 8]), st.integers(1, 64), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_rounding_is_never_further_off_than_half_a_step(bits: int, group: int, size: float, seed: int) -> None:
    x = numbers(5, group, seed=seed) * size
    codes, scale, zero = quantise(x, bits)
    back = dequantise(codes, scale, zero)
    half_a_step = (x.amax(1) - x.amin(1)) / (2**bits - 1) / 2
    # Scale and zero are kept in 16 bits: their own rounding, over all the steps, comes on top; scales below 2**-14 are
    # subnormal, in steps of 2**-24.
    sixteen_bits = 2.0**-10 * x.abs().amax(1) * 3
    assert bool(((back - x).abs().amax(1) <= half_a_step * 1.01 + sixteen_bits + 2.0 ** (bits - 25) + 1e-6).all())


def test_a_constant_group_is_stored_exactly() -> None:
    x = torch.full((3, 8), 0.5)
    codes, scale, zero = quantise(x, 2)
    assert torch.equal(dequantise(codes, scale, zero), x)


# -- rows and dense stores


@given(st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
def test_rows_of_any_length_come_back_after_growing(heads: int, tokens: int, uniform: bool, seed: int) -> None:
    x, keep = numbers(heads, tokens, 3, seed=seed), some_of(heads, tokens, seed, uniform=uniform)
    rows = Rows.where(x, keep, torch.float32)
    assert rows.view().shape == (heads, int(keep.sum(dim=1).max()), 3)
    new = numbers(heads, 7, 3, seed=seed + 1)
    rows.reserve(2)
    for first, last in ((0, 1), (1, 2), (2, 7)):
        rows.append(new[:, first:last], block=3)
    view, valid = rows.view(), rows.valid()
    for head in range(heads):
        real = view[head] if valid is None else view[head, valid[head]]
        assert torch.equal(real, torch.cat([x[head, keep[head]], new[head]]))
    owners = rows.owners()
    for head in range(heads):
        assert bool((owners[rows.slots()[head, : int(rows.counts[head])]] == head).all())


@given(st.integers(1, 4), st.integers(2, 24), st.booleans(), st.integers(1, 5), st.integers(0, 2**31))
def test_evicting_leaves_exactly_the_other_entries(
    heads: int, tokens: int, uniform: bool, rounds: int, seed: int
) -> None:
    keys, values = numbers(heads, tokens + rounds, D, seed=seed), numbers(heads, tokens + rounds, D, seed=seed + 1)
    keep = some_of(heads, tokens, seed, uniform=uniform)
    keep[:, :2] = True
    store = DenseStore.where(keys[:, :tokens], values[:, :tokens], keep, torch.float32, numbers(heads, tokens))
    expected = [set(row.nonzero()[:, 0].tolist()) for row in keep]
    generator = torch.Generator().manual_seed(seed)
    for step in range(rounds):
        shortest = min(len(held) for held in expected)
        count = int(torch.randint(0, shortest + 1, (1,), generator=generator))
        slots = torch.stack([torch.randperm(len(held), generator=generator)[:count] for held in expected])
        positions = store.slot_positions.expand(heads, -1)
        for head in range(heads):
            expected[head] -= set(positions[head, slots[head]].tolist())
        if count:
            store.evict(slots)
        at = tokens + step
        store.append(keys[:, at : at + 1], values[:, at : at + 1], torch.tensor([at]))
        for held in expected:
            held.add(at)
    for head, found in enumerate(entries(store)):
        assert set(found) == expected[head]
        for position, (key, value) in found.items():
            assert torch.equal(key, keys[head, position]) and torch.equal(value, values[head, position])
    for head, row in enumerate(store.positions):
        assert row.tolist() == sorted(expected[head])


def test_evicting_for_a_new_token_does_not_let_the_store_grow() -> None:
    keys = numbers(2, 40, D)
    store = DenseStore.where(
        keys[:, :8], keys[:, :8], torch.ones(2, 8, dtype=torch.bool), torch.bfloat16, torch.zeros(2, 8)
    )
    before = store.nbytes
    for step in range(8, 40):
        store.evict(torch.tensor([[step % 8], [(step * 3) % 8]]))
        store.append(keys[:, step : step + 1], keys[:, step : step + 1], torch.tensor([step]))
    assert store.nbytes == before


# -- packed stores


def published_lengths(total: int, residual: int) -> tuple[int, int]:
    """Quantised keys and values after reading the first and adding token by token, by the rule of the paper."""
    return total // residual * residual, max(total - residual, 0)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33])
def test_keys_flush_by_blocks_and_values_one_at_a_time(tokens: int) -> None:
    # Trap 5: either rule applied to the other side makes the counts differ by one.
    residual, total = 16, 70
    keys, values = numbers(2, total, D), numbers(2, total, D, seed=1)
    store = packed(keys[:, :tokens], values[:, :tokens], torch.ones(2, tokens, dtype=torch.bool), residual=residual)
    for count in range(tokens, total + 1):
        quantised_keys, quantised_values = published_lengths(count, residual)
        assert (store.keys.codes.longest, store.key_tail.longest) == (quantised_keys, count - quantised_keys)
        assert (store.values.codes.longest, store.value_tail.longest) == (quantised_values, count - quantised_values)
        if count < total:
            at = slice(count, count + 1)
            store.append(keys[:, at], values[:, at], torch.tensor([count]))
            assert store.value_tail.longest == count + 1 - quantised_values  # exact for its own pass
            store.attend(keys[:, at], torch.tensor([count]), Scoring(0.25))
    found = entries(store)
    for head in range(2):
        assert set(found[head]) == set(range(total))
        exact = [p for p in range(total) if torch.equal(found[head][p][0], keys[head, p])]
        assert exact == list(range(64, total))
        assert [p for p in range(total) if torch.equal(found[head][p][1], values[head, p])] == list(range(54, total))


@given(st.integers(1, 3), st.integers(1, 50), st.booleans(), st.sampled_from([0, 8, 16]), st.integers(0, 2**31))
def test_a_packed_store_gives_every_entry_back_at_its_position(
    heads: int, tokens: int, uniform: bool, residual: int, seed: int
) -> None:
    total = tokens + 20
    keys, values = numbers(heads, total, D, seed=seed), numbers(heads, total, D, seed=seed + 1)
    keep = some_of(heads, tokens, seed, uniform=uniform)
    store = packed(keys[:, :tokens], values[:, :tokens], keep, bits=8, residual=residual)
    store.append(keys[:, tokens : tokens + 13], values[:, tokens : tokens + 13], torch.arange(tokens, tokens + 13))
    for at in range(tokens + 13, total):
        store.append(keys[:, at : at + 1], values[:, at : at + 1], torch.tensor([at]))
    for head, found in enumerate(entries(store)):
        assert set(found) == set(keep[head].nonzero()[:, 0].tolist()) | set(range(tokens, total))
        for position, (key, value) in found.items():
            assert torch.allclose(key, keys[head, position], atol=0.03)
            assert torch.allclose(value, values[head, position], atol=0.03)


def relative_error(store: Store, keys: Tensor) -> float:
    return float((store.contents(torch.float32).keys - keys).norm() / keys.norm())


def test_two_bit_keys_with_outlier_channels_are_better_per_channel() -> None:
    # Trap 6: the wrong axis by default.
    keys = numbers(2, 64, 32)
    keys[:, :, [3, 17]] = keys[:, :, [3, 17]] + 12
    keep = torch.ones(2, 64, dtype=torch.bool)
    options = {"bits": 2, "group": 32, "residual": 0}
    channel, token = (
        PackedStore.where(keys, keys, keep, torch.float32, key_axis=axis, **options) for axis in ("channel", "token")
    )
    assert relative_error(channel, keys) < 0.6 * relative_error(token, keys)


def test_balancing_is_undone_when_read_and_protects_small_channels() -> None:
    keys = numbers(2, 40, 32)
    keys[:, :, 5] *= 60
    queries_over_keys = torch.ones(2, 32)
    queries_over_keys[:, 5] = 1 / 60  # queries are small where keys are large
    balance = queries_over_keys.sqrt().to(torch.float16)
    keep = some_of(2, 40, 3, uniform=False)
    options = {"bits": 4, "group": 32, "residual": 0, "key_axis": "token"}
    plain = PackedStore.where(keys, keys, keep, torch.float32, **options)
    balanced = PackedStore.where(keys, keys, keep, torch.float32, balance=balance, **options)
    small = [channel for channel in range(32) if channel != 5]

    def error(store: Store) -> float:
        worst = [
            key[small] - keys[h, p, small] for h, held in enumerate(entries(store)) for p, (key, _) in held.items()
        ]
        return float(torch.stack(worst).norm())

    assert error(balanced) < 0.25 * error(plain)
    large = [float(k[5] / keys[h, p, 5]) for h, held in enumerate(entries(balanced)) for p, (k, _) in held.items()]
    assert sorted(large)[len(large) // 2] == pytest.approx(1, abs=0.1)
    assert balanced.nbytes - plain.nbytes == balance.numel() * 2


def test_grouped_heads_are_held_once() -> None:
    # Trap 3: keys expanded to query heads make the cache several times larger.
    keys = numbers(2, 48, D)
    keep = torch.ones(2, 48, dtype=torch.bool)
    store = DenseStore.where(keys, keys, keep, torch.bfloat16)
    out, _ = store.attend(numbers(8, 3, D), torch.arange(45, 48), Scoring(0.25))
    assert out.shape == (8, 3, D)
    assert store.nbytes == 2 * 48 * (D + D) * 2


# -- copies and compositions


def store_of(kind: str, tokens: int) -> Store:
    keys, values = numbers(2, tokens, D), numbers(2, tokens, D, seed=1)
    keep = some_of(2, tokens, 5, uniform=False)
    keep[:, -1] = True
    if kind == "dense":
        return DenseStore.where(keys, values, torch.ones_like(keep), torch.float32)
    if kind == "ragged":
        return DenseStore.where(keys, values, keep, torch.float32, numbers(2, tokens))
    if kind == "packed":
        return packed(keys, values, keep)
    if kind == "sliding":
        return SlidingStore.of(keys, values, 8, torch.float32)
    low = PackedStore.where(
        keys,
        values,
        ~keep,
        torch.float32,
        bits=4,
        group=8,
        residual=0,
        key_axis="token",
        balance=torch.ones(2, D).half(),
    )
    return SplitStore((DenseStore.where(keys, values, keep, torch.float32), low))


KINDS = ["dense", "ragged", "packed", "sliding", "split"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_its_original_never_touch_each_other(kind: str) -> None:
    # Trap 4: asking the same question twice gave different answers.
    store = store_of(kind, 30)
    store.reserve(4)
    before, size = entries(store), store.nbytes
    twin = store.clone()
    assert twin.nbytes == size
    shared = {t.untyped_storage().data_ptr() for ts in store.tensors().values() for t in ts if t.numel()}
    assert shared.isdisjoint(
        {t.untyped_storage().data_ptr() for ts in twin.tensors().values() for t in ts if t.numel()}
    )
    new = numbers(2, 40, D, seed=9)
    for step in range(40):
        twin.append(new[:, step : step + 1], new[:, step : step + 1], torch.tensor([30 + step]))
    if isinstance(twin, DenseStore):
        twin.evict(torch.tensor([[0], [0]]))
    after = entries(store)
    assert [set(held) for held in after] == [set(held) for held in before] and store.nbytes == size
    for old, new_held in zip(before, after, strict=True):
        assert all(torch.equal(old[p][0], new_held[p][0]) and torch.equal(old[p][1], new_held[p][1]) for p in old)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_a_store_is_attention_over_what_it_holds(kind: str) -> None:
    # Trap 12: several new tokens at once on heads of unequal length; trap 8: visibility by true position.
    store, count, scale = store_of(kind, 30), 5, 0.3
    window = 8 if kind == "sliding" else None
    new = numbers(2, count, D, seed=7)
    store.append(new, new, torch.arange(30, 30 + count))
    query = numbers(4, count, D, seed=8)
    before = entries(store)  # a sliding window is cut once the new tokens have attended
    if kind == "sliding":
        assert set(before[0]) == set(range(23, 35)) and store.nbytes == 2 * 2 * 12 * D * 4
    out, rows = store.attend(query, torch.arange(30, 30 + count), Scoring(scale, window), weights=True)
    assert rows is not None
    for head in range(4):
        held = before[head // 2]
        for step in range(count):
            at = 30 + step
            seen = [p for p in held if p <= at and (window is None or p > at - window)]
            logits = torch.stack([query[head, step] @ held[p][0] for p in seen]) * scale
            expected = (logits.softmax(0)[:, None] * torch.stack([held[p][1] for p in seen])).sum(0)
            assert torch.allclose(out[head, step], expected, atol=1e-5)
    assert torch.allclose(rows.sum(dim=-1), torch.ones(2, 2, count), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reserved_room_is_counted_and_then_used(kind: str) -> None:
    store = store_of(kind, 30)
    before = store.nbytes
    store.reserve(10)
    reserved = store.nbytes
    if kind != "sliding":
        assert reserved > before
    new = numbers(2, 10, D)
    for step in range(10):
        store.append(new[:, step : step + 1], new[:, step : step + 1], torch.tensor([30 + step]))
    if kind in ("dense", "ragged", "split"):
        assert store.nbytes == reserved


def test_a_head_that_holds_nothing_shows_numbers_after_room_was_made() -> None:
    # What is masked is multiplied by zero, and zero times whatever lay in that memory may not be zero.
    keep = torch.tensor([[False] * 5, [True] * 5])
    rows = Rows.where(torch.ones(2, 5, 3), keep, torch.float16)
    rows.reserve(64)
    assert bool((rows.view()[0] == 0).all()) and bool((rows.view()[1] == 1).all())
