"""What lower ranks of the keys and values cost each layer of a model, measured at its output."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from workbench.engine.attention_hook import engaged, forward
from workbench.engine.states import States, keeps_states
from workbench.kv.base import Study
from workbench.kv.stores.low_rank import Ranks, Spaces, spaces_of
from workbench.kv.stores.store import seen_by
from workbench.models.decoder import decoder_layers
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring, attend

_THRESHOLDS = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # at which errors are measured
_PROBES = 16  # positions at which errors are measured, from the first to the last
Hidden = Tensor | tuple[Tensor, ...]  # what a decoder layer returns: hidden states, alone or first


@dataclass(frozen=True)
class Profile:
    """What lower ranks cost one layer: at each of _THRESHOLDS the relative error of its output.

    keys, values: for each rank the share of the singular values that lie before it, in the head where that is least.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]

    def ranks(self, error: float) -> Ranks:
        """The lowest ranks at which the layer's error is at most `error`, read off between the thresholds measured."""
        return ranks_at(self.keys, self.values, self.threshold(error))

    def threshold(self, error: float) -> float:
        """The lowest threshold at which the error is at most `error`; 1 is without error."""
        if error >= self.errors[-1]:
            return _THRESHOLDS[-1]
        thresholds, errors = [1.0, *_THRESHOLDS], [0.0, *self.errors]
        at = bisect_left(errors, error)
        if errors[at] == error:
            return thresholds[at]
        part = (error - errors[at - 1]) / (errors[at] - errors[at - 1])
        return thresholds[at - 1] + part * (thresholds[at] - thresholds[at - 1])


def ranks_at(keys: Sequence[float], values: Sequence[float], threshold: float) -> Ranks:
    """The ranks before which less than `threshold` of the singular values lie, at least 1."""
    return Ranks(*(max(bisect_left(before, threshold), 1) for before in (keys, values)))


@torch.inference_mode()
def profiles_of(study: Study) -> dict[int, Profile]:
    """What lower ranks cost each compressible layer, by its number.

    Only the positions of some queries are fed to the model, or all where some of its layers keep a state of what they
    read. As each layer is given the exact attention output of the whole prompt for them, what reaches a layer is what
    reached it when the prompt was read; the layer is then called again with the output at lower ranks. Without a model,
    the error is what the threshold leaves out.
    """
    trace = study.trace
    profiles: dict[int, Profile] = {}
    if study.model is None:
        for layer in trace.compressible:
            profiles[layer.index] = Profile(*_shares(layer), tuple(1 - threshold for threshold in _THRESHOLDS))
        return profiles
    most = trace.tokens if keeps_states(study.model) else min(_PROBES, trace.tokens)
    probes = torch.linspace(0, trace.tokens - 1, most).long()
    attention = _ExactOutput(trace, probes)
    within = {layer.index for layer in trace.compressible}
    layers = list(decoder_layers(study.model).values())
    repeating = False  # whether a layer is being called again, by this hook itself

    def after(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Hidden) -> None:
        nonlocal repeating
        # A layer without attention comes after one that has been measured already.
        if repeating or attention.layer not in within - profiles.keys():
            return
        repeating = True
        again = dict(zip(options, unread(options.values()), strict=True))
        number = attention.layer
        study.progress.update("measuring low ranks", len(profiles), len(within))
        profiles[number] = _profile(
            trace.layers[number], attention, _hidden(output), lambda: _hidden(module(*unread(args), **again))
        )
        repeating = False

    def unread(given: Iterable[Any]) -> list[Any]:  # a layer that is called again begins its state anew
        return [None if isinstance(value, States) else value for value in given]

    with engaged(study.model):
        hooks = [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
        try:
            forward(study.model, attention, trace.ids[probes], probes, images=trace.prompt.images)
        finally:
            for hook in hooks:
                hook.remove()
    study.progress.update("measuring low ranks", len(within), len(within))
    return profiles


def _profile(layer: LayerTrace, attention: _ExactOutput, exact: Tensor, again: Callable[[], Tensor]) -> Profile:
    """The profile of a layer whose output is `exact` [p, c]; `again` computes it from the attention's `output`."""
    spaces, (keys, values) = spaces_of(layer, queries=True), _shares(layer)
    errors: list[float] = []
    error_at: dict[Ranks, float] = {}
    for threshold in _THRESHOLDS:
        ranks = ranks_at(keys, values, threshold)
        if ranks not in error_at:
            attention.output = attention.over(layer, *lowered(layer, spaces, ranks))
            error_at[ranks] = float(((again() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-12)).mean())
        errors.append(max(error_at[ranks], errors[-1] if errors else 0.0))  # what a lower rank gains is chance
    attention.output = None
    return Profile(keys, values, tuple(errors))


class _ExactOutput:
    """Gives each layer the attention output of the whole prompt for the queries at `positions` [p], or `output`."""

    def __init__(self, trace: Trace, positions: Tensor) -> None:
        self.trace, self.positions = trace, positions
        self.output: Tensor | None = None
        self.layer = -1  # the one that attended last

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.layer, output = layer, self.output
        if output is None:
            recorded = self.trace.layers[layer]
            output = self.over(recorded, recorded.keys.float(), recorded.values.float())
        return output.to(query.dtype)

    def over(self, layer: LayerTrace, keys: Tensor, values: Tensor) -> Tensor:
        """The output [h, p, dv] over keys [k, n, d] and values [k, n, dv] in place of the layer's own."""
        where = torch.arange(layer.tokens, device=layer.device)
        positions = self.positions.to(layer.device)
        visible = seen_by(positions, where[None], None, layer.scoring)
        queries = layer.queries[:, positions].float()
        offsets = layer.scoring.offsets(positions, where[None])
        return attend(queries, keys, values, layer.scoring, visible=visible, offsets=offsets)[0]


def lowered(layer: LayerTrace, spaces: Spaces, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer, float32, without what lies outside its spaces at these ranks."""
    keys, values, where = layer.keys.float(), layer.values.float(), torch.arange(layer.tokens, device=layer.device)
    if spaces.rotary is not None:
        keys = spaces.rotary.undo(keys, where)
    keys = _within(keys, spaces.keys[:, : ranks.keys])
    if spaces.rotary is not None:
        keys = spaces.rotary.apply(keys, where)
    return keys, _within(values, spaces.values[:, : ranks.values])


def _within(x: Tensor, basis: Tensor) -> Tensor:
    """x [k, n, d] without what lies outside the rows of basis [k, r, d]."""
    unit = normalize(basis, dim=-1)
    return x @ (unit.transpose(1, 2) @ unit)


def _hidden(output: Hidden) -> Tensor:
    """What a decoder layer hands on, float32 [p, c]."""
    hidden = output if isinstance(output, Tensor) else output[0]
    return hidden[0].float()


def _shares(layer: LayerTrace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For each rank of keys and of values, the share of the singular values before it, where that is least."""
    spaces = spaces_of(layer, queries=True)
    return tuple(_before(spaces.energy_keys)), tuple(_before(spaces.energy_values))


def _before(energy: Tensor) -> list[float]:
    """For each rank 0 to d - 1, the share of a head's singular values before it, that of the head where it is least."""
    sizes = energy.double().sqrt()  # [k, d]
    share = sizes.cumsum(dim=1) / sizes.sum(dim=1, keepdim=True).clamp_min(1e-300)
    least = torch.cat([torch.zeros(1, device=share.device), share.amin(dim=0).float()[:-1]])
    return cast("list[float]", least.tolist())
