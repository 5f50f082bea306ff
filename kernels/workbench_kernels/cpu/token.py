"""One token through a decoder layer: products with rows of weights, rotary embedding, and attention over a cache.

Each is computed by the compiled library where one is given, and by PyTorch otherwise, in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from workbench_kernels.rotary import rotate
from workbench_kernels.rows import PackedRows, Ragged
from workbench_kernels.scoring import Scoring

_WIDE = 16  # numbers in a vector of the library
_BLOCK = 32  # columns that share a scale and a zero
_FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 4}  # of exact rows, as the library calls them


class _Part(ctypes.Structure):
    """Rows of one weight, as the library reads them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "scale", "zero", "bias")),
        *((name, ctypes.c_long) for name in ("count", "form")),
    )


class Coded(NamedTuple):
    """A weight [n, i] float32 in fewer bytes that stand for the same numbers, to the bit.

    form: 1, bfloat16 [n, i]; 2 or 3, codes of 4 or 8 bits in blocks of 32 columns, with a float16 scale and zero each;
    bytes are in pairs, whose fields are the codes of columns 16 apart.
    """

    form: int
    held: tuple[Tensor, ...]


def coded(weight: Tensor, library: ctypes.CDLL) -> Coded | None:
    """The fewest bytes in which the library reads the numbers of a contiguous weight; None where it takes them all."""
    blocks = weight.shape[1] // _BLOCK
    for form, bits in ((2, 4), (3, 8)):
        if weight.shape[1] % (_BLOCK * 8 // bits) == 0:
            codes = torch.empty(len(weight), blocks * _BLOCK * bits // 8, dtype=torch.uint8)
            scale = torch.empty(len(weight), blocks, dtype=torch.float16)
            held = (codes, scale, torch.empty_like(scale))
            places = [x.data_ptr() for x in held]
            threads = torch.get_num_threads()
            if library.wb_code(weight.data_ptr(), len(weight) * blocks, bits, *places, threads):
                return Coded(form, held)
    half = weight.to(torch.bfloat16)
    return Coded(1, (half,)) if torch.equal(half.float(), weight) else None


class Rows:
    """The rows of several weights [n, i], one weight behind another, to multiply one token's inputs with.

    weights and biases: contiguous float32 on the CPU; a bias is [n] or None. With the library weights are read from
    `copies` where `coded` makes one.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], library: ctypes.CDLL | None = None
    ) -> None:
        self.weights, self.biases, self._library = list(weights), list(biases), library
        self.width, self.rows = weights[0].shape[1], sum(len(weight) for weight in weights)
        self.copies: list[Tensor] = []
        self._parts = (_Part * len(weights))()
        for part, weight, bias in zip(self._parts, weights, biases, strict=True):
            part.count, part.rows, part.bias = len(weight), weight.data_ptr(), None if bias is None else bias.data_ptr()
            if library is not None and (copy := coded(weight, library)) is not None:
                self.copies += copy.held
                part.form, part.rows = copy.form, copy.held[0].data_ptr()
                part.scale, part.zero = [x.data_ptr() for x in copy.held[1:]] or (None, None)

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        plus: Tensor | None = None,
    ) -> Tensor:
        """The products [n] with inputs made of x float32 [i], plus biases and `plus` [n].

        norm [i]: x divided by its root mean square, times norm (Zhang & Sennrich 2019, arXiv:1910.07467). gated: x is
        [2 i], and the inputs are silu(first half) * second half (SwiGLU's, Shazeer 2020, arXiv:2002.05202).
        """
        if self._library is None:
            return self._reference(x, norm, eps, gated, plus)
        out = torch.empty(self.rows)
        scratch = torch.empty(2 * self.width + self.width // _BLOCK)  # each call's own: two threads may be in one
        self._library.wb_linear(
            2 if gated else int(norm is not None),
            x.data_ptr(),
            None if norm is None else norm.data_ptr(),
            eps,
            self.width,
            len(self.weights),
            self._parts,
            None if plus is None else plus.data_ptr(),
            out.data_ptr(),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def _reference(self, x: Tensor, norm: Tensor | None, eps: float, gated: bool, plus: Tensor | None) -> Tensor:
        if gated:
            first, second = x.chunk(2)
            x = silu(first) * second
        elif norm is not None:
            x = norm * (x * torch.rsqrt(x.pow(2).mean() + eps))
        parts = [linear(x, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if plus is None else plus + out


def turn(x: Tensor, cos: Tensor, sin: Tensor, library: ctypes.CDLL | None = None) -> Tensor:
    """x [n, d] turned by the rotary angles cos and sin [r] of one position, as `rotate` does; with the library in
    place.
    """
    if library is None:
        return rotate(x, cos, sin)
    library.wb_rotate(x.data_ptr(), x.shape[0], x.shape[1], cos.shape[0], cos.data_ptr(), sin.data_ptr())
    return x


class _Side(ctypes.Structure):
    """Keys or values, as the library reads them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "starts", "lengths", "scale_starts")),
        *((name, ctypes.c_void_p) for name in ("zero_starts", "tail", "tail_starts", "tail_lengths", "balance")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "channel", "width", "form")),
    )


def attends(keys: Ragged | PackedRows, values: Ragged | PackedRows) -> bool:
    """Whether the library reads keys and values that are laid out so."""
    return _reads(keys) and _reads(values) and (isinstance(values, Ragged) or _by_token(values))


def _by_token(rows: PackedRows) -> bool:
    return rows.axis == "token" and rows.balance is None


def _reads(rows: Ragged | PackedRows) -> bool:
    tail = rows if isinstance(rows, Ragged) else rows.tail
    width = tail.data.shape[1]
    if tail.data.dtype not in _FORMS or tail.data.device.type != "cpu" or width % _WIDE:
        return False
    if isinstance(rows, Ragged):
        return True
    if rows.zero is None:
        return False
    whole_vectors = width * rows.bits // 8 % _WIDE == 0
    groups = rows.axis == "channel" or (rows.group % _WIDE == 0 and rows.balance is None)
    halves = (rows.scale.data, rows.zero.data, *(() if rows.balance is None else (rows.balance,)))
    return whole_vectors and groups and all(x.dtype == torch.float16 and x.is_contiguous() for x in halves)


def attend(
    query: Tensor, keys: Ragged | PackedRows, values: Ragged | PackedRows, scoring: Scoring, library: ctypes.CDLL
) -> Tensor:
    """Attention of the newest token's query float32 [h, 1, d] over everything held, where `attends` says so:
    [h, 1, dv]. Each head sees at least one row.
    """
    query = query.contiguous()
    heads, (key_side, kv_heads), (value_side, _) = query.shape[0], _side(keys), _side(values)
    out = torch.empty(heads, 1, value_side.width)
    scratch = torch.empty(heads, keys.longest)
    library.wb_attend(
        query.data_ptr(),
        ctypes.addressof(key_side),
        ctypes.addressof(value_side),
        heads,
        kv_heads,
        keys.longest,
        scoring.scale,
        scoring.softcap or 0.0,
        out.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _side(rows: Ragged | PackedRows) -> tuple[_Side, int]:
    """The same for the library, and how many heads there are."""
    tail = rows if isinstance(rows, Ragged) else rows.tail
    side = _Side(
        tail=tail.data.data_ptr(),
        tail_starts=tail.starts.data_ptr(),
        tail_lengths=tail.lengths.data_ptr(),
        width=tail.data.shape[1],
        form=_FORMS[tail.data.dtype],
    )
    if isinstance(rows, PackedRows) and rows.codes.longest:
        assert rows.zero is not None
        side.codes, side.scale, side.zero = (x.data.data_ptr() for x in (rows.codes, rows.scale, rows.zero))
        side.starts, side.lengths = rows.codes.starts.data_ptr(), rows.codes.lengths.data_ptr()
        side.scale_starts, side.zero_starts = rows.scale.starts.data_ptr(), rows.zero.starts.data_ptr()
        side.balance = None if rows.balance is None else rows.balance.data_ptr()
        side.bits, side.group, side.channel = rows.bits, rows.group, int(rows.axis == "channel")
    return side, len(tail.starts)


class Stretch(NamedTuple):
    """Rows of heads that are all equally long: data [h * room, w], of which each head uses the first `longest`."""

    data: Tensor
    room: int
    longest: int


def leave(
    tail: Stretch, codes: Stretch, scale: Stretch, zero: Stretch, bits: int, group: int, library: ctypes.CDLL
) -> bool:
    """Quantise the first row of each head's tail, in groups of channels, behind its codes, where there is room, and
    close the tail up; the same as `quantise_rows`, to the bit. False where this cannot be done, and nothing has been.
    """
    form, width = _FORMS.get(tail.data.dtype), tail.data.shape[1]
    if form is None or tail.data.device.type != "cpu" or min(x.room for x in (codes, scale, zero)) <= codes.longest:
        return False
    done = library.wb_leave(
        tail.data.data_ptr(),
        form,
        len(tail.data) // tail.room,
        tail.room,
        tail.longest,
        width,
        *(x.data.data_ptr() for x in (codes, scale, zero)),
        *(x.room for x in (codes, scale, zero)),
        codes.longest,
        bits,
        group,
    )
    return bool(done)
