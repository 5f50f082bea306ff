"""A linear layer, of whatever form, before which what enters is rounded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.measure.memory import tensor_bytes
from workbench.weights.layers.compact import CompactLinear, Description
from workbench_kernels.integer import input_codes

Form = Literal["int8", "int4", "fp8"]
"""What an input is rounded to: whole numbers, or floating point of 4 bits exponent and 3 bits mantissa (E4M3)."""

MOST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}  # the largest number of each form
_BITS = {"int8": 8, "int4": 4}
_LEAST = torch.finfo(torch.float32).tiny


class RoundedInput(CompactLinear):
    """A linear layer before which each token of the input is rounded, and multiplied as floating point.

    inner: the layer, plain or small, with its own bias. step: float32 [1], by which inputs are divided before they are
    rounded, those beyond the form's largest number cut; None: for each token the one that reaches its largest |x|.
    """

    step: Tensor | None

    def __init__(self, inner: nn.Linear | CompactLinear, form: Form, step: Tensor | None = None) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self.inner, self.form = inner, form
        self.register_buffer("step", None if step is None else step.detach().float().reshape(1).clone())

    @property
    def nbytes(self) -> int:
        return tensor_bytes([*(w for w in self.inner.parameters() if w is not self.inner.bias), *self.buffers()])

    def rounded(self, x: Tensor) -> Tensor:
        """Inputs [..., i] as they are multiplied, at their dtype."""
        size = x.detach().float().abs().amax(dim=-1, keepdim=True) / MOST[self.form]
        step = size.clamp_min_(_LEAST) if self.step is None else self.step
        return (nearest(x, step, self.form) * step).to(x.dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        if isinstance(self.inner, CompactLinear):
            return self.inner.rows(first, last, dtype)
        return self.inner.weight[first:last].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        near = self.rounded(x)
        if isinstance(self.inner, nn.Linear) and self.inner.weight.dtype != x.dtype:
            bias = None if self.inner.bias is None else self.inner.bias.to(x.dtype)
            return linear(near, self.inner.weight.to(x.dtype), bias)
        out: Tensor = self.inner(near)
        return out

    def describe(self) -> Description:
        inner = self.inner.describe() if isinstance(self.inner, CompactLinear) else super().describe()
        return {**inner, "inputs": self.form}


def nearest(x: Tensor, step: Tensor, form: Form) -> Tensor:
    """The nearest numbers of a form to x [..., i] in these steps, float32."""
    if form != "fp8":
        return input_codes(x, step, _BITS[form])
    return (x.float() / step).clamp_(-MOST[form], MOST[form]).to(torch.float8_e4m3fn).float()
