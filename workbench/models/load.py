"""Loading a model by name, folder, file or hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from workbench.errors import BadParameter, CheckpointRefused, ModelNotFound
from workbench.files.paths import place
from workbench.models.agreement import check_report, check_size, check_ties
from workbench.models.auto_class import auto_class, sees
from workbench.models.catalog import catalogue
from workbench.models.checkpoint import PICKLED, has_tokenizer, stored_dtype, weights_in
from workbench.models.facts import Facts, facts
from workbench.models.fetch import fetch
from workbench.models.finite import check_finite
from workbench.models.gguf.file import read_gguf
from workbench.models.hub import from_hub
from workbench.models.quiet import quiet
from workbench.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap: TypeAlias = "str | Mapping[str, int | str | torch.device]"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to read: in eval mode, without gradients, on its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str  # the name, hub id or absolute path it was loaded from
    facts: Facts
    processor: ProcessorMixin | None = None  # of texts with images; None: the model reads text alone


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> LoadedModel:
    """Load a causal language model.

    `name_or_path` is a packaged model ("smollm2-135m", "workbench-tiny"), a folder with safetensors or one GGUF file, a
    .gguf file, or a hub id ("org/name"). A packaged name wins over a folder of that name, a folder over a hub id.
    `device`: "cpu", "cuda", "cuda:1", ...; default CUDA where there is one, else the CPU.
    `dtype`: float32, bfloat16 or float16; default bfloat16 on CUDA, float32 elsewhere (16 bits are slow on most CPUs).

    `device_map` spreads the layers of a folder or hub id over devices, as accelerate does: "auto" (the GPUs, then host
    memory), "balanced", "balanced_low_0", "sequential", or modules' names with their devices (0, "cuda:1", "cpu").
    `max_memory`: the most that a device may take ({0: "20GiB", "cpu": "60GiB"}), with which it is "auto" by default.
    What is in host memory beside a GPU comes there for each pass. There is no `device` then.

    Only safetensors and GGUF are read, and no code that comes with a checkpoint is ever run. Raises `ModelNotFound`,
    `CheckpointRefused`, `DownloadFailed`, or `BadParameter` for a device or dtype that is not there.
    """
    progress = progress or Progress()
    name = str(name_or_path)
    source, path = _locate(name, progress)  # before torch is imported: a wrong name fails at once
    spread = device_map is not None or max_memory is not None
    if spread and device is not None:
        raise BadParameter("device_map says where the layers lie: leave device out")
    if isinstance(device_map, str) and device_map not in _SPREADS:
        raise BadParameter(f"device_map {device_map!r} is not one of {', '.join(_SPREADS)}, nor names with devices")
    target = device_for(device)
    precision = dtype_for(dtype, target)
    progress.update("load", 0, 1)
    weights = weights_in(path)
    processor = None
    if weights.is_dir():
        model, tokenizer, processor = _from_folder(
            weights, precision, (device_map or "auto", max_memory) if spread else None
        )
        checkpoint_dtype = named_dtype(stored_dtype(weights))
    elif spread:
        raise BadParameter(f"{name}: a GGUF file is loaded onto one device; leave device_map and max_memory out")
    else:
        model, tokenizer = read_gguf(weights, precision)
        checkpoint_dtype = None  # many formats in one file
    progress.check()
    if not spread:
        model.to(target)  # type: ignore[arg-type]
    model.eval()
    model.requires_grad_(False)
    progress.update("load", 1, 1)
    known = facts(model, name=_short(source), checkpoint_dtype=checkpoint_dtype)
    return LoadedModel(model, tokenizer, source, known, processor)


def _locate(name: str, progress: Progress) -> tuple[str, Path]:
    """Where a name comes from: (source, local path)."""
    if name in {packaged.name for packaged in catalogue()}:
        return name, fetch(name, progress, verify=False)  # a damaged weight shows when it is read
    try:
        path = place(name)
        exists = bool(name.strip()) and path.exists()
    except OSError as error:  # too long, a NUL inside, a folder above it that may not be entered, nobody's home
        raise ModelNotFound(f"cannot read {name[:200]!r} ({error.strerror or error})") from error
    if exists:
        return str(path.resolve()), path
    is_file_name = path.suffix in PICKLED | {".gguf", ".safetensors"}
    if _HUB_ID.fullmatch(name) and not is_file_name:
        return name, from_hub(name, progress)
    raise ModelNotFound(
        f"no model {name!r}: it is not a packaged model ({', '.join(packaged.name for packaged in catalogue())}), "
        "not an existing folder or .gguf file, and not a hub id like org/name"
    )


def _short(source: str) -> str:
    return Path(source).name or source


def _from_folder(
    folder: Path, dtype: torch.dtype, spread: tuple[DeviceMap, Mapping[int | str, int | str] | None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, ProcessorMixin | None]:
    with quiet():
        from transformers import AutoConfig, AutoTokenizer

        from workbench.models.devices import whole_weights

        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        places: dict[str, Any] = {}
        if spread is not None:
            places.update(device_map=spread[0], max_memory=None if spread[1] is None else dict(spread[1]))
        try:
            check_size(folder)
            config = AutoConfig.from_pretrained(str(folder), **safe)
            loaded: Any = auto_class(config).from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                **safe,
                **places,
            )
        except (MemoryError, CheckpointRefused):
            raise
        except Exception as error:  # every kind of damage surfaces as another exception
            raise CheckpointRefused(f"{folder}: cannot be loaded ({_first_line(error)})") from error
        model, report = loaded
        check_report(folder, report)
        check_ties(folder, model)
        check_finite(str(folder), model.state_dict().items() if spread is None else whole_weights(model), dtype)
        tokenizer = None
        if has_tokenizer(folder):
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(folder), **safe)
            except Exception as error:
                raise CheckpointRefused(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})") from error
        processor = _processor(folder, safe) if sees(config) and tokenizer is not None else None
    return model, tokenizer, processor


def _processor(folder: Path, safe: Mapping[str, Any]) -> ProcessorMixin | None:
    """What prepares texts with images; None where it cannot be loaded here, so that text can be read all the same."""
    from transformers import AutoProcessor

    from workbench.models.image_text import folder_has_images, is_processor

    if not folder_has_images(folder):
        return None
    try:
        found = AutoProcessor.from_pretrained(str(folder), **safe)
    except (ImportError, ValueError, OSError):  # Pillow or torchvision missing; a processor of another kind
        return None
    return found if is_processor(found) else None


def device_for(device: str | torch.device | None) -> torch.device:
    """The device that was asked for, or the default one. Raises BadParameter where it is not here."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise BadParameter(f"device {device!r} is not one torch knows; use cpu, cuda or cuda:N") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BadParameter(
            f"device {device!s} is not here: torch sees {torch.cuda.device_count()} CUDA device(s); use cpu"
        )
    return wanted


def dtype_for(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The precision that was asked for, or the default on a device. Raises BadParameter for another one."""
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise BadParameter(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name ("bfloat16"); None where there is none."""
    import torch

    found = getattr(torch, name, None) if name else None
    return found if isinstance(found, torch.dtype) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
