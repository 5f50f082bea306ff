"""ALiBi's slopes (Press et al. 2022, arXiv:2108.12409), as Bloom and Falcon make them."""

from __future__ import annotations

import torch
from torch import Tensor


def slopes(heads: int, device: torch.device) -> Tensor:
    """[h] float32: 2 ** -(8 / p), its square and so on for the largest power of two p within the heads; for those left
    over the first, third and so on of twice as many.
    """
    whole = 2 ** (heads.bit_length() - 1)
    steps = [8 / whole * i for i in range(1, whole + 1)] + [4 / whole * i for i in range(1, 2 * (heads - whole), 2)]
    return 2.0 ** -torch.tensor(steps, device=device)
