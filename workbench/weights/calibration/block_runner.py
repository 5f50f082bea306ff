"""A decoder's blocks, run one after another over many texts, so that only one of them has to be looked at at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of
from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLOSE, _LOOSE = 0.02, 0.1  # how far blocks run one by one may be from the model, as a share, in 32 and in 16 bits


def hidden_of(output: object) -> Tensor:
    """The hidden states in what leaves a block: the first of several things, or all there is."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, Tensor)
    return hidden


class _Stop(Exception):
    """What a block's hook raises once it has what it wanted."""


class BlockRunner:
    """The hidden states of texts on their way through the blocks.

    ids: int64 [t, n]. hidden: what enters the block that comes next, [t, n, i], as the model computes it; texts go
    through a block in batches of at most `batch` tokens. What the model gives each block besides (masks, rotary tables)
    is that of the first text. Raises NotApplicable, naming the block, where this does not lead to what the model itself
    computes: where blocks hand on more than their hidden states, or are told something about the text.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, batch: int = 4096) -> None:
        self._blocks = decoder_layers(model)
        self._what = type(model).__name__
        self._size = max(batch // ids.shape[1], 1)
        first = next(iter(self._blocks.values()))
        self._given = _given(model, self._blocks, ids[:1])
        # The first text, and the last, which was given other arguments and comes behind all the rest.
        self._compared = sorted({0, ids.shape[0] - 1})
        both = _given(model, self._blocks, ids[self._compared])
        self._wanted = {name: given.left for name, given in both.items()}
        if any(_by_text(self._given[name], given) for name, given in both.items()):
            self._size = 1
        self.hidden = torch.cat([_entering(model, first, part) for part in ids.split(self._size)])
        if self.hidden.shape[:2] != ids.shape or self.hidden.ndim != 3:
            raise NotApplicable(
                f"{self._what} hands its layers {list(self.hidden.shape)} for {list(ids.shape)} tokens, not one hidden "
                "state for each: its layers cannot be run one after another"
            )

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self._blocks.items()

    def run(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the block of this name: yields what enters and what leaves it, batch by batch, and moves `hidden` on."""
        done = []
        for part in self.hidden.split(self._size):
            out = self._run(name, part, self._blocks[name])
            yield part.to(out.device), out  # the block before may lie on another device
            done.append(out)
        self.hidden = torch.cat(done)
        self._compare(name)

    def forward(self, name: str, entering: Tensor, block: nn.Module | None = None) -> Tensor:
        """What leaves the block of this name when `entering` [t, n, i] enters it; `hidden` stays where it is.

        block: what stands in its place, for instance a compressed copy of it.
        """
        stands = self._blocks[name] if block is None else block
        return torch.cat([self._run(name, part, stands) for part in entering.split(self._size)])

    def _run(self, name: str, entering: Tensor, block: nn.Module) -> Tensor:
        given = self._given[name]
        with torch.no_grad():
            output = block(entering, *given.args, **given.kwargs)
        return hidden_of(output)

    def _compare(self, name: str) -> None:
        """Raise where what left this block is not what leaves it in the model."""
        loose = _LOOSE if self.hidden.dtype.itemsize < 4 else _CLOSE
        for want, left in zip(self._wanted[name].float(), self.hidden[self._compared, -1].float(), strict=True):
            if float((left - want).norm()) > loose * float(want.norm()):
                raise NotApplicable(
                    f"{self._what}'s layers cannot be run one after another: {name} is given more than hidden states, "
                    "or gives more, so that it computes something else than in the model"
                )


class _Given(NamedTuple):
    """What one block was given beside the hidden states, and what left it for the last token of each text [t, i]."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    left: Tensor


def _given(model: PreTrainedModel, blocks: dict[str, nn.Module], ids: Tensor) -> dict[str, _Given]:
    """What the model gives to each block for texts [t, n] beside the hidden states: rotary embeddings, masks."""
    given: dict[str, _Given] = {}

    def keep(
        name: str, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        given[name] = _Given(args[1:], others, hidden_of(output)[:, -1].clone())

    handles = [block.register_forward_hook(partial(keep, name), with_kwargs=True) for name, block in blocks.items()]
    try:
        with torch.no_grad():
            model(input_ids=ids.to(device_of(model)), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return given


def _by_text(one: _Given, several: _Given) -> bool:
    """Whether arguments of one text do not serve several at once: they hold numbers of each, side by side."""
    pairs = [*zip(one.args, several.args, strict=True), *((one.kwargs[key], several.kwargs[key]) for key in one.kwargs)]
    sizes = [(x.shape, y.shape) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor)]
    return any(1 < x < y for before, after in sizes for x, y in zip(before, after, strict=False))


def _entering(model: PreTrainedModel, first: nn.Module, ids: Tensor) -> Tensor:
    """What enters the first block [t, n, i]."""
    entering: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=ids.to(device_of(model)), use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return entering[0]
