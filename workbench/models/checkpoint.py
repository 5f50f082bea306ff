"""What may be read: a checkpoint is looked at before any library opens it, so that nothing in it can run code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import CheckpointRefused, ModelNotFound
from workbench.files.paths import regular
from workbench.files.strict_json import read

# Formats that are, or may hide, a Python pickle: opening one runs whatever its author wrote into it.
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SAFE = "only safetensors and GGUF are read"
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# What transformers reads beside the weights, and the most bytes of each; the largest real ones are a third of that.
_BESIDE = {
    "generation_config.json": 1 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 16 << 20,
    "added_tokens.json": 16 << 20,
    "tokenizer.json": 128 << 20,
    "tokenizer.model": 128 << 20,
    "vocab.json": 128 << 20,
    "vocab.txt": 128 << 20,
    "merges.txt": 128 << 20,
    "chat_template.jinja": 1 << 20,
}
_PARSED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Numbers in a config that something is made for, one by one.
_LAYERS = re.compile(r"(?<!window_)(layers?|blocks?)$")
_EXPERTS = re.compile(r"experts?$")
_FEW = 256  # of layers or experts: no harm, whatever the weights hold
_MOST = 1 << 27  # of anything else: contexts end at ten million tokens
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def weights_in(path: Path) -> Path:
    """The folder (safetensors) or .gguf file to load from `path`, checked within bounds of time and memory.

    Raises `ModelNotFound` where nothing can be read and `CheckpointRefused` where the checkpoint is pickled, broken, or
    needs code of its own.
    """
    try:
        if path.is_dir():
            return _folder(path)
        with regular(path).open("rb"):
            pass
    except OSError as error:
        raise ModelNotFound(f"cannot read {path} ({error.strerror or error})") from error
    if path.suffix == ".gguf":
        return path
    if path.suffix in PICKLED:
        raise _pickled(path)
    if path.suffix == ".safetensors":
        raise CheckpointRefused(f"{path}: weights alone are no model; name the folder that also holds its config.json")
    raise CheckpointRefused(f"{path}: not a model file; {_SAFE}")


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder carries a tokenizer at all."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def stored_dtype(folder: Path) -> str | None:
    """The dtype a folder's config.json names ("bfloat16"), None where it names none."""
    config = _json(folder / _CONFIG)
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        found = part.get("dtype") or part.get("torch_dtype")
        if found:
            return str(found).removeprefix("torch.")
    return None


@dataclass(frozen=True)
class Stored:
    """What a safetensors file says of one tensor. dtype: safetensors' own word, such as BF16."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def stored(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's weights by name, as their headers list them; no tensor is read.

    Raises CheckpointRefused for files that are broken, lack what the index names, or hold a tensor twice.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        for tensor in _listed(file):
            if tensor.name in found:
                raise CheckpointRefused(
                    f"{folder}: {tensor.name} is in both {found[tensor.name].file.name} and {file.name}; keep one"
                )
            found[tensor.name] = tensor
    for name, shard in _index(folder).items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointRefused(f"{folder}: {_INDEX} names {name} in {shard}, which does not hold it")
    return found


def _folder(folder: Path) -> Path:
    names = {file.name for file in folder.iterdir()}
    safetensors = sorted(name for name in names if name.endswith(".safetensors"))
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    pickled = sorted(name for name in names if Path(name).suffix in PICKLED)
    if safetensors:
        for name in (*safetensors, *(_BESIDE.keys() & names)):
            _check_file(folder / name)
        config = _check_config(folder / _CONFIG)
        if "adapter_config.json" in names:
            raise CheckpointRefused(
                f"{folder} holds an adapter (adapter_config.json), which is not applied here; merge it into its model"
            )
        _check_weights(folder, config, stored(folder))
        return folder
    if len(ggufs) > 1:
        raise CheckpointRefused(f"{folder} holds {len(ggufs)} GGUF files; name one of them: {', '.join(ggufs)}")
    if ggufs:
        return folder / ggufs[0]
    if pickled:
        raise _pickled(folder / pickled[0])
    raise CheckpointRefused(f"{folder} holds no weights: no .safetensors and no .gguf file in it")


def _pickled(path: Path) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is a pickled checkpoint, which can run code when opened; {_SAFE}: convert it to safetensors "
        "(load it where you trust it and call model.save_pretrained)"
    )


def _check_file(path: Path) -> None:
    """That a file which a library will open is one that ends, and of a sensible size and depth."""
    try:
        regular(path, _BESIDE.get(path.name))
    except OSError as error:
        raise CheckpointRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.name in _PARSED:
        _json(path)


def _check_config(path: Path) -> dict[str, Any]:
    config = _json(path)
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return config  # transformers' own class is used, whatever `auto_map` offers
    if "auto_map" in config:
        raise CheckpointRefused(
            f"{path.parent} needs Python code of its own (auto_map in config.json), which is never run; use a model "
            "that transformers supports by itself"
        )
    raise CheckpointRefused(
        f"{path} names the model type {str(kind)[:60]!r}, which this version of transformers does not know; update "
        "transformers"
    )


def _check_weights(folder: Path, config: dict[str, Any], tensors: dict[str, Stored]) -> None:
    """That the weights could be those of the config: its counts are no more than they can hold, and they are numbers.

    A config decides how much is built before a single weight is read, so this comes before any library sees it.
    """
    elements = sum(tensor.elements for tensor in tensors.values())
    widest = max((extent for tensor in tensors.values() for extent in tensor.shape), default=0)
    for name, value in _numbers(config):
        most = _MOST if not _LAYERS.search(name) else max(len(tensors), _FEW)
        if _EXPERTS.search(name):
            most = max(widest, _FEW)
        if abs(value) > max(most, elements if most == _MOST else 0):
            raise CheckpointRefused(
                f"{folder}: config.json says {name} = {_figure(value)}, more than weights of {len(tensors):,} tensors "
                f"and {elements:,} numbers can hold"
            )
    if (quantised := config.get("quantization_config")) is not None:
        _check_quantisation(folder, quantised)
        return
    for tensor in tensors.values():
        if tensor.name.endswith(".weight") and tensor.dtype not in _FLOATS:
            raise CheckpointRefused(
                f"{folder}: {tensor.name} is stored as {tensor.dtype}, and config.json has no quantization_config that "
                "says what its numbers stand for"
            )


def _check_quantisation(folder: Path, quantised: Any) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise CheckpointRefused(
            f"{folder}: config.json says that the weights are quantised as {str(method)[:60]!r}, which this version of "
            "transformers does not know and would leave out; use a checkpoint in 16 or 32 bits"
        )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a config with the name that it stands under."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _figure(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**30 else f"about 10^{value.bit_length() * 3 // 10}"


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers takes a model's weights from."""
    whole, shards = folder / _WEIGHTS, sorted(set(_index(folder).values()))
    if whole.exists() and shards and shards != [_WEIGHTS]:
        raise CheckpointRefused(f"{folder} holds weights twice: in {_WEIGHTS}, and in the files that {_INDEX} names")
    if not whole.exists() and not shards:
        raise CheckpointRefused(
            f"{folder} holds neither {_WEIGHTS} nor {_INDEX}, which names the files of a larger model"
        )
    return [folder / shard for shard in shards] or [whole]


def _index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, in a model of several files; nothing in one of a single file."""
    index = folder / _INDEX
    if not index.exists():
        return {}
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointRefused(f"{index}: broken, it has no weight_map; download the model again")
    names = {file.name for file in folder.iterdir()}
    missing = sorted(set(shards.values()) - names)
    if missing:
        raise CheckpointRefused(f"{folder} lacks {', '.join(missing)}, named in {index.name}; download the model again")
    return shards


def _listed(path: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular(path), framework="pt") as held:  # the header is checked against the file's length
            slices = [(name, held.get_slice(name)) for name in held.keys()]  # noqa: SIM118  no mapping
            return [Stored(path, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
    except (SafetensorError, OSError) as error:
        raise CheckpointRefused(
            f"{path}: broken safetensors file ({error}); it may be cut short, download it again"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except FileNotFoundError:
        raise CheckpointRefused(f"{path.parent} has no {path.name}; copy it from where the weights came from") from None
    except OSError as error:
        raise CheckpointRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointRefused(f"{path}: cannot be read as JSON ({error}); download it again") from error
