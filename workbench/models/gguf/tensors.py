"""One tensor of a GGUF file, dequantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workbench.errors import CheckpointRefused
from workbench.models.gguf.header import Header

if TYPE_CHECKING:
    from torch import Tensor


def tensor(header: Header, name: str) -> Tensor:
    """One tensor of the file, dequantised: float32, in the shape that the file says."""
    import torch
    from gguf import GGMLQuantizationType, dequantize

    stored = header.tensors[name]
    data = np.memmap(header.path, np.uint8, mode="r", offset=stored.start, shape=(stored.nbytes,))
    kind = GGMLQuantizationType(stored.kind)
    try:
        values = _PLAIN[kind.name](data) if kind.name in _PLAIN else dequantize(data, kind)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointRefused(f"{header.path}: {name} is stored as {kind.name}, which cannot be read") from error
    return torch.from_numpy(np.array(values, dtype=np.float32).reshape(stored.shape))


# Views of the bytes; `gguf.dequantize` does these only for arrays that have the type already.
_PLAIN: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.floating]]] = {
    "F32": lambda data: data.view(np.float32),
    "F16": lambda data: data.view(np.float16),
    "F64": lambda data: data.view(np.float64),
}
