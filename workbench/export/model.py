"""Compressed models on disk: in a format that others load, where there is one, else in our own; never pickle."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from workbench import arguments
from workbench.core.precision import checked
from workbench.errors import BadParameter, CheckpointRefused, NotApplicable
from workbench.export import compressed_tensors
from workbench.export.module_data import describe, rebuild
from workbench.files import strict_json
from workbench.files.folders import located, whole
from workbench.files.paths import place
from workbench.measure.memory import tensor_bytes
from workbench.models import Facts, LoadedModel, facts
from workbench.models.auto_class import auto_class
from workbench.models.checkpoint import has_tokenizer
from workbench.models.generation import writable
from workbench.models.load import device_for, dtype_for, named_dtype
from workbench.models.quiet import quiet
from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.base import WeightMethod
from workbench.weights.compress import weight_methods
from workbench.weights.surgery.replaced import replaced
from workbench.weights.variants import Variants

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Format = Literal["auto", "workbench", "compressed-tensors"]

FORMAT = "inference-workbench model"
VERSION = 1  # raise it when an older workbench could no longer read what is written
DESCRIPTION, TENSORS = "workbench.json", "compressed.safetensors"


@dataclass(frozen=True)
class Exported:
    """A compressed model on disk.

    format: "compressed-tensors", which transformers loads, or "workbench", which `wb.Session(path)` does. why: what
    speaks against the former, where it was not taken. nbytes: of the file with the weights. compressed_nbytes: of what
    stands for the compressed weights; rest_nbytes: of all other tensors in it. mended: settings for generating that
    could not be written as the model has them, and went back to their defaults, each as "name=value".
    """

    path: Path
    format: str
    nbytes: int
    compressed_nbytes: int
    rest_nbytes: int
    why: str = ""
    mended: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        mended = f"; left out of the generation config, as it is not valid with it: {', '.join(self.mended)}"
        mended = mended if self.mended else ""
        return (
            f"{self.path}: {self.nbytes / 2**20:.1f} MiB in the format {self.format}{why}: "
            f"{self.compressed_nbytes / 2**20:.1f} MiB compressed, {self.rest_nbytes / 2**20:.1f} MiB of the rest"
            f"{mended}"
        )


def export(
    variants: Variants,
    methods: Sequence[Method],
    path: str | Path,
    *,
    known: Facts,
    format: Format = "auto",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the model, compressed by weight methods, into a folder; see `export_twin`. known: the facts of the model.

    Raises BadRecipe for methods of another family, BadParameter, and what compressing and writing raise.
    """
    chosen, folder = weight_methods(methods), arguments.path("path", path)
    arguments.choice("format", format, get_args(Format))
    twin = variants.get(chosen, progress)
    said = variants.said(chosen)
    return export_twin(variants.model, twin, chosen, known, variants.tokenizer, folder, format, dtype, said)


def export_twin(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    methods: Sequence[WeightMethod],
    known: Facts,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    format: Format = "auto",
    dtype: str | torch.dtype | None = None,
    notes: Sequence[str] = (),
) -> Exported:
    """Write `twin`, the model compressed by `methods`, into a folder; whole or not at all.

    known: the facts of the model. notes: lines about how it was compressed. format: "auto" takes compressed-tensors
    where the layers have a place in it and the library is here. dtype: in which the tensors that are not compressed are
    written: "float16", "bfloat16" or "float32"; by default as the model holds them. What of the generation config is
    not valid goes back to its default, and the result says so. Raises NotApplicable where the format asked for has no
    place for a layer, a weight is too large for the dtype, or the configuration or the tokenizer cannot be written;
    MissingExtra; InputError for a folder that holds something else or cannot be written to.
    """
    folder = located(folder)
    precision = None if dtype is None else named_dtype(str(dtype).removeprefix("torch."))
    if dtype is not None and precision not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadParameter(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    names = replaced(model, twin)
    why = compressed_tensors.unfit(model, twin, names)
    config = _config(twin)
    generation, mended = (None, ()) if twin.generation_config is None else writable(twin.generation_config)
    if format == compressed_tensors.NAME:
        if why:
            raise NotApplicable(
                f'{why}, which {compressed_tensors.NAME} has no place for: export with format="workbench"'
            )
        compressed_tensors.check_installed()
    elif format == "auto" and not why and not compressed_tensors.installed():
        why = f"{compressed_tensors.NAME} is not installed: pip install 'inference-workbench[export]'"
    ours = format == "workbench" or bool(why)
    with whole(folder, is_exported, "an exported model") as work:
        description: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "workbench" if ours else compressed_tensors.NAME,
            "methods": [method.to_dict() for method in methods],
            "notes": list(notes),
            "model": known.name,
            "parameters": known.parameters,
            "checkpoint_dtype": None if known.checkpoint_dtype is None else _name(known.checkpoint_dtype),
        }
        if ours:
            description |= _write(twin, config, work, precision)
        else:
            compressed_tensors.write(twin, config, names, work, precision)
        if generation is not None:
            generation.save_pretrained(work)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, work)
        (work / DESCRIPTION).write_text(strict_json.dumps(description) + "\n", encoding="utf-8")
    weights = folder / (TENSORS if ours else compressed_tensors.WEIGHTS)
    compressed = sum(tensor_bytes(twin.get_submodule(name).buffers()) for name in names)
    rest = _stored_nbytes(weights) - compressed
    reason = why if format == "auto" and why else ""
    return Exported(folder, str(description["kind"]), weights.stat().st_size, compressed, rest, reason, mended)


def is_exported(folder: str | Path) -> bool:
    """Whether `export` wrote this folder."""
    try:
        return strict_json.read(place(folder) / DESCRIPTION).get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _config(twin: PreTrainedModel) -> PretrainedConfig:
    """A copy of the model's configuration, which names its class. Raises NotApplicable where it cannot be written."""
    config: PretrainedConfig = copy.deepcopy(twin.config)
    config.architectures = [type(twin).__name__]
    complaint = _unwritable(config)
    if complaint is not None:
        odd = next((name for name in vars(config) if _unwritable(_without(config, name)) is None), None)
        which = "" if odd is None else f" for its {odd!r}"
        raise NotApplicable(
            f"the model's config cannot be written{which} ({complaint}): mend model.config and export again"
        )
    return config


def _unwritable(config: PretrainedConfig) -> str | None:
    """What speaks against writing this configuration; None if it can be."""
    try:
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a config's own code raises, that is what speaks against it
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _without(config: PretrainedConfig, name: str) -> PretrainedConfig:
    made = copy.copy(config)
    made.__dict__ = {key: value for key, value in vars(config).items() if key != name}
    return made


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise  # the folder's, not the tokenizer's
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise NotApplicable(
            f"this {type(tokenizer).__name__} cannot be written ({type(error).__name__}: {reason}); export without it, "
            "from Session((model, None))"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_nbytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but the header and its length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


# -- the workbench's own format


def _write(twin: PreTrainedModel, config: PretrainedConfig, folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Write tensors and configuration; returns what else is needed to read them."""
    modules, tensors = describe(twin, _skeleton(config, twin.dtype, None))
    parameters = {id(weight) for weight in twin.parameters()} if dtype is not None else set()
    parameters_by_name = dict(twin.named_parameters(remove_duplicate=False))
    stored: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    owners: dict[tuple[int, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.storage_offset(), *tensor.shape, *tensor.stride(), hash(tensor.dtype))
        names[name] = owner = owners.setdefault(key, name) if tensor.numel() else name
        if owner == name:
            is_parameter = (
                name in parameters_by_name and id(parameters_by_name[name]) in parameters and tensor.is_floating_point()
            )
            cast = tensor if dtype is None or not is_parameter else checked(tensor, dtype, name)
            stored[name] = cast.cpu().contiguous().clone()
    save_file(stored, folder / TENSORS)
    config.save_pretrained(folder)
    return {
        "modules": modules,
        "tensors": names,
        "dtype": _name(dtype or twin.dtype),
        "attention": twin.config._attn_implementation,  # noqa: SLF001  transformers has no other name for it
    }


def _skeleton(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """A plain model of this configuration, its parameters without data: of the class that it names, where that is one
    of transformers' own.
    """
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    known = isinstance(named, type) and issubclass(named, PreTrainedModel)
    with init_empty_weights(), quiet():
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        make = named._from_config if known else auto_class(config).from_config  # noqa: SLF001  as AutoModel does it
        model: PreTrainedModel = make(config, dtype=dtype, **options)
    return model


def load(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """The model that `export` wrote, its weights as small as they were.

    dtype: what it computes in; default float32 on a CPU, bfloat16 on CUDA. Raises CheckpointRefused for a damaged one
    or one with layers that are unknown here.
    """
    folder, progress = located(folder).resolve(), progress or Progress()
    target = device_for(device)
    precision = dtype_for(dtype, target)
    progress.update("load", 0, 1)
    try:
        described = strict_json.read(folder / DESCRIPTION)
        if described["version"] > VERSION:
            raise CheckpointRefused(
                f"{folder} was exported by a newer workbench; upgrade inference-workbench to open it"
            )
        model = (
            _read(folder, described) if described["kind"] == "workbench" else compressed_tensors.read(folder, _skeleton)
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointRefused):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointRefused(f"{folder}: damaged ({type(error).__name__}: {reason}); export it again") from error
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = checked(weight.data, precision, name)
    model.config.dtype = precision
    model.to(target)  # type: ignore[arg-type]
    model.eval()
    model.requires_grad_(False)
    tokenizer = None
    if has_tokenizer(folder):
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    progress.update("load", 1, 1)
    return LoadedModel(model, tokenizer, str(folder), _facts(model, described))


def _read(folder: Path, described: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    stored_dtype = named_dtype(described["dtype"])
    assert stored_dtype is not None
    model = _skeleton(config, stored_dtype, described["attention"])
    with safe_open(folder / TENSORS, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    rebuild(model, described["modules"], {name: stored[owner] for name, owner in described["tensors"].items()})
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def _facts(model: PreTrainedModel, described: dict[str, Any]) -> Facts:
    """Those of the model that was compressed, with the bytes that it takes now."""
    known = facts(model, described["model"], named_dtype(described["checkpoint_dtype"] or ""))
    return replace(
        known,
        parameters=described["parameters"],
        weight_bytes=tensor_bytes([*model.parameters(), *model.buffers()]),
        weight_bytes_16bit=2 * described["parameters"],
    )
