"""Which layers share a softmax, what is given back of what that loses, and whose values are the newest."""

from __future__ import annotations

import pytest
import torch

from workbench.attention.shared_layers import block_size, source_layer
from workbench.attention.shared_weights import compensation, newest_values
from workbench.kv.stores import Dequantised


@pytest.mark.parametrize(
    ("layers", "reusing", "size", "sources"),
    [
        (8, 0, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 3, 4, [0, 1, 2, 3, 4, 4, 4, 4]),
        (8, 5, 4, [0, 1, 1, 1, 4, 4, 4, 4]),  # what is no whole block lies below
        (8, 4, 2, [0, 0, 2, 2, 4, 4, 6, 6]),
        (8, 7, 2, [0, 0, 0, 0, 0, 0, 0, 0]),  # blocks of two do not save as much
    ],
)
def test_blocks_lie_from_the_top_downwards(layers: int, reusing: int, size: int, sources: list[int]) -> None:
    assert [source_layer(layer, layers, reusing, size) for layer in range(layers)] == sources


@pytest.mark.parametrize("layers", range(1, 20))
def test_blocks_are_no_longer_than_they_have_to_be(layers: int) -> None:
    for size in range(2, 6):
        for reusing in range(layers):
            found = block_size(layers, reusing, size)
            enough = [
                n for n in range(size, size + layers + 2) if not reusing or reusing + -(-reusing // (n - 1)) <= layers
            ]
            assert found == enough[0]


def test_no_other_projection_of_the_values_gives_more_back() -> None:
    draw = torch.Generator().manual_seed(0)
    value, lost = (torch.randn(heads, 40, 3, generator=draw) for heads in (2, 4))
    rows, wanted = (x.transpose(0, 1).flatten(1) for x in (value, lost))
    given = compensation(value, lost)
    least = (rows @ given - wanted).square().sum()
    assert torch.allclose(given, torch.linalg.lstsq(rows, wanted).solution, atol=1e-4)
    for _ in range(20):
        assert (rows @ (given + 0.01 * torch.randn(given.shape, generator=draw)) - wanted).square().sum() > least


def test_the_newest_values_are_found_by_position_wherever_a_head_holds_them() -> None:
    positions = torch.tensor([[4, 0, 7, 6], [7, 6, 4, 1]])
    values = positions[..., None].float() + torch.tensor([0.0, 0.5])[:, None, None]
    contents = Dequantised(values, values, positions, None)
    found = newest_values(contents, torch.tensor([6, 7]))
    assert found[..., 0].tolist() == [[6.0, 7.0], [6.5, 7.5]]
