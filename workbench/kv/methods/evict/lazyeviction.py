"""LazyEviction."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.kv.base import KVMethod, Study, keep_last
from workbench.kv.recurrence import mri_score, track_recurrence
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

_UNREAD = "the authors' value was not to be read: own choice"


@register
class LazyEviction(KVMethod):
    """Keep tokens that are due to matter again, by the longest interval after which they did so before.

    A token recurs at a step whose attention to it is at least `threshold`. Of each, two numbers are remembered: the
    steps since it last recurred, and the maximum recurrence interval (MRI), the longest it ever took (the paper's
    Recurrence Interval Tracking). It matters by how little of its MRI has passed, plus a share for those that recur
    often (the MRI-centric eviction policy), as the authors' code has it:

        2 / (1 + exp(1 + since / MRI)) + 2 / (1 + exp(MRI - 1)), the second 0 for tokens that never recurred

    Eviction lags: nothing leaves for `window` steps, then `window` entries at once, the least important that are not
    among the last `window` (observation window). The paper lets the cache outgrow its budget by a window
    in between; here the budget is the most it ever holds. Windows are a quarter of the cache at most.

    The paper compresses nothing before the answer and observes decoding only: `prompt=False`, with a budget in tokens
    for prompt and answer together. A budget that is a share of the prompt's bytes compresses the prompt too; then its
    last `observed` queries count as steps and decide what it keeps.

    Choices where the paper leaves them open: each KV head observes for itself, by the most attentive query of its
    group. Of equals the oldest leaves first.
    """

    key = "lazyeviction"
    title = "LazyEviction"
    paper = Paper(
        "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
        "Zhang et al. 2025",
        "2506.15969",
    )
    claim = "half of the cache, the same accuracy in mathematical reasoning"
    fidelity = Fidelity(
        "deviates", "unless prompt=False the prompt is compressed too, by what its last queries saw recur"
    )
    presets = (Preset("decoding", "accounts of the paper, which was not to be read itself", prompt=False),)
    default_budget = 0.5
    state_width = 2

    window: int = param(
        32, ge=1, le=1024, unit="tokens", help="steps between evictions, and recent tokens that stay", own=_UNREAD
    )
    threshold: float = param(1e-4, ge=0, le=1, help="attention from which on a token counts as used again", own=_UNREAD)
    observed: int = param(
        256,
        ge=1,
        le=8192,
        unit="tokens",
        help="queries at the end of the prompt that are observed",
        own="the paper leaves the prompt whole",
    )
    decode: bool = param(
        True,
        help="also evict while decoding, so that the cache never grows",
        own="the paper always does; off for stores that cannot",
    )

    prompt: bool = param(
        True,
        help="compress the prompt too; without, only what is held while decoding beyond a budget in tokens",
        own="a budget is a share of the prompt's bytes, as for all methods; the paper leaves the prompt whole",
    )

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    @property
    def leaves_prompt(self) -> bool:
        return not self.prompt

    def holds(self, planned: int) -> int:
        budget = self.budget
        return planned if self.prompt or budget is None else max(planned, int(budget.amount))

    def score(self, layer: LayerTrace) -> Tensor:
        return self._due(self.eviction_state(layer))

    def scores(self, study: Study) -> Tensor:
        layers = study.trace.compressible
        scores = []
        for layer in study.progress.track(layers, f"scoring by {self.key}", len(layers)):
            key = ("eviction state", self.parameter_key(), layer.index)  # as a plan remembers it for decoding
            scores.append(self._due(study.trace.once(key, partial(self.eviction_state, layer))))
        return stacked(scores)

    def eviction_state(self, layer: LayerTrace) -> Tensor:
        memory = torch.zeros(layer.kv_heads, layer.tokens, self.state_width, device=layer.device)
        if not self.prompt:
            return memory
        for _, rows in layer.attention_rows(min(self.observed, layer.tokens)):
            memory = self.update_state(memory, rows.view(layer.kv_heads, layer.groups, *rows.shape[1:]))
        return memory

    def _due(self, memory: Tensor) -> Tensor:
        tokens = memory.shape[1]
        return keep_last(mri_score(memory), min(self.window, max(tokens // 4, 1)))

    def update_state(self, state: Tensor, weights: Tensor) -> Tensor:
        return track_recurrence(state, weights.amax(dim=1), self.threshold)

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        entries = int((positions >= 0).sum(dim=1).min())
        lag = min(self.window, entries // 4)
        leaving = max(room, lag)
        oldest_first = positions.argsort(dim=1, stable=True)  # [k, m]
        due = mri_score(state).gather(1, oldest_first)
        due[:, max(positions.shape[1] - min(lag, entries - leaving), 0) :] = torch.inf  # the last ones stay
        due.masked_fill_(positions.gather(1, oldest_first) < 0, torch.inf)
        return oldest_first.gather(1, due.argsort(dim=1, stable=True)[:, :leaving])
