"""What calibration remembers of the inputs and gradients of linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

_CHANNELS = ("mean", "absmean", "absmax", "square")  # in the order of the fields
FIRST = 0.05  # what the first tokens of texts add to the second moment, as a share of what all tokens do


@dataclass(frozen=True)
class InputStats:
    """What enters a linear layer, over all tokens of the calibration texts; float32, channel by channel.

    tokens: how many. mean, absmean, square: means of x, |x| and x² [i]. absmax: the largest |x| [i]. moment: the mean
    of x xᵀ [i, i], to which a twentieth of its mean over the texts' first tokens is added; None where not asked for.
    Layers with the same input share one.

    The first token counts more because all later ones attend to it most (an attention sink): an error of its key or
    value goes into every output, while those of other tokens average out. A plain mean over texts of 512 tokens hardly
    sees it.
    """

    tokens: int
    mean: Tensor
    absmean: Tensor
    absmax: Tensor
    square: Tensor
    moment: Tensor | None = None

    @property
    def second_moment(self) -> Tensor:
        """The moment [i, i]; a method that needs it says so (`needs_moment`)."""
        if self.moment is None:
            raise ValueError("second moments were not gathered: the method has to set needs_moment")
        return self.moment

    def output_error(self, change: Tensor) -> Tensor:
        """The mean square, counted as in the moment M, of what a change of the weight [o, i] changes in each output
        [o]: the diagonal of Δ M Δᵀ.
        """
        change = change.float()
        return ((change @ self.second_moment) * change).sum(dim=1)

    def to(self, device: torch.device) -> InputStats:
        """The same on another device."""
        mean, absmean, absmax, square = (getattr(self, name).to(device) for name in _CHANNELS)
        moment = None if self.moment is None else self.moment.to(device)
        return InputStats(self.tokens, mean, absmean, absmax, square, moment)


class Gathering:
    """Sums of what enters some linear layers while a block runs; layers with the same input share them."""

    def __init__(self, moments: bool) -> None:
        self._moments = moments
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._tokens: dict[str, int] = {}
        self._owner: dict[str, str] = {}  # layer -> the layer under whose name its input is summed
        self._last: tuple[Tensor, str] | None = None

    @contextmanager
    def listening(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Until the block ends, add up what enters these layers."""
        handles = [module.register_forward_pre_hook(partial(self._hear, name)) for name, module in linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _hear(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if self._last is not None and self._last[0] is x and self._owner.get(name, self._last[1]) == self._last[1]:
            self._owner[name] = self._last[1]  # heard already, under another's name
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
            if self._moments:
                sums["moment"] = flat.new_zeros(width, width)
        if flat.shape[0]:
            sums["mean"] += flat.sum(dim=0)
            sums["absmean"] += size.sum(dim=0)
            torch.maximum(sums["absmax"], size.amax(dim=0), out=sums["absmax"])
            sums["square"] += flat.square().sum(dim=0)
            if self._moments:
                sums["moment"].addmm_(flat.T, flat)
                if x.ndim == 3:  # whole texts [t, n, i]; the tokens of an expert are a heap without beginning
                    first = x[:, 0].detach().float()
                    sums["moment"].addmm_(first.T, first, alpha=FIRST * x.shape[1])
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
            moment = nothing.new_zeros(nothing.numel(), nothing.numel()) if self._moments else None
            return InputStats(0, nothing, nothing, nothing, nothing, moment)
        sums = {key: total if key == "absmax" else total / tokens for key, total in self._sums.pop(name).items()}
        return InputStats(tokens, **sums)
