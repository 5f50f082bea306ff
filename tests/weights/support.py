"""What the tests of weight methods share: numbers that are always the same, calibration, and what a model says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.weights import WeightMethod, compressed
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration

IDS = torch.arange(3, 67)  # a text of a tiny model's tokens
RANDOM_IDS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=seeded(seed))


def correlated(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Inputs of different sizes that depend on each other, [n, i]."""
    mixed = drawn(tokens, width, seed=seed) @ (torch.eye(width) + 0.3 * drawn(width, width, seed=seed + 1))
    return mixed * drawn(width, seed=seed + 2).exp()


def stats_of(x: Tensor) -> InputStats:
    """What calibration would say of inputs [n, i]."""
    size = x.abs()
    return InputStats(len(x), x.mean(0), size.mean(0), size.amax(0), x.square().mean(0), x.T @ x / len(x))


def layer_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer with a copy of this weight [o, i]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Of one text [n]: [n, v]; of several [t, n]: [t, n, v]."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids if ids.ndim == 2 else ids[None]).logits
    return found if ids.ndim == 2 else found[0]


def studied(model: PreTrainedModel, samples: int = 4, tokens: int = 64, **options: Any) -> WeightStudy:
    """Calibration on what the model itself says."""
    return WeightStudy(model, calibration=Calibration(SAMPLED, samples=samples, tokens=tokens), **options)


def with_study(model: PreTrainedModel, method: WeightMethod, study: WeightStudy) -> PreTrainedModel:
    """The model compressed by one method on calibration that was made before."""
    return compressed(model, [method], study=lambda _, number: study)
