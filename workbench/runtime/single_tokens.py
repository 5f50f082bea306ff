"""How each model reads tokens that come alone faster than through its modules, found once and kept while it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from workbench.engine.attention_hook import device_of, devices_of
from workbench.errors import NotApplicable
from workbench.models.fetch import cache_dir
from workbench.runtime.fused_token import FusedToken
from workbench.runtime.token_graphs import TokenGraphs, held
from workbench_kernels.cpu.library import library

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SingleToken = FusedToken | TokenGraphs


class _Refused(NamedTuple):
    """A model whose steps cannot be captured, by what it is made of, and why."""

    held: tuple[int, ...]
    reason: str


@dataclass
class SingleTokens:
    """For each model what reads its single tokens: on a CPU a `FusedToken`, on a GPU `TokenGraphs`.

    Made when first asked for, and again when weights have changed.
    """

    _made: WeakKeyDictionary[PreTrainedModel, SingleToken | _Refused] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def of(self, model: PreTrainedModel) -> SingleToken:
        """Raises NotApplicable, with the reason, where the model is left to its modules."""
        if len(devices_of(model)) > 1:
            raise NotApplicable("the model lies on several devices, or some of its weights come for each pass")
        return self._on_gpu(model) if device_of(model).type == "cuda" else self._on_cpu(model)

    def _on_cpu(self, model: PreTrainedModel) -> FusedToken:
        if not FusedToken.fits(model):
            self._made.pop(model, None)
            raise NotApplicable("the model's layers are not plain ones in float32 on a CPU")
        made = self._made.get(model)
        if not isinstance(made, FusedToken) or not made.current:
            made = self._made[model] = FusedToken(model, library(str(cache_dir() / "compiled")))
        return made

    def _on_gpu(self, model: PreTrainedModel) -> TokenGraphs:
        made = self._made.get(model)
        if isinstance(made, TokenGraphs) and made.stands_for(model):
            return made
        if not isinstance(made, _Refused) or made.held != held(model):
            try:
                fresh = TokenGraphs(model)
            except NotApplicable as reason:
                made = self._made[model] = _Refused(held(model), str(reason))
            else:
                self._made[model] = fresh
                return fresh
        raise NotApplicable(made.reason)
