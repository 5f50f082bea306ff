"""What calibration tells about a model: gathered once, block by block, and kept for every method and budget."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of, exclusive
from workbench.models import cache_dir
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of
from workbench.progress import Progress
from workbench.weights.calibration.block_runner import Stream
from workbench.weights.calibration.fisher import GradientStats
from workbench.weights.calibration.hessian import FIRST, Gathering, InputStats
from workbench.weights.calibration.texts import Calibration, key_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

KEPT = 4 << 30  # bytes of statistics that are written down; beyond, blocks are run again each time they are asked for


class WeightStudy:
    """A model's layers over calibration texts.

    Everything is measured when it is first asked for. Statistics of inputs are gathered in one pass and, up to 4 GiB,
    written to the cache folder under the model's and the texts' fingerprints: the next session finds them there. With
    `persistent=False` (a model that is compressed already) they live in a temporary folder that goes with this object;
    so they do where the cache folder cannot be written to, which `notes` then say. What is damaged is measured again.
    Inputs are those of the model as it is: layers compressed on the way do not change what later ones are shown.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        calibration: Calibration | None = None,
        *,
        persistent: bool = False,
    ) -> None:
        self.model = model
        self.calibration = calibration or Calibration()
        self._tokenizer = tokenizer
        self._persistent = persistent
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._nowhere = False  # whether not even temporary files can be written
        self._notes: list[str] = []
        self._made: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<WeightStudy of {len(self.blocks)} layers over {self.calibration}>"

    @cached_property
    def ids(self) -> Tensor:
        """The calibration texts, int64 [t, n], on the CPU."""
        return self.calibration.ids(self.model, self._tokenizer)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The decoder's layers by name, in order."""
        return decoder_layers(self.model)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returned when it was first called for this key; for what all budgets of a method share."""
        if key not in self._made:
            self._made[key] = make()
        return cast("T", self._made[key])

    # -- inputs

    def inputs(self, *, moments: bool, progress: Progress | None = None) -> Iterator[tuple[str, dict[str, InputStats]]]:
        """Block after block: its name, and what enters each of its linear layers, by the layer's full name.

        moments: with second moments [i, i]. Only one block's statistics are in memory at a time.
        """
        progress = progress or Progress()
        for folder in (self._folder(moments), self._folder(True)):  # second moments come with all the rest
            if folder is not None and self._similarity_in(folder) is not None:
                for index, (name, block) in enumerate(self.blocks.items()):
                    progress.check()
                    found = _read(folder / f"{index}.safetensors", _linears(block, name), device_of(self.model))
                    if found is None:  # damaged, or another process is replacing it
                        shutil.rmtree(folder, ignore_errors=True)
                        yield from self._from(index, moments, progress)
                        return
                    yield name, found
                return
        yield from self._from(0, moments, progress)

    def _from(self, first: int, moments: bool, progress: Progress) -> Iterator[tuple[str, dict[str, InputStats]]]:
        """Gather all of it, and yield that of the block of this number and those behind it."""
        for index, pair in enumerate(self._gather(moments, self._folder(moments), progress)):
            if index >= first:
                yield pair

    def _gather(
        self, moments: bool, folder: Path | None, progress: Progress
    ) -> Iterator[tuple[str, dict[str, InputStats]]]:
        work = self._begun(folder)
        similarities = []
        try:
            stream = self._stream()
            for index, (name, _) in enumerate(progress.track(stream, "calibrating", len(self.blocks))):
                linears = _linears(self.blocks[name], name)
                gathering = Gathering(moments)
                alike, tokens = 0.0, 0
                called = {full: self.model.get_submodule(full) for full in linears}
                with exclusive(self.model), gathering.listening(called):
                    for entered, left in stream.through(name):
                        progress.check()
                        cosines = nn.functional.cosine_similarity(entered.float(), left.float(), dim=-1)
                        alike, tokens = alike + float(cosines.sum()), tokens + cosines.numel()
                similarities.append(alike / tokens)
                found = gathering.stats(linears)
                if work is not None and not self._written(found, work / f"{index}.safetensors"):
                    shutil.rmtree(work, ignore_errors=True)
                    work = None
                yield name, found
            self._made["similarity"] = torch.tensor(similarities)
            if work is not None and folder is not None:
                self._put(work, work.parent / folder.name)
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)

    def similarity(self, progress: Progress | None = None) -> Tensor:
        """For each block the mean cosine between what enters and leaves it, float32 [l]: near 1, it does little."""

        def measure() -> Tensor:
            for moments in (False, True):
                folder = self._folder(moments)
                found = None if folder is None else self._similarity_in(folder)
                if found is not None:
                    return found
            for _ in self.inputs(moments=False, progress=progress):
                pass
            return cast("Tensor", self._made.pop("similarity"))

        return self.once("similarity of blocks", measure)

    def stream(self) -> Stream:
        """The texts at the door of the first block, for methods that run the blocks themselves."""
        return self._stream()

    def _stream(self) -> Stream:
        with exclusive(self.model):
            return Stream(self.model, self.ids)

    # -- gradients

    def gradients(self, progress: Progress | None = None) -> dict[str, GradientStats]:
        """The Fisher information of every linear layer of the blocks, by its full name; one pass back through the model
        for each text, at most 256 tokens of it.
        """
        return self.once("gradients", partial(self._gradients, progress or Progress()))

    def _gradients(self, progress: Progress) -> dict[str, GradientStats]:
        linears = {key: value for name, block in self.blocks.items() for key, value in _linears(block, name).items()}
        sums = {name: (torch.zeros(x.out_features), torch.zeros(x.in_features)) for name, x in linears.items()}

        def listen(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)

            def add(gradient: Tensor) -> None:
                squares = (gradient.flatten(0, -2).float().T @ x.float()).square()  # [o, i]
                rows, columns = sums[name]
                rows += squares.sum(dim=1).cpu()
                columns += squares.sum(dim=0).cpu()

            if out.requires_grad:
                out.register_hook(add)

        model = self.model
        embedding = model.get_input_embeddings()
        handles = [model.get_submodule(name).register_forward_hook(partial(listen, name)) for name in linears]
        # A gradient has to flow through the blocks, but none into the model's own weights, which others may share.
        # What some models scale in place must not be the leaf itself.
        handles.append(embedding.register_forward_hook(lambda *call: call[2].detach().requires_grad_().clone()))
        try:
            for ids in progress.track(self.ids[:, :256].split(1), "measuring gradients", self.ids.shape[0]):
                with exclusive(model), torch.enable_grad():
                    found = model(input_ids=ids.to(device_of(model)), use_cache=False)
                    logits = found.logits[0, :-1].float()
                    nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device)).backward()
        finally:
            for handle in handles:
                handle.remove()
        count = self.ids.shape[0]
        device = device_of(model)
        return {name: GradientStats(*((s / count).to(device) for s in pair)) for name, pair in sums.items()}

    # -- what is written down

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run's record has to say: that statistics could not be kept, and why."""
        return tuple(self._notes)

    def _folder(self, moments: bool) -> Path | None:
        """Where the statistics lie, or will; None where there is too much of them, or no place to write to."""
        if self._nowhere or self._nbytes(moments) > KEPT:
            return None
        kind = f"moments-{FIRST}" if moments else "channels"
        name = f"{self.fingerprint}-{key_of(self.ids)}-{kind}"
        if self._persistent:
            return cache_dir() / "calibration" / name
        if self._temporary is None:
            try:
                self._temporary = tempfile.TemporaryDirectory(prefix="workbench-calibration-")
            except OSError as error:
                self._fail(error)
                return None
        return Path(self._temporary.name) / name

    def _begun(self, folder: Path | None) -> Path | None:
        """A folder beside this one, to be filled; None where nothing can be written."""
        if folder is None:
            return None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=folder.parent, prefix=".gathering-"))
        except OSError as error:
            self._fail(error)
            return self._begun(self._folder(folder.name.endswith(f"moments-{FIRST}")))

    def _written(self, found: Mapping[str, InputStats], path: Path) -> bool:
        """Whether one block's statistics could be written."""
        try:
            _write(found, path)
        except (OSError, SafetensorError) as error:
            self._fail(error)
            return False
        return True

    def _put(self, work: Path, folder: Path) -> None:
        """Move what was gathered to its place, unless another process was first."""
        try:
            save_file({"similarity": self._made["similarity"]}, work / "blocks.safetensors")
            if self._similarity_in(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                work.rename(folder)
        except (OSError, SafetensorError) as error:
            if self._similarity_in(folder) is None:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Keep what is gathered from now on in a temporary folder, or, where that failed, not at all."""
        reason = getattr(error, "strerror", None) or error
        if self._persistent:
            self._persistent = False
            self._notes.append(
                f"calibration is not kept for the next session: {cache_dir()} cannot be written to ({reason})"
            )
        else:
            self._nowhere = True
            self._notes.append(
                f"calibration is measured anew for each method: temporary files cannot be written ({reason})"
            )

    def _nbytes(self, moments: bool) -> int:
        """An upper bound of the statistics' bytes: as if no two layers shared an input."""
        linears = [x for name, block in self.blocks.items() for x in _linears(block, name).values()]
        return sum(4 * x.in_features * (x.in_features if moments else 4) for x in linears)

    def _similarity_in(self, folder: Path) -> Tensor | None:
        """The similarity of blocks, which is written last; None where a folder is not complete, or damaged."""
        try:
            with safe_open(folder / "blocks.safetensors", framework="pt") as held:
                found: Tensor = held.get_tensor("similarity")
        except (OSError, SafetensorError):
            return None
        return found if found.shape == (len(self.blocks),) else None

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model's weights from others: a hash of some values of each."""
        digest = hashlib.sha256()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            flat = tensor.detach().reshape(-1)
            at = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64).long()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(flat[at.to(flat.device)].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The plain linear layers of a block, by their full names; Conv1D ones as `linear_of` sees them."""
    found = {f"{prefix}.{name}": linear_of(module) for name, module in block.named_modules()}
    return {name: linear for name, linear in found.items() if linear is not None}


def _write(found: Mapping[str, InputStats], path: Path) -> None:
    """Statistics that layers share are written once."""
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    notes: dict[str, str] = {}
    for name, stats in found.items():
        owner = owners.setdefault(id(stats), name)
        notes[name] = owner
        if owner == name:
            notes[f"{name} tokens"] = str(stats.tokens)
            for part in ("mean", "absmean", "absmax", "square", "moment"):
                tensor = getattr(stats, part)
                if tensor is not None:
                    tensors[f"{name}/{part}"] = tensor.cpu().clone()
    save_file(tensors, path, metadata=notes)


def _read(path: Path, linears: Mapping[str, nn.Linear], device: torch.device) -> dict[str, InputStats] | None:
    """What was written of these layers; None where the file is not there, damaged, or of other layers."""
    made: dict[str, InputStats] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as held:
            notes: dict[str, str] = held.metadata()
            present = set(held.keys())
            for name in linears:
                if notes[name] == name:
                    parts = {p: held.get_tensor(f"{name}/{p}") for p in ("mean", "absmean", "absmax", "square")}
                    moment = held.get_tensor(f"{name}/moment") if f"{name}/moment" in present else None
                    made[name] = InputStats(int(notes[f"{name} tokens"]), **parts, moment=moment)
            return {name: made[notes[name]] for name in linears}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
