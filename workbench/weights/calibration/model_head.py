"""What a model makes of the hidden states that leave its last block: its final norm and output head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of, exclusive
from workbench.errors import NotApplicable
from workbench.measure.quality import divergence
from workbench.models.decoder import decoder_layers
from workbench.weights.calibration.block_runner import hidden_of
from workbench.weights.surgery.sharing_copy import sharing_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBERS = 16 << 20  # logits made at a time
_PROBE = 8  # tokens on which it is checked
_CLOSE = 0.02  # of the largest logit: how far others may be, which in 16 bits depend on what is computed together


class ModelHead:
    """The final norm and output head of a model, and whatever else comes after its blocks, as it computes them.

    Blocks can then be run one by one (`BlockRunner`), and the logits are still the model's own. Raises NotApplicable
    where they are not: where what comes after the blocks takes more than their hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = sharing_copy(model)
        self._vocabulary = model.config.get_text_config().vocab_size
        blocks = decoder_layers(self._model)
        stands = {name: _PassThrough(block) for name, block in blocks.items()}
        self._last = list(stands.values())[-1]
        ids = torch.arange(1, _PROBE + 1, device=device_of(model))[None] % self._vocabulary
        handles = [block.register_forward_hook(stands[name].learn) for name, block in blocks.items()]
        with exclusive(self._model), torch.no_grad():
            want = self._model(input_ids=ids, use_cache=False).logits.float()
        for handle in handles:
            handle.remove()
        left = self._last.learnt
        assert left is not None
        for name, stand in stands.items():
            stand.learnt = None
            self._model.set_submodule(name, stand)
        apart = self.logits(left).float() - want  # of other ids: what is looked up for them must not matter
        if float(apart.abs().max()) > _CLOSE * float(want.abs().max()):
            raise NotApplicable(
                f"{type(model).__name__} takes more from its layers than hidden states: its logits cannot be found "
                "from those alone"
            )

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

    def divergence(self, hidden: Tensor, other: Tensor, head: ModelHead | None = None) -> float:
        """KL of the next token's distribution, averaged over all tokens, from that after `hidden` [t, n, i] to that
        after `other`, in nats. head: what makes logits of `other`, if not this.
        """
        texts = max(_NUMBERS // (hidden.shape[1] * self._vocabulary), 1)
        total = 0.0
        for left, right in zip(hidden.split(texts), other.split(texts), strict=True):
            p, q = (end.logits(x).float().log_softmax(dim=-1) for end, x in ((self, left), (head or self, right)))
            total += float(divergence(p, q).sum())
        return total / (hidden.shape[0] * hidden.shape[1])


class _PassThrough(nn.Module):
    """A block that computes nothing: what enters it leaves it, or what is `given`, in the form in which the block's own
    output leaves.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.given: Tensor | None = None
        self.learnt: Tensor | None = None
        self._beside: int | None = None  # how many things leave beside the hidden states; None: they leave alone
        self.__dict__["_block"] = block  # no submodule: models may ask a block what kind it is

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def learn(self, block: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Remember what left the block, and in which form."""
        self._beside = len(output) - 1 if isinstance(output, tuple | list) else None
        self.learnt = hidden_of(output)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
        out = hidden_states if self.given is None else self.given
        return out if self._beside is None else (out, *[None] * self._beside)
