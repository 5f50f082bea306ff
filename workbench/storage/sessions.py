"""Sessions on disk: a folder with session.json (descriptions) and trace.safetensors (tensors); never pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.engine.images import Images
from workbench.engine.latents import Latents, expansions
from workbench.engine.states import attending
from workbench.errors import CheckpointRefused, InputError, ModelNotFound, NotRead, UnknownMethod, WorkbenchError
from workbench.files.folders import located, whole
from workbench.files.paths import regular
from workbench.files.strict_json import NotAnObject, dumps, read
from workbench.kv.plan import Plan
from workbench.measure.memory import Timeline
from workbench.measure.quality import Quality
from workbench.measure.timing import Timing
from workbench.models import facts
from workbench.models.devices import layer_devices, whole_weights
from workbench.prompt import Prompt
from workbench.recipe import Recipe
from workbench.runtime.continuing import restored
from workbench.runtime.evaluate import Evaluation
from workbench.runtime.prefill import with_images
from workbench.runtime.readings import Readings
from workbench.runtime.run import Run, RunState
from workbench.trace import LayerTrace, Trace
from workbench.weights.calibration.texts import Calibration
from workbench_kernels import Chosen, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "inference-workbench session"
VERSION = 1  # raise it when an older workbench could no longer read what is written
DESCRIPTION, TENSORS = "session.json", "trace.safetensors"

_LARGEST = 1 << 28  # bytes of a description: a hundred long runs take a thousandth
_SAMPLES = 8  # values of each weight that tell one model from another
_OF_HEADS = ("sinks", "slopes")  # of a layer's scoring: one number for each query head
_SHAPE = ("model_type", "layers", "heads", "kv_heads", "head_dim", "hidden_size", "vocab_size", "parameters")
S = TypeVar("S")


@dataclass(frozen=True, repr=False, kw_only=True)
class LoadedRun(Run):
    """A run read back from disk: what was recorded, without the cache it ran on.

    Its quality is there if it had been measured before saving. Its plan is made again from the restored trace when
    first asked for. It cannot be asked further questions.
    """

    record: dict[str, Any]

    @classmethod
    def of(
        cls,
        record: dict[str, Any],
        evaluation: Evaluation | None,
        prompt_ids: Tensor,
        replan: Callable[[Recipe], Plan],
    ) -> LoadedRun:
        """The run of a record, evaluated if it had been; `replan` makes the plan of its recipe again."""
        recipe = Recipe.from_dict(record["recipe"])
        return cls(
            recipe=recipe,
            text=str(record["text"]),
            tokens=tuple(int(token) for token in record["tokens"]),
            prompt_ids=prompt_ids,
            memory=Timeline.from_dict(record["memory"]),
            timing=_timing(record["timing"]),
            state=RunState(partial(replan, recipe), evaluation=evaluation),
            question=record["question"],
            notes=tuple(str(note) for note in record["notes"]),
            record=record,
        )

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the cache after planning, as recorded."""
        return int(self.record["kv_nbytes"])

    def to_dict(self, *, quality: bool = True) -> dict[str, Any]:
        """The record as it was saved."""
        return {**self.record, "quality": self.quality.to_dict() if quality else None}

    def __str__(self) -> str:
        share = self.record["kv_share"]
        return f"{self.recipe.label}: {share:.1%} of the cache, {len(self.tokens)} tokens: {self.text!r}"


# -- writing


def save(folder: Path, readings: Readings, runs: Sequence[Run], *, source: str, seed: int) -> Path:
    """Write a prompt, its trace and the runs on it into `folder`; the model itself is not written.

    source: where the model comes from. seed: the session's.

    Whole or not at all: everything is written beside the folder first. A folder that holds a saved session is replaced;
    any other folder with something in it is refused with InputError.
    """
    folder = located(folder)
    tensors: dict[str, Tensor] = {"model.samples": _samples(readings.model)}
    with whole(folder, _is_ours, "a saved session") as work:
        model = {"source": source, **_describe_model(readings)}
        description = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "kv_dtype": _dtype_name(readings.kv_dtype),
            "seed": seed,
            "calibration": None if (texts := readings.variants.calibration) is None else texts.to_dict(),
            "trace": None if readings.plain is None else _describe_trace(readings.plain, tensors),
            "runs": [_describe_run(index, run, tensors) for index, run in enumerate(runs)],
        }
        save_file({name: _plain(tensor) for name, tensor in tensors.items()}, work / TENSORS)
        (work / DESCRIPTION).write_text(dumps(description) + "\n", encoding="utf-8")
    return folder


def _is_ours(folder: Path) -> bool:
    try:
        return read(folder / DESCRIPTION, _LARGEST).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _describe_model(readings: Readings) -> dict[str, str | int]:
    config = facts(readings.model)
    return {
        "name": readings.facts.name,
        "dtype": _dtype_name(readings.model.dtype),
        **{name: getattr(config, name) for name in _SHAPE},  # as its config has it
    }


def _describe_trace(trace: Trace, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors.update({"ids": trace.ids, "logits": trace.logits})
    for layer in trace.layers:
        recorded = {"keys": layer.keys_held, "values": layer.values_held, "queries": layer.queries_held}
        tensors.update({f"layers.{layer.index}.{name}": tensor for name, tensor in recorded.items()})
        for name in _OF_HEADS:
            if (numbers := getattr(layer.scoring, name)) is not None:
                tensors[f"layers.{layer.index}.{name}"] = numbers
        if layer.latents is not None:
            rows = {"latent": layer.latents.latent, "rotated": layer.latents.rotated}
            tensors.update({f"layers.{layer.index}.{name}": tensor for name, tensor in rows.items()})
        if layer.scoring.chosen is not None and layer.scoring.chosen.keys is not None:
            tensors[f"layers.{layer.index}.chosen"] = layer.scoring.chosen.keys
    states = {} if trace.states is None else trace.states.saved()
    tensors.update({f"states.{name}": tensor for name, tensor in states.items()})
    return {
        "chat": trace.prompt.chat,
        **{name: getattr(trace.prompt, name) for name in ("open_turn", "closing", "held")},
        "prompt_notes": list(trace.prompt.notes),
        "images": None if trace.prompt.images is None else _describe_images(trace.prompt.images, tensors),
        "read_seconds": trace.read_seconds,
        "layers": [
            {
                "scale": x.scale,
                "window": x.window,
                "softcap": x.softcap,
                "chunk": x.chunk,
                "shared": x.shared,
                "rounded": x.scoring.rounded,
                "latents": x.latents is not None,
                "chosen": None if (chosen := x.scoring.chosen) is None else "all" if chosen.keys is None else "some",
                "of_heads": [name for name in _OF_HEADS if getattr(x.scoring, name) is not None],
            }
            for x in trace.layers
        ],
        "exact": {str(layer): reason for layer, reason in trace.exact.items()},
        "timeline": trace.timeline.to_dict(),
        "computed": list(trace.computed),
        "states": list(states),
    }


def _describe_images(images: Images, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["images.which"] = images.which
    if images.coordinates is not None:
        tensors["images.coordinates"] = images.coordinates
    tensors.update({f"images.inputs.{name}": tensor for name, tensor in images.inputs.items()})
    return {"inputs": list(images.inputs), "coordinates": images.coordinates is not None}


def _describe_run(index: int, run: Run, tensors: dict[str, Tensor]) -> dict[str, Any]:
    measured = run.measured  # measuring takes a while, and saving should not
    tensors[f"runs.{index}.prompt_ids"] = run.prompt_ids
    record = run.to_dict(quality=measured)
    if measured:
        tensors[f"runs.{index}.output_error"] = run.verdict.output_error
        record["reference_tokens"] = list(run.verdict.reference)
    return record


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and sharing its memory with no other: what safetensors takes."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


# -- reading


@contextmanager
def opened(folder: Path) -> Iterator[SavedSession]:
    """What `save` wrote into a folder, for as long as the block lasts.

    Raises InputError for what is no saved session or another model, and CheckpointRefused where it turns out in the
    block that it is damaged.
    """
    folder = located(folder)
    description = _read_description(folder)
    try:
        with safe_open(regular(folder / TENSORS), framework="pt") as tensors:
            yield SavedSession(folder, description, tensors.get_tensor)
    except WorkbenchError:
        raise
    except FileNotFoundError:
        _broken(folder, f"{TENSORS} is missing")
    except (SafetensorError, OSError) as error:
        _broken(folder, f"{TENSORS}: {str(error).splitlines()[0]}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        _broken(folder, f"{DESCRIPTION}: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}")


@dataclass(frozen=True)
class SavedSession:
    """A saved session before it has a model: its description, and its tensors by name."""

    folder: Path
    description: dict[str, Any]
    tensor: Callable[[str], Tensor]

    def on_its_model(self, make: Callable[..., S], options: dict[str, Any]) -> S:
        """`make(model, ...)` with the model, the precisions and the seed that were saved, or those in `options`.

        `model` there is where it is no longer found at its source; it must be the same one. Raises ModelNotFound.
        """
        model = self.description["model"]
        settings = {"kv_dtype": self.description["kv_dtype"], "seed": self.description["seed"], **options}
        if "model" in settings:
            return make(settings.pop("model"), **settings)
        try:
            return make(model["source"], **{"dtype": model["dtype"], **settings})
        except ModelNotFound as error:
            raise ModelNotFound(
                f"the session was made with the model {model['source']!r}, which is not found here; give it as model= "
                f"({error})"
            ) from error

    def contents(self, readings: Readings) -> tuple[Trace | None, list[Run]]:
        """The trace, ready for plans and runs without reading again, and the runs as records.

        readings: those of the model; they get the calibration texts. Raises InputError where it is another model.
        """
        saved = self.description
        if saved.get("calibration") is not None:
            readings.variants.calibrate(Calibration(**saved["calibration"]))  # its file is read when it is needed
        _check_model(self.folder, saved["model"], self.tensor("model.samples"), readings.model)
        if saved["trace"] is None:
            return None, []
        trace = _trace(saved["trace"], self.tensor, readings)
        replan = partial(_replan, readings, trace)
        runs: list[Run] = []
        for index, record in enumerate(saved["runs"]):
            evaluation, prompt_ids = _evaluation(record, index, self.tensor), self.tensor(f"runs.{index}.prompt_ids")
            try:
                runs.append(LoadedRun.of(record, evaluation, prompt_ids, replan))
            except UnknownMethod as error:
                raise InputError(f"{self.folder}: run {index + 1} used a method that is not here ({error})") from error
        return trace, runs


def _broken(folder: Path, reason: str) -> NoReturn:
    raise CheckpointRefused(f"{folder}: this saved session is damaged ({reason}); save it again") from None


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = read(folder / DESCRIPTION, _LARGEST)
    except UnicodeDecodeError:
        _broken(folder, f"{DESCRIPTION} is not text")
    except NotAnObject:
        description = {}
    except ValueError as error:
        _broken(folder, f"{DESCRIPTION} is not JSON: {error}")
    except OSError as error:
        reason = (error.strerror or error) if _exists(folder) else "no such folder"
        raise InputError(f"{folder} is not a saved session ({DESCRIPTION}: {reason})") from None
    if description.get("format") != FORMAT:
        raise InputError(f"{folder} is not a saved session: {DESCRIPTION} was written by something else")
    version = description.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        _broken(folder, f"{DESCRIPTION} has no version")
    if version > VERSION:
        raise InputError(
            f"{folder} was saved by a newer workbench (format {version}, this one reads up to {VERSION}); upgrade "
            "inference-workbench to open it"
        )
    return description


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:
        return False


def _check_model(folder: Path, saved: dict[str, Any], samples: Tensor, model: PreTrainedModel) -> None:
    """A trace means nothing to another model: the same shape, and the same weights up to rounding."""
    config = facts(model)
    for name in _SHAPE:
        if getattr(config, name) != saved[name]:
            raise InputError(
                f"{folder} was made with {saved['name']} ({name} {saved[name]}), but the model given has {name} "
                f"{getattr(config, name)}; load it with the same model"
            )
    here = _samples(model)
    if here.shape != samples.shape or not torch.allclose(here, samples, rtol=0.02, atol=1e-4):
        raise InputError(f"{folder} was made with other weights of {saved['name']}; load it with the same model")


def _samples(model: PreTrainedModel) -> Tensor:
    """A few values of every weight [s] float32, spread evenly: enough to tell two models of one shape apart."""
    rows = []
    for _, weight in whole_weights(model):
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        rows.append(flat[at.to(flat.device)].float().cpu())
    return torch.cat(rows)


def _trace(saved: dict[str, Any], tensor: Callable[[str], Tensor], readings: Readings) -> Trace:
    ids = tensor("ids").long()
    model, devices = readings.model, layer_devices(readings.model)
    numbers = attending(model)
    if len(saved["layers"]) != len(numbers):
        raise ValueError(f"{len(saved['layers'])} layers instead of {len(numbers)}")
    layers, expanding = [], expansions(model)
    for index, fields in enumerate(saved["layers"]):
        device = devices[numbers[index]]
        home = readings.keep_on or device
        keys, values, queries = (tensor(f"layers.{index}.{name}") for name in ("keys", "values", "queries"))
        if not keys.shape[1] == values.shape[1] == queries.shape[1] == ids.numel():  # [k, n, d], [k, n, dv], [h, n, d]
            raise ValueError(f"layer {index} does not hold {ids.numel()} tokens")
        chosen = None if fields.get("chosen") is None else Chosen(torch.arange(ids.numel()), None)
        if fields.get("chosen") == "some":
            chosen = Chosen(torch.arange(ids.numel()), _choices(tensor(f"layers.{index}.chosen"), ids.numel()).to(home))
        sinks, slopes = (
            _of_heads(tensor(f"layers.{index}.{name}"), len(queries)).to(device)
            if name in fields.get("of_heads", ())
            else None
            for name in _OF_HEADS
        )
        latents = None
        if fields.get("latents") and numbers[index] in expanding:
            latent, rotated = (
                tensor(f"layers.{index}.{name}").to(device, model.dtype) for name in ("latent", "rotated")
            )
            rows = Latents(latent, rotated, expanding[numbers[index]])
            latents = _latents(rows, keys.to(device), values.to(device)).looked_at().to(home)
        layers.append(
            LayerTrace(
                index=index,
                keys_held=keys.to(home, model.dtype),
                values_held=values.to(home, model.dtype),
                queries_held=queries.to(home, model.dtype),
                device=device,
                scoring=Scoring(
                    float(fields["scale"]),
                    fields["window"],
                    fields["softcap"],
                    sinks,
                    slopes,
                    rounded=bool(fields.get("rounded")),
                    chosen=chosen,
                    chunk=fields.get("chunk"),
                ),
                shared=fields.get("shared"),
                rotary=partial(readings.rotations.of, numbers[index]),
                number=numbers[index],
                latents=latents,
            )
        )
    images = _images(saved.get("images"), ids, tensor)
    return Trace(
        replace(_prompt(saved, ids, readings.tokenizer), images=images),
        tuple(with_images(layer, images) for layer in layers),
        tensor("logits"),
        float(saved["read_seconds"]),
        {int(layer): str(reason) for layer, reason in saved["exact"].items()},
        Timeline.from_dict(saved["timeline"]),
        tuple(int(entries) for entries in saved.get("computed", ())),
        states=restored(model, {str(name): tensor(f"states.{name}") for name in saved.get("states", ())}),
    )


def _images(saved: dict[str, Any] | None, ids: Tensor, tensor: Callable[[str], Tensor]) -> Images | None:
    """The images of a prompt of token ids [n]."""
    if saved is None:
        return None
    which = tensor("images.which")
    coordinates = tensor("images.coordinates") if saved["coordinates"] else None
    whole = which.shape == ids.shape and which.dtype == torch.int64 and int(which.max()) < ids.numel()
    if not whole or (coordinates is not None and coordinates.shape != (3, ids.numel())):
        raise ValueError("images of a prompt of another length")
    inputs = {str(name): tensor(f"images.inputs.{name}") for name in saved["inputs"]}
    return Images(inputs, ids, which, coordinates)


def _latents(rows: Latents, keys: Tensor, values: Tensor) -> Latents:
    """The rows of which keys [h, n, d] and values [h, n, dv] were made, in whatever precision."""
    try:
        if rows.latent.shape[1] == rows.rotated.shape[1] == keys.shape[1] and rows.makes(keys, values, close=0.1):
            return rows
    except RuntimeError as error:  # of sizes that do not fit
        raise ValueError(f"latent rows of {list(rows.latent.shape)} and {list(rows.rotated.shape)}") from error
    raise ValueError("latent rows that do not make the keys and values beside them")


def _of_heads(numbers: Tensor, heads: int) -> Tensor:
    if numbers.shape != (heads,) or not numbers.is_floating_point():
        raise ValueError(f"{list(numbers.shape)} numbers for {heads} heads")
    return numbers


def _choices(keys: Tensor, tokens: int) -> Tensor:
    """What an indexer chose for each token: int [n, c], positions in the text."""
    whole = keys.ndim == 2 and len(keys) == tokens and keys.dtype in (torch.int32, torch.int64)
    if not whole or not bool(((keys >= 0) & (keys < tokens)).all()):
        raise ValueError(f"{list(keys.shape)} choices for {tokens} tokens")
    return keys


def _prompt(saved: dict[str, Any], ids: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    closing = saved.get("closing")
    return Prompt(
        ids,
        bool(saved["chat"]),
        bool(saved["open_turn"]),
        tokenizer,
        closing if closing is None else str(closing),
        str(saved.get("held", "")),
        tuple(str(note) for note in saved.get("prompt_notes", ())),
    )


def _replan(readings: Readings, trace: Trace, recipe: Recipe) -> Plan:
    if recipe.family("weights") or recipe.family("attention"):
        raise NotRead(
            f"this run was loaded from disk; {recipe.label} reads the prompt in its own way, and that reading was not "
            "saved: run the recipe again with session.run(run.recipe, ...)"
        )
    return readings.plan(recipe, trace)


def _evaluation(record: dict[str, Any], index: int, tensor: Callable[[str], Tensor]) -> Evaluation | None:
    figures = record["quality"]
    if figures is None:
        return None
    numbers = {name: figures[name] for name in Quality.__dataclass_fields__}
    optional = ("first_divergence",)
    read: dict[str, Any] = {
        name: math.nan if value is None and name not in optional else value for name, value in numbers.items()
    }
    reference = tuple(int(token) for token in record["reference_tokens"])
    return Evaluation(Quality(**read), tensor(f"runs.{index}.output_error"), reference)


def _timing(saved: dict[str, Any]) -> Timing:
    return Timing(**{name: saved[name] for name in Timing.__dataclass_fields__})


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
