"""Whether what a store holds is within the reach of the forms that it holds it in."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.precision import narrow
from workbench.errors import OutOfRange
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace


def check_reach(store: Store, layer: LayerTrace) -> None:
    """Raise OutOfRange where keys or values of a layer, or the scales and zeros that stand for them, became infinite in
    the float16 or float8 numbers of its store. On a GPU this waits once: it is for stores that were just built.
    """
    tensors_of_forms = [*store.tensors().values(), *store.host_tensors().values()]
    short = [x for tensors in tensors_of_forms for x in tensors if narrow(x.dtype)]
    if short and not bool(torch.stack([_finite(x).to(layer.keys.device) for x in short]).all()):
        keys, values = (float(x.abs().max()) for x in (layer.keys, layer.values))
        form = next(str(x.dtype).removeprefix("torch.") for x in short if not bool(_finite(x)))
        raise OutOfRange(
            f"layer {layer.called}: keys reach {keys:.4g} and values {values:.4g}, too large for the {form} numbers in "
            f'which this cache holds them or their scales: give kv_dtype="bfloat16", or another method'
        )


def _finite(x: Tensor) -> Tensor:
    wide = x if x.dtype.itemsize > 1 else x.float()
    return wide.isfinite().all()
