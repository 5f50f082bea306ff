"""Segments of a text, and keys that are held alone."""

from __future__ import annotations

import pytest
import torch

from tests.kv.support import numbers
from workbench.kv.segments import overlapping
from workbench.kv.stores.keys_only import KeyStore


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
@pytest.mark.parametrize("tokens", [1, 4, 5, 23])
def test_segments_cover_a_text_and_each_begins_with_the_end_of_the_one_before(
    size: int, overlap: float, tokens: int
) -> None:
    where = torch.arange(100, 100 + tokens)
    segments = [segment.tolist() for segment in overlapping(where, size, overlap)]
    shared = min(int(overlap * size), size - 1)
    want, start = [], 0
    while True:
        want.append(list(range(100 + start, 100 + min(start + size, tokens))))
        if start + size >= tokens:
            break
        start += size - shared
    assert segments == want


def test_a_key_store_takes_no_room_but_its_keys_and_grows_within_it() -> None:
    keys = numbers(2, 5, 4)
    store = KeyStore(torch.empty(2, 8, 4, dtype=torch.bfloat16))
    store.append(keys[:, :3], keys[:, :3], torch.arange(3))
    other = store.clone()
    store.append(keys[:, 3:], keys[:, 3:], torch.arange(3, 5))
    assert torch.equal(store.appended, keys.to(torch.bfloat16))
    assert torch.equal(other.appended, keys[:, :3].to(torch.bfloat16))  # a copy grows by itself
    contents = store.contents(torch.float32)
    assert contents.keys.shape == (2, 5, 4) and contents.values.numel() == 0
    assert contents.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert store.nbytes == 2 * 8 * 4 * 2
