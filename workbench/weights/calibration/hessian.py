"""Hessian accumulation: what calibration sums up of the inputs of linear layers.

The Hessian of a layer's squared output error, by its weights, is the mean of x xᵀ over its inputs (but for a factor of
2, which no method needs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

_CHANNELS = ("mean", "absmean", "absmax", "square")  # in the order of the fields
FIRST = 0.05  # what the first tokens of texts add to the Hessian, as a share of what all tokens do


@dataclass(frozen=True)
class InputStats:
    """What enters a linear layer, over all tokens of the calibration texts; float32, channel by channel.

    tokens: how many. mean, absmean, square: means of x, |x| and x² [i]. absmax: the largest |x| [i].
    accumulated: the mean of x xᵀ [i, i], to which a twentieth of its mean over the texts' first tokens is added; None
    where not asked for. Layers with the same input share one.

    The first token counts more because all later ones attend to it most (an attention sink): an error of its key or
    value goes into every output, while those of other tokens average out. A plain mean over texts of 512 tokens hardly
    sees it.
    """

    tokens: int
    mean: Tensor
    absmean: Tensor
    absmax: Tensor
    square: Tensor
    accumulated: Tensor | None = None

    @property
    def hessian(self) -> Tensor:
        """The Hessian [i, i]; a method that needs it says so (`needs_hessian`)."""
        if self.accumulated is None:
            raise ValueError("Hessians were not accumulated: the method has to set needs_hessian")
        return self.accumulated

    def output_error(self, change: Tensor) -> Tensor:
        """The mean square, counted as in the Hessian M, of what a change of the weight [o, i] changes in each output
        [o]: the diagonal of Δ M Δᵀ.
        """
        change = change.float()
        return ((change @ self.hessian) * change).sum(dim=1)

    def to(self, device: torch.device) -> InputStats:
        """The same on another device."""
        mean, absmean, absmax, square = (getattr(self, name).to(device) for name in _CHANNELS)
        accumulated = None if self.accumulated is None else self.accumulated.to(device)
        return InputStats(self.tokens, mean, absmean, absmax, square, accumulated)


class InputObserver:
    """Sums of what enters some linear layers while a block runs; layers with the same input share them."""

    def __init__(self, *, hessians: bool) -> None:
        self._hessians = hessians
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._tokens: dict[str, int] = {}
        self._owner: dict[str, str] = {}  # layer -> the layer under whose name its input is summed
        self._last: tuple[Tensor, str] | None = None

    @contextmanager
    def observing(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Until the block ends, add up what enters these layers."""
        handles = [module.register_forward_pre_hook(partial(self._observe, name)) for name, module in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _observe(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if self._last is not None and self._last[0] is x and self._owner.get(name, self._last[1]) == self._last[1]:
            self._owner[name] = self._last[1]  # seen already, under another's name
            return
        self._owner.setdefault(name, name)
        if self._owner[name] != name:  # its input was shared before, and now is not
            raise RuntimeError(f"{name} takes the same input as {self._owner[name]} in some calls only")
        self._last = (x, name)
        flat = x.detach().flatten(0, -2).float()  # [n, i]
        size = flat.abs()
        sums = self._sums.get(name)
        if sums is None:
            width = flat.shape[1]
            sums = self._sums[name] = {key: flat.new_zeros(width) for key in _CHANNELS}
            if self._hessians:
                sums["accumulated"] = flat.new_zeros(width, width)
        if flat.shape[0]:
            sums["mean"] += flat.sum(dim=0)
            sums["absmean"] += size.sum(dim=0)
            torch.maximum(sums["absmax"], size.amax(dim=0), out=sums["absmax"])
            sums["square"] += flat.square().sum(dim=0)
            if self._hessians:
                sums["accumulated"].addmm_(flat.T, flat)
                if x.ndim == 3:  # whole texts [t, n, i]; the tokens of an expert are a heap without beginning
                    first = x[:, 0].detach().float()
                    sums["accumulated"].addmm_(first.T, first, alpha=FIRST * x.shape[1])
        self._tokens[name] = self._tokens.get(name, 0) + flat.shape[0]

    def stats(self, linears: Mapping[str, nn.Linear]) -> dict[str, InputStats]:
        """The means, for each layer; zeros for a layer that never ran (an expert that no token chose)."""
        made: dict[str, InputStats] = {}
        for name, linear in linears.items():
            owner = self._owner.get(name, name)
            if owner not in made:
                made[owner] = self._mean(owner, linear)
            made[name] = made[owner]
        return {name: made[name] for name in linears}

    def _mean(self, name: str, linear: nn.Linear) -> InputStats:
        tokens = self._tokens.get(name, 0)
        if not tokens:
            nothing = torch.zeros(linear.in_features, device=linear.weight.device)
            accumulated = nothing.new_zeros(nothing.numel(), nothing.numel()) if self._hessians else None
            return InputStats(0, nothing, nothing, nothing, nothing, accumulated)
        sums = {key: total if key == "absmax" else total / tokens for key, total in self._sums.pop(name).items()}
        return InputStats(tokens, **sums)
