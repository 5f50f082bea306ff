"""How an array travels to JavaScript: one bytes value that describes itself.

A 16-byte header (dtype code, number of dimensions, two spare bytes, three little-endian uint32 sizes), then the
values in C order, little-endian. Shape and values are one value, so a view never sees a new array with an old shape.
JavaScript has no typed array for float64 and none that draws quickly for int64: they are sent as float32 and int32.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import BadParameter

HEADER = struct.Struct("<BBxxIII")
DTYPES = (np.dtype("<u1"), np.dtype("<i4"), np.dtype("<f4"))  # the order is the dtype code; base.js has the same list


def pack(values: ArrayLike) -> bytes:
    """An array of one to three dimensions as bytes; bool becomes uint8, other integers int32, floats float32.

    Raises `BadParameter` for more dimensions, for other kinds of values, and for integers that int32 cannot hold.
    """
    array = np.asarray(values)
    if array.size == 0 and array.dtype == np.float64:  # an empty list has no dtype of its own
        array = array.astype(np.uint8)
    if not 1 <= array.ndim <= 3:
        raise BadParameter(f"an array with {array.ndim} dimensions cannot be sent to a view: give one with 1 to 3")
    if array.dtype in (np.bool_, np.uint8):
        code = 0
    elif array.dtype.kind in "iu":
        code = 1
        limits = np.iinfo(np.int32)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise BadParameter("integers beyond 32 bits cannot be sent to a view: scale them down or send floats")
    elif array.dtype.kind == "f":
        code = 2
    else:
        raise BadParameter(f"an array of {array.dtype} cannot be sent to a view: give numbers")
    sizes = (*array.shape, 0, 0)[:3]
    return HEADER.pack(code, array.ndim, *sizes) + np.ascontiguousarray(array, dtype=DTYPES[code]).tobytes()


def unpack(packet: bytes) -> NDArray[Any]:
    """The array that `pack` made bytes of; no bytes at all give an empty array."""
    if not packet:
        return np.zeros(0, dtype=np.uint8)
    code, ndim, *sizes = HEADER.unpack_from(packet)
    return np.frombuffer(packet, dtype=DTYPES[code], offset=HEADER.size).reshape(sizes[:ndim])
