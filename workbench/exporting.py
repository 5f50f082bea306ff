"""Compressed models on disk: in a format that others load, where there is one, else in our own; never pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from workbench.errors import BadParameter, CheckpointRefused, NotApplicable
from workbench.folders import whole
from workbench.measure.memory import tensor_bytes
from workbench.models import Facts, LoadedModel, facts
from workbench.models.checkpoint import has_tokenizer
from workbench.models.load import device_for, dtype_for, named_dtype
from workbench.models.quiet import quiet
from workbench.progress import Progress
from workbench.strict_json import dumps
from workbench.weights import served
from workbench.weights.structure import describe, rebuild, replaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from workbench.weights.base import WeightMethod

Format = Literal["auto", "workbench", "compressed-tensors"]

FORMAT = "inference-workbench model"
VERSION = 1  # raise it when an older workbench could no longer read what is written
DESCRIPTION, TENSORS = "workbench.json", "compressed.safetensors"


@dataclass(frozen=True)
class Exported:
    """A compressed model on disk.

    format: "compressed-tensors", which transformers loads, or "workbench", which `wb.Session(path)` does. why: what
    speaks against the former, where it was not taken. nbytes: of the file with the weights. compressed_nbytes: of what
    stands for the compressed weights; rest_nbytes: of all other tensors in it.
    """

    path: Path
    format: str
    nbytes: int
    compressed_nbytes: int
    rest_nbytes: int
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return (
            f"{self.path}: {self.nbytes / 2**20:.1f} MiB in the format {self.format}{why}: "
            f"{self.compressed_nbytes / 2**20:.1f} MiB compressed, {self.rest_nbytes / 2**20:.1f} MiB of the rest"
        )


def export(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    methods: Sequence[WeightMethod],
    known: Facts,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    format: Format = "auto",
    dtype: str | torch.dtype | None = None,
) -> Exported:
    """Write `twin`, the model compressed by `methods`, into a folder; whole or not at all.

    known: the facts of the model. format: "auto" takes compressed-tensors where the layers have a place in it and the
    library is here. dtype: in which the tensors that are not compressed are written: "float16", "bfloat16" or
    "float32"; by default as the model holds them. Raises NotApplicable where the format asked for has no place for a
    layer, MissingExtra, InputError for a folder that holds something else.
    """
    folder = folder.expanduser().absolute()
    if format not in ("auto", "workbench", served.NAME):
        raise BadParameter(f"format {format!r} is not one of auto, workbench, {served.NAME}")
    precision = None if dtype is None else named_dtype(str(dtype).removeprefix("torch."))
    if dtype is not None and precision not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadParameter(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    names = replaced(model, twin)
    why = served.unfit(twin, names)
    if format == served.NAME:
        if why:
            raise NotApplicable(f'{why}, which {served.NAME} has no place for: export with format="workbench"')
        served.check_installed()
    elif format == "auto" and not why and not served.installed():
        why = f"{served.NAME} is not installed: pip install 'inference-workbench[export]'"
    own = format == "workbench" or bool(why)
    with whole(folder, is_exported, "an exported model") as work:
        description: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "workbench" if own else served.NAME,
            "methods": [method.to_dict() for method in methods],
            "notes": [method.note(model) for method in methods],
            "model": known.name,
            "parameters": known.parameters,
            "checkpoint_dtype": None if known.checkpoint_dtype is None else _name(known.checkpoint_dtype),
        }
        if own:
            description |= _write(twin, work, precision)
        else:
            served.write(twin, names, work, precision)
        if twin.generation_config is not None:
            twin.generation_config.save_pretrained(work)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        (work / DESCRIPTION).write_text(dumps(description) + "\n", encoding="utf-8")
    weights = folder / (TENSORS if own else served.WEIGHTS)
    compressed = sum(tensor_bytes(twin.get_submodule(name).buffers()) for name in names)
    rest = _stored_nbytes(weights) - compressed
    reason = why if format == "auto" and why else ""
    return Exported(folder, str(description["kind"]), weights.stat().st_size, compressed, rest, reason)


def is_exported(folder: str | Path) -> bool:
    """Whether `export` wrote this folder."""
    try:
        found = json.loads((Path(folder).expanduser() / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stored_nbytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but the header and its length."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


# -- the workbench's own format


def _write(twin: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Write tensors and configuration; returns what else is needed to read them."""
    modules, tensors = describe(twin, _skeleton(twin.config, twin.dtype, None))
    parameters = {id(weight) for weight in twin.parameters()} if dtype is not None else set()
    held = dict(twin.named_parameters(remove_duplicate=False))
    stored: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    owners: dict[tuple[int, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.numel(), tensor.storage_offset(), *tensor.shape, hash(tensor.dtype))
        names[name] = owner = owners.setdefault(key, name) if tensor.numel() else name
        if owner == name:
            cast = dtype is not None and name in held and id(held[name]) in parameters and tensor.is_floating_point()
            stored[name] = (tensor.to(dtype) if cast else tensor).cpu().contiguous().clone()
    save_file(stored, folder / TENSORS)
    twin.config.save_pretrained(folder)
    return {
        "modules": modules,
        "tensors": names,
        "dtype": _name(dtype or twin.dtype),
        "attention": twin.config._attn_implementation,
    }


def _skeleton(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """A plain model of this configuration, its parameters without data."""
    with init_empty_weights(), quiet():
        options = {} if attention is None else {"attn_implementation": attention}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
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
    folder, progress = Path(folder).expanduser().resolve(), progress or Progress()
    target = device_for(device)
    precision = dtype_for(dtype, target)
    progress.update("load", 0, 1)
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if described["version"] > VERSION:
            raise CheckpointRefused(
                f"{folder} was exported by a newer workbench; upgrade inference-workbench to open it"
            )
        model = _read(folder, described) if described["kind"] == "workbench" else served.read(folder, _skeleton)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointRefused):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointRefused(f"{folder}: damaged ({type(error).__name__}: {reason}); export it again") from error
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(precision)
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
    with safe_open(folder / TENSORS, framework="pt") as held:
        stored = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118  no mapping
    rebuild(model, described["modules"], {name: stored[owner] for name, owner in described["tensors"].items()})
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def _facts(model: PreTrainedModel, described: dict[str, Any]) -> Facts:
    """Those of the model that was compressed, with the bytes that it takes now."""
    found = facts(model, described["model"], named_dtype(described["checkpoint_dtype"] or ""))
    return replace(
        found,
        parameters=described["parameters"],
        weight_bytes=tensor_bytes([*model.parameters(), *model.buffers()]),
        weight_bytes_16bit=2 * described["parameters"],
    )
