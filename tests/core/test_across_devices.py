"""Tensors of layers on several devices. The meta device stands for another one."""

import pytest
import torch

from workbench.core.across_devices import stacked


def test_the_first_says_where_they_are_joined() -> None:
    joined = stacked([torch.zeros(2, 3, device="meta"), torch.ones(2, 3)])
    assert joined.device.type == "meta"
    assert joined.shape == (2, 2, 3)


def test_on_one_device_it_is_a_stack() -> None:
    one, other = torch.arange(6).view(2, 3), -torch.arange(6).view(2, 3)
    assert torch.equal(stacked([one, other]), torch.stack([one, other]))


def test_unlike_shapes_are_not_joined() -> None:
    with pytest.raises(RuntimeError, match="equal size"):
        stacked([torch.zeros(2), torch.zeros(3)])
