"""The header of a GGUF file, read within bounds: no count or length in it is believed before the file's size allows it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` trusts every
length, never ends on some files, and takes seconds for a vocabulary.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from workbench.errors import CheckpointRefused
from workbench.files.paths import regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Value types: struct format of those of a fixed size; text and arrays have none.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_DEPTH = 4  # arrays of arrays
# Far above any real file, and few enough for Python objects: the largest vocabulary has 262,144 tokens.
_KEYS, _VALUES, _TENSORS, _BYTES_OF_TEXT = 1 << 16, 1 << 22, 1 << 18, 1 << 28
_DIMENSIONS, _ELEMENTS, _LARGEST_ALIGNMENT = 4, 1 << 48, 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in the file. shape: as torch counts, slowest dimension first. kind: ggml's type number."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: its metadata by key, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's word for the kind of model."""
        return str(self.metadata["general.architecture"])


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; no tensor is read.

    Raises CheckpointRefused where the file is not GGUF, is cut short, or says what cannot be true.
    """
    try:
        with regular(path).open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointRefused(f"{path}: not a GGUF file (it does not start with GGUF)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _parse(data)
    except (_Broken, UnicodeDecodeError) as error:
        raise CheckpointRefused(
            f"{path}: broken GGUF file ({error}); it may be cut short, download it again"
        ) from error
    except OSError as error:
        raise CheckpointRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    return Header(path, metadata, tensors)


class _Broken(ValueError):
    """What the header says cannot be true of this file."""


class _Cursor:
    """A place in the file that moves on with every value read, and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.values, self.text_bytes = data, 0, 0, 0

    def skip(self, count: int, what: str) -> int:
        start, left = self.at, len(self.data) - self.at
        if count > left:
            raise _Broken(f"{what} needs {count:,} bytes at {start:,}, and {left:,} are left")
        self.at += count
        return start

    def fixed(self, kind: str, what: str) -> Any:
        layout = struct.Struct("<" + kind)
        return layout.unpack_from(self.data, self.skip(layout.size, what))[0]

    def text(self, what: str) -> str:
        length = self.fixed("Q", what)
        self.text_bytes += length
        if self.text_bytes > _BYTES_OF_TEXT:
            raise _Broken(f"{what}: more than {_BYTES_OF_TEXT:,} bytes of text")
        start = self.skip(length, what)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _FIXED:
            return self.fixed(_FIXED[kind], what)
        if kind == _TEXT:
            return self.text(what)
        if kind != _ARRAY:
            raise _Broken(f"{what} has the unknown value type {kind}")
        if depth == _DEPTH:
            raise _Broken(f"{what}: arrays within arrays, more than {_DEPTH} deep")
        inner, count = self.fixed("I", what), self.fixed("Q", what)
        self.values += count
        if self.values > _VALUES:
            raise _Broken(f"{what}: {count:,} values, more than a header may hold")
        if inner in _FIXED:
            layout = struct.Struct(f"<{count}{_FIXED[inner]}")
            return list(layout.unpack_from(self.data, self.skip(layout.size, what)))
        return [self.value(inner, what, depth + 1) for _ in range(count)]


def _parse(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    cursor = _Cursor(data)
    cursor.skip(len(MAGIC), "the magic number")
    version = cursor.fixed("I", "the version")
    if version not in _VERSIONS:
        raise _Broken(f"version {version}; little-endian files of version 2 or 3 are read")
    tensor_count, key_count = cursor.fixed("Q", "the count of tensors"), cursor.fixed("Q", "the count of keys")
    for count, most, what in ((tensor_count, _TENSORS, "tensors"), (key_count, _KEYS, "keys")):
        if count > most:
            raise _Broken(f"{count:,} {what}, more than a header may hold")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a key")
        if key in metadata:
            raise _Broken(f"the key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.fixed("I", key), key)
    if not isinstance(metadata.get("general.architecture"), str):
        raise _Broken("it names no general.architecture")
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _Broken(f"general.alignment is {alignment!r}, not a small power of two")
    base = -(-cursor.at // alignment) * alignment
    return metadata, _placed(entries, base, alignment, len(data))


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text("a tensor's name")
    dimensions = cursor.fixed("I", name)
    if not 1 <= dimensions <= _DIMENSIONS:
        raise _Broken(f"{name} has {dimensions} dimensions")
    shape = tuple(cursor.fixed("Q", name) for _ in range(dimensions))[::-1]  # the file's fastest comes first
    return name, shape, cursor.fixed("I", name), cursor.fixed("Q", name)


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], base: int, alignment: int, size: int
) -> dict[str, StoredTensor]:
    from gguf import GGML_QUANT_SIZES

    sizes = {int(kind): layout for kind, layout in GGML_QUANT_SIZES.items()}
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise _Broken(f"the tensor {name!r} stands twice")
        if kind not in sizes:
            raise _Broken(f"{name} has the unknown tensor type {kind}")
        elements = 1
        for extent in shape:
            elements *= extent
        block, block_bytes = sizes[kind]
        if not 0 < elements <= _ELEMENTS or shape[-1] % block:
            raise _Broken(f"{name} has the impossible shape {list(shape)} for its type")
        nbytes = elements // block * block_bytes
        if offset % alignment or base + offset + nbytes > size:
            raise _Broken(f"{name} lies at {base + offset:,} with {nbytes:,} bytes, in a file of {size:,}")
        tensors[name] = StoredTensor(name, shape, kind, base + offset, nbytes)
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
    for one, two in pairwise(ordered):
        if one.start + one.nbytes > two.start:
            raise _Broken(f"{one.name} and {two.name} lie on the same bytes")
    return tensors
