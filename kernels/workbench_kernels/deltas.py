"""Decode attention over rows held as deltas: of each channel only the tokens at which it moved."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.limits import WIDEST_DELTAS
from workbench_kernels.rows import DeltaRows, Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state


def _takes(query: Tensor, keys: DeltaRows, values: DeltaRows | Ragged, scoring: Scoring) -> bool:
    data = values.numbers.data if isinstance(values, DeltaRows) else values.data
    fits = keys.group & (keys.group - 1) == 0 and keys.group >= 16
    width = max(keys.channels, values.channels if isinstance(values, DeltaRows) else values.data.shape[1])
    here = on_gpu(query, keys.numbers.data, data) and scoring.in_kernels
    return here and fits and query.dtype.itemsize == 2 and width * keys.group <= WIDEST_DELTAS


@with_kernel("gpu.deltas:decode_deltas", when=_takes)
def decode_deltas(
    query: Tensor, keys: DeltaRows, values: DeltaRows | Ragged, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Softmax attention of query [h, q, d] over all rows of the keys' blocks, with values in blocks alike or whole,
    [t, dv], of which there may be more; h = g * k, all of one dtype. All queries see everything.

    Returns the output [h, q, dv] in the query's dtype and the log-sum-exp float32 [h, q].
    """
    key, real = keys.padded()
    value = values.padded()[0][:, : key.shape[1]]
    value = torch.nn.functional.pad(value, (0, 0, 0, key.shape[1] - value.shape[1]))
    return attention_state(query, key, value, real[:, None], scoring)
