"""The end of a model: what it makes of the hidden states that leave its last block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.engine import device_of, exclusive
from workbench.measure.quality import divergence
from workbench.weights.base import sharing_copy
from workbench.weights.blocks import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBERS = 16 << 20  # logits made at a time


class Ending:
    """The final norm and output head of a model, and whatever else comes after its blocks, as it computes them.

    Blocks can then be run one by one (`Stream`), and the logits are still the model's own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = sharing_copy(model)
        for name, block in blocks(self._model).items():
            self._last = _Passed(block)
            self._model.set_submodule(name, self._last)
        self._vocabulary = model.config.get_text_config().vocab_size

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states [t, n, i] that left the last block: [t, n, v]."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device_of(self._model))
        with exclusive(self._model), torch.no_grad():
            self._last.given = hidden
            try:
                logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
            finally:
                self._last.given = None
        return logits

    def divergence(self, hidden: Tensor, other: Tensor, ending: Ending | None = None) -> float:
        """KL of the next token's distribution, averaged over all tokens, from that after `hidden` [t, n, i] to that
        after `other`, in nats. ending: what makes logits of `other`, if not this.
        """
        texts = max(_NUMBERS // (hidden.shape[1] * self._vocabulary), 1)
        found = 0.0
        for left, right in zip(hidden.split(texts), other.split(texts), strict=True):
            p, q = (end.logits(x).float().log_softmax(dim=-1) for end, x in ((self, left), (ending or self, right)))
            found += float(divergence(p, q).sum())
        return found / (hidden.shape[0] * hidden.shape[1])


class _Passed(nn.Module):
    """A block that computes nothing: what enters it leaves it, or what is `given`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.given: Tensor | None = None
        self.__dict__["_block"] = block  # no submodule: models may ask a block what kind it is

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.given is None else self.given
