"""CalibQuant, once called From 16-bit to 1-bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from workbench.core.bisection import largest
from workbench.kv.base import KVMethod
from workbench.kv.stores.calibrated import CalibratedFormat
from workbench.kv.stores.format import DenseFormat, Format, Shape, stored_nbytes
from workbench.registry import Fidelity, Paper, Preset, param, register

_WHERE = "where the image stands in the prompt is its user's to say; the published script has its model's own places"


@register
class VisualKV1Bit(KVMethod):
    """Keep every token, but those of one stretch, such as an image, at one bit a number.

    Every channel of a KV head has one scale and one zero for the whole stretch, so that nothing but the bits grows with
    it. Calibration, as in the authors' code: the two levels are not the channel's extremes, which few numbers come
    near, but `key_share` or `value_share` of them; and because levels that far apart make the largest scores too large,
    the scores of the stretch are drawn together for each query, so that their maximum falls by `drop` and their minimum
    stays. The prompt is read exactly; text, and every token of the answer, stays as it is.

    The stretch is `length` tokens from position `start` on (counted among the tokens kept, where another method drops
    some); without a length, in a prompt that was read with images, from the first token of an image to the last of one.
    Chosen here: of plain text it is without a length all but the newest `recent` tokens; with a budget then as few as
    it asks for, counted from `start`. Scores that span less than `drop` all fall to their minimum, where the code's
    formula would turn their order round. A question of several tokens is read with lowered scores too, each for itself.
    """

    key = "vkv-1bit"
    title = "CalibQuant"
    paper = Paper("CalibQuant: 1-Bit KV Cache Quantization for Multimodal LLMs", "Han, Zhang et al. 2025", "2502.14882")
    claim = "16 times smaller on visual tokens"
    fidelity = Fidelity("deviates", "of plain text any stretch of tokens; lowered scores never turn their order round")
    presets = (
        Preset(
            "1 bit",
            "insuhan/calibquant, patch_internvl.py, 1dcfce8",
            bits=1,
            key_share=0.5,
            value_share=0.3,
            drop=3.0,
        ),
        Preset("2 bits", "the same", bits=2, key_share=1.0, value_share=1.0, drop=3.0),
        Preset("4 bits", "the same", bits=4, key_share=1.0, value_share=1.0, drop=0.0),
    )

    bits: Literal[1, 2, 4, 8] = param(1, help="bits of each number in the stretch")
    key_share: float = param(0.5, gt=0, le=1, help="part of a channel's range over which the levels of keys reach")
    value_share: float = param(0.3, gt=0, le=1, help="the same for values")
    drop: float = param(3.0, ge=0, le=100, help="by how much the largest score in the stretch falls")
    start: int = param(0, ge=0, le=2**20, unit="tokens", help="first token of the stretch", own=_WHERE)
    length: int = param(
        0, ge=0, le=2**20, unit="tokens", help="tokens in the stretch; 0: all but the newest", own=_WHERE
    )
    recent: int = param(
        32, ge=0, le=4096, unit="tokens", help="newest tokens that stay exact where no length is set", own=_WHERE
    )

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if self.length:
            return self._format(dtype, recent=0)
        if (images := next((shape.images for shape in shapes if shape.images), None)) is not None:
            return self._format(dtype, recent=0, stretch=images)
        if limit is None:
            return self._format(dtype, self.recent)
        everything = torch.tensor([[shape.tokens] * shape.kv_heads for shape in shapes])

        def nbytes(recent: int) -> int:
            return stored_nbytes(self._format(dtype, recent), shapes, everything)

        most = max(shape.tokens for shape in shapes) - self.start
        recent = largest(lambda recent: nbytes(recent) <= limit, 0, most)
        full = sum(shape.full_nbytes for shape in shapes)
        # In a stretch of a few tokens the levels take more than the bits save.
        return DenseFormat(dtype) if full <= max(limit, nbytes(recent)) else self._format(dtype, recent)

    def _format(self, dtype: torch.dtype, recent: int, stretch: tuple[int, int] | None = None) -> Format:
        """The stretch from one position to before another; None: as the parameters say."""
        shares = self.key_share, self.value_share
        start, end = stretch or (self.start, self.start + self.length)
        return CalibratedFormat(dtype, self.bits, *shares, self.drop, start, end - start or None, recent)
