"""Which layers share the softmax of one, from the top downwards."""

from __future__ import annotations


def source_layer(layer: int, layers: int, reusing: int, size: int) -> int:
    """The layer whose weights this one of `layers` uses, itself if it computes its own.

    reusing: how many use another's. They lie in blocks of `size` layers, longer where otherwise too few could; the
    first layer of a block serves the others, and what is not a whole block lies below the others.
    """
    size = block_size(layers, reusing, size)
    top = layers - 1 - layer  # how many are above it
    whole, rest = divmod(reusing, size - 1)
    if top < whole * size:
        return layers - (top // size + 1) * size
    if rest and top < whole * size + rest + 1:
        return layers - whole * size - rest - 1
    return layer


def block_size(layers: int, reusing: int, size: int) -> int:
    """The layers of a block: `size`, or more if otherwise not `reusing` of `layers` could use another's weights."""
    while reusing > 0 and -(-reusing // (size - 1)) + reusing > layers:
        size += 1
    return size
