"""VPTQ."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear, Parts, VectorLinear, packed_nbytes, vector_nbytes
from workbench.weights.solvers.vector_quantisation import APART_BITS, column_costs, others, vectors

_CODE = "microsoft/VPTQ, branch algorithm, algorithm.md and run_vptq.py, 5a8dfb9"
_LENGTHS = range(8, 1, -1)  # of vectors, where the layer's size decides
_OVERHEAD = 0.25  # bits a weight that their codebook may take then
_SMALL = "a codebook of 65,536 vectors of 8 is larger than the layers of small models"


@register
class VPTQ(WeightMethod):
    """Replace vectors of weights by entries of a codebook, in turn, and let later columns make up for the error.

    Vectors are `vector_length` weights of neighbouring outputs in one column, so that a column is replaced at a time
    and every vector costs what its column's entry of the Hessian's diagonal says ("channel-independent", section 3.1,
    algorithm 1); with `permuted`, as in the authors' code, columns with large inputs come first. The codebook is found
    by k-means weighted with that diagonal (section 3.2); a second one, where `residual_bits` is not 0, for what the
    first pass left of the vectors, and a second pass takes both (section 3.3). A share of the columns, those with the
    largest entries of the diagonal, can be taken out (section 3.4).

    Codebooks of the paper, 65,536 vectors of 8, would be larger than the layers of small models. By default vectors are
    as long, up to 8, as a codebook with two bits of an index for each weight takes at most a quarter of a bit a weight:
    5 at 576 x 576, 8 from 5,793 x 5,793 on.

    Where this differs: weights of an output are divided by their root mean square first, unless `scaled` is off (the
    authors' script shifts and scales columns instead); the columns taken out are rounded to 8 bits, the paper gives
    them a codebook of their own; and nothing is trained on afterwards.
    """

    key = "vptq"
    title = "VPTQ"
    paper = Paper(
        "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
        "Liu et al. 2024",
        "2409.17066",
    )
    claim = "two bits a weight, near 16-bit quality on large models"
    fidelity = Fidelity("deviates", "not trained on afterwards; smaller codebooks by default, and scales of outputs")
    presets = (
        Preset(
            "script",
            _CODE,
            vector_length=8,
            index_bits=16,
            residual_bits=8,
            outliers=0.0,
            permuted=True,
            rounds=100,
            damping=0.01,
            seed=0,
        ),
        Preset(
            "two bits",
            "microsoft/VPTQ, README.md, 5a8dfb9: model names such as v8-k65536-0",
            index_bits=16,
            vector_length=8,
            residual_bits=0,
        ),
    )
    needs_hessian: ClassVar[bool] = True

    vector_length: int = param(
        0, ge=0, le=16, unit="weights", help="how many share one index; 0: by the layer's size", own=_SMALL
    )
    index_bits: Literal[0, 4, 6, 8, 10, 12, 14, 16] = param(
        0, help="bits of an index: the codebook has 2 to that power entries; 0: two for each weight", own=_SMALL
    )
    residual_bits: Literal[0, 4, 6, 8, 10, 12] = param(
        0, help="bits of an index into the second codebook; 0: none", own="the claim's two bits have none"
    )
    outliers: float = param(0.0, ge=0, le=0.2, help="share of the columns that are held at 8 bits")
    permuted: bool = param(True, help="columns with large inputs first")
    scaled: bool = param(
        True,
        help="divide the weights of each output by their root mean square",
        own="the script scales input columns, the paper nothing: divergence on workbench-tiny 0.77, without 0.88",
    )
    rounds: int = param(
        12,
        ge=1,
        le=100,
        help="of k-means",
        own="eight times as many gain nothing: divergence on workbench-tiny 0.77, with 100 rounds 0.79",
    )
    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")
    seed: int = param(0, ge=0, le=2**31 - 1, help="where k-means begins")

    def nbytes(self, linear: nn.Linear) -> int:
        outputs, inputs = linear.weight.shape
        out = self._outliers(inputs)
        beside = packed_nbytes(outputs, out, APART_BITS, out, zero_bytes=0) if out else 0
        places = (2 if inputs <= 2**15 else 4) * inputs if out else 0  # which part each column is in
        length, bits, entries = self._books(linear)
        return vector_nbytes(outputs, inputs - out, length, bits, entries) + beside + places

    def _outliers(self, inputs: int) -> int:
        return min(int(self.outliers * inputs), inputs - 1)

    def _books(self, linear: nn.Linear) -> tuple[int, list[int], list[int]]:
        """How long vectors are, bits of the indices into each codebook, and its entries: never more than vectors."""
        outputs, inputs = linear.weight.shape
        length = self.vector_length or next(
            (v for v in _LENGTHS if 16 * v * 4**v <= _OVERHEAD * outputs * inputs), _LENGTHS[-1]
        )
        first = self.index_bits or next(bits for bits in (4, 6, 8, 10, 12, 14, 16) if bits >= min(2 * length, 16))
        count = -(-outputs // length) * (inputs - self._outliers(inputs))
        bits: list[int] = [first, *([self.residual_bits] if self.residual_bits else [])]
        return length, bits, [min(2**wide, count) for wide in bits]

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        assert inputs is not None
        weight = linear.weight.detach().float()
        length, bits, entries = self._books(linear)
        apart = self._apart(inputs.hessian)
        made = vectors(
            weight,
            inputs.hessian,
            apart,
            length,
            entries,
            scaled=self.scaled,
            permuted=self.permuted,
            damping=self.damping,
            rounds=self.rounds,
            seed=self.seed,
        )
        indexed = VectorLinear(made.indices, made.books, made.scale, bits, None if apart.numel() else linear.bias)
        if not apart.numel():
            return indexed
        beside = PackedLinear(made.codes, made.grid.scale, None, APART_BITS, group=made.grid.group)
        return Parts([indexed, beside], [others(apart, weight.shape[1]), apart], linear.in_features, linear.bias)

    def _apart(self, hessian: Tensor) -> Tensor:
        """The columns that are taken out, ascending int64 [e]."""
        first = column_costs(hessian).argsort(descending=True, stable=True)
        return first[: self._outliers(len(hessian))].sort().values
