"""A decoder's blocks, run one after another over many texts, so that only one of them has to be looked at at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.engine import device_of
from workbench.errors import NotApplicable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's layers by name, in order. Raises NotApplicable where there is no such list of modules."""
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise NotApplicable(f"{type(model).__name__} has no list of {count} decoder layers to calibrate one by one")


def output_head(model: nn.Module) -> nn.Module | None:
    """What turns the last hidden states into logits, in a model that has such a module."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def outside(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Which of these layers stand in none of the decoder's layers, where calibration does not look, with the reason."""
    inside = tuple(f"{name}." for name in blocks(model))
    return {name: "it stands outside the blocks that are calibrated" for name in names if not name.startswith(inside)}


def placed(name: str, blocks: Iterable[str]) -> tuple[int | None, str]:
    """Where a module is: the number of its block and its name inside that; None and its name outside all of them."""
    for index, block in enumerate(blocks):
        if name.startswith(f"{block}."):
            return index, name.removeprefix(f"{block}.")
    return None, name


class _Stop(Exception):
    """What a block's hook raises once it has what it wanted."""


class Stream:
    """The hidden states of texts on their way through the blocks.

    ids: int64 [t, n]. hidden: what enters the block that comes next, [t, n, i], as the model computes it; texts go
    through a block in batches of at most `batch` tokens.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, batch: int = 4096) -> None:
        self._blocks = blocks(model)
        self._size = max(batch // ids.shape[1], 1)
        self._keywords = _keywords(model, self._blocks, ids[:1])
        entering = [_entering(model, next(iter(self._blocks.values())), part) for part in ids.split(self._size)]
        self.hidden = torch.cat(entering)

    def __iter__(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self._blocks.items()

    def through(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the block of this name: yields what enters and what leaves it, batch by batch, and moves `hidden` on."""
        done = []
        for part in self.hidden.split(self._size):
            out = self._run(name, part, self._blocks[name])
            yield part, out
            done.append(out)
        self.hidden = torch.cat(done)

    def leaving(self, name: str, entering: Tensor, block: nn.Module | None = None) -> Tensor:
        """What leaves the block of this name when `entering` [t, n, i] enters it; `hidden` stays where it is.

        block: what stands in its place, for instance a compressed copy of it.
        """
        stands = self._blocks[name] if block is None else block
        return torch.cat([self._run(name, part, stands) for part in entering.split(self._size)])

    def _run(self, name: str, entering: Tensor, block: nn.Module) -> Tensor:
        with torch.no_grad():
            found = block(entering, **self._keywords[name])
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out


def _keywords(model: PreTrainedModel, blocks: dict[str, nn.Module], ids: Tensor) -> dict[str, dict[str, Any]]:
    """What the model hands to each block beside the hidden states: rotary embeddings, masks."""
    found: dict[str, dict[str, Any]] = {}
    handles = []
    try:
        for name, block in blocks.items():

            def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                found[name] = kwargs

            handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
        with torch.no_grad():
            model(input_ids=ids.to(device_of(model)), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: {k: v for k, v in kwargs.items() if k != "hidden_states"} for name, kwargs in found.items()}


def _entering(model: PreTrainedModel, first: nn.Module, ids: Tensor) -> Tensor:
    """What enters the first block [t, n, i]."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=ids.to(device_of(model)), use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]
