"""The instructions by which the kernel for sparse rows reads numbers and bits, and unrolls them.

Shared memory begins at `room`, which a kernel that uses any of this declares by `room_code`.
"""

from __future__ import annotations

import triton.language as tl


def unroll_code(wide: bool) -> str:
    """PTX that unrolls two bytes, $8 and $9, whose numbers begin at addresses $10 and $11: bit i gives $i, the number
    of the first in its lower half, that of the second in its upper, zero where no bit is set.

    wide: addresses may pass a multiple of 4 GiB. Otherwise their upper halves stay, which spares an addition.
    """
    lines = ["{ .reg .pred p, q; .reg .b32 x, y, t, l, m, h, k; .reg .b64 a, b;"]
    lines.append("mov.b64 a, $10; mov.b64 b, $11; mov.b64 {l, h}, a; mov.b64 {m, k}, b;")
    for i in range(8):
        for is_set, number, place, low, high, byte in (
            ("p", "x", "a", "l", "h", "$8"),
            ("q", "y", "b", "m", "k", "$9"),
        ):
            lines.append(f"and.b32 t, {byte}, {1 << i}; setp.ne.u32 {is_set}, t, 0; mov.b32 {number}, 0;")
            lines.append(f"@{is_set} ld.global.nc.u16 {number}, [{place}];")
            if i < 7 and wide:
                lines.append(f"@{is_set} add.s64 {place}, {place}, 2;")
            elif i < 7:
                moved = f"shl.b32 t, t, {1 - i};" if i < 2 else f"shr.u32 t, t, {i - 1};"
                lines.append(f"{moved} add.u32 {low}, {low}, t; mov.b64 {place}, {{{low}, {high}}};")
        lines.append(f"prmt.b32 ${i}, x, y, 0x5410;")
    return " ".join(lines) + " }"


def window_code(bits: int, pairs: bool = False) -> str:
    """The same from windows: the word 4 * r bytes beyond a unit's place holds its numbers r - 1 and r.

    The bits of a word's bytes are added up side by side: byte k of `s` is how many numbers precede an odd bit, times 4;
    a window there ends with the number of that bit and begins with the one before, that of the even bit below it. The
    bit, shifted to the sign of its byte, gives the half's mask. Nothing is read where neither bit is set, for fewer
    conflicts of banks. Two units of 16 bits, or four of 8.

    pairs: one unit of 8, 16 or 32 bits (the first of four inputs, which are alike), whose even bits are in lower
    halves, odd ones in upper.
    """
    units = 1 if pairs else 32 // bits  # of one invocation
    inputs = 4 if pairs else units
    per_unit = bits // 8
    outputs = bits // 2 if pairs else bits * units // 2
    unit = [f"${outputs + i}" for i in range(units)]
    lines = ["{ .reg .pred p, q; .reg .b32 w, u, t, c, s0, s1, s2, s3, w0, w1, w2, w3, w4, w5, w6, w7, x, y, m;"]
    lines.append(".reg .b32 p0, p1, p2, p3; mov.u32 t, room;")
    lines.extend(f"add.u32 p{per_unit * i}, ${outputs + inputs + i}, t;" for i in range(units))
    if units == 1:
        lines.append(f"mov.b32 w, {unit[0]};")
    elif units == 2:
        lines.append(f"prmt.b32 w, {unit[0]}, {unit[1]}, 0x5410;")
    else:
        lines.append(f"prmt.b32 w, {unit[0]}, {unit[1]}, 0x0040; prmt.b32 t, {unit[2]}, {unit[3]}, 0x0040;")
        lines.append("prmt.b32 w, w, t, 0x5410;")
    # Twos of bits, an odd one and the even one above it; the highest of a unit is not counted.
    ends = sum(128 << (8 * i) for i in range(3, -1, -per_unit))
    lines.append(f"and.b32 u, w, {0xFFFFFFFF - ends:#x}; and.b32 t, w, 0x55555555;")
    lines.append("add.u32 c, u, u; sub.u32 c, c, t;")
    for k in range(4):
        shift = ("shl.b32 t, c, 2;", "mov.b32 t, c;", "shr.u32 t, c, 2;", "shr.u32 t, c, 4;")[k]
        lines.append(f"{shift} and.b32 s{k}, t, 0x0C0C0C0C;")
    lines.append("add.u32 s1, s0, s1; add.u32 s2, s1, s2; add.u32 s3, s2, s3;")
    for i in range(units):  # where the numbers of a unit's further bytes begin
        for y in range(1, per_unit):
            byte = per_unit * i + y
            lines.append(f"dp4a.u32.u32 p{byte}, s3, {1 << (8 * byte - 8):#x}, p{byte - 1};")
    lines.extend(f"shl.b32 w{i}, w, {7 - i};" for i in range(7))
    lines.append("mov.b32 w7, w;")

    def read(number: str, is_set: str, byte: int, k: int) -> None:
        # Over the address: what is not read must not wait for what the register held before.
        lines.append(f"dp4a.u32.u32 {number}, s{k}, {1 << (8 * byte):#x}, p{byte};")
        lines.append(f"and.b32 t, w, {3 << (8 * byte + 2 * k):#x}; setp.ne.u32 {is_set}, t, 0; @{is_set}")
        lines.append(f"ld.shared.b32 {number}, [{number}];")

    for y in range(per_unit):
        for k in range(4) if pairs else ():
            read("x", "p", y, k)
            lines.append(f"prmt.b32 m, w{2 * k}, w{2 * k + 1}, {(12 + y) * 0x1100 + (8 + y) * 0x11:#x};")
            lines.append(f"and.b32 ${4 * y + k}, x, m;")
        for pair in range(units // 2):
            low, high = 2 * pair * per_unit + y, (2 * pair + 1) * per_unit + y  # bytes of w
            for k in range(4):
                read("x", "p", low, k)
                read("y", "q", high, k)
                signs = (8 + high) * 0x1100 + (8 + low) * 0x11
                for half in range(2):
                    channel = 8 * y + 2 * k + half
                    out = f"${channel * (units // 2) + pair}"
                    lines.append(f"prmt.b32 t, x, y, {0x7632 if half else 0x5410:#x};")
                    lines.append(f"prmt.b32 m, w{2 * k + half}, w, {signs:#x}; and.b32 {out}, t, m;")
    return " ".join(lines) + " }"


def constraints(outputs: int, inputs: int) -> str:
    """Those of so many 32-bit registers, outputs written before inputs are read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


UNROLL = tl.constexpr(unroll_code(wide=False))
UNROLL_WIDE = tl.constexpr(unroll_code(wide=True))
OUTPUTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,l,l")


FETCH = tl.constexpr(  # what is not read stays rubbish, which masks hide
    "{ .reg .pred p; setp.gt.s32 p, $3, $4; @p ld.global.nc.v2.b32 {$0, $1}, [$2]; }"
)
PUT = tl.constexpr(  # $0: the second word of the lane before; the first lane's is that of the last, of an earlier turn
    "{ .reg .pred p; .reg .b32 b, x, y; shfl.sync.idx.b32 $0, $2, $4, 31, 0xffffffff; setp.eq.u32 p, $4, 31; "
    "selp.b32 b, $3, $0, p; prmt.b32 x, b, $1, 0x5432; prmt.b32 y, $1, $2, 0x5432; "
    "setp.lt.s32 p, $6, $7; @p st.shared.v4.b32 [$5], {x, $1, y, $2}; }"
)


def copy_code(size: int) -> str:
    """PTX that begins to copy `size` bytes, $3 of them from memory, zeros after them."""
    kind = "cg" if size == 16 else "ca"
    copy = f"cp.async.{kind}.shared.global [$1], [$2], {size}, $3;"
    return "{ .reg .pred p; setp.lt.s32 p, $4, $5; @p " + copy + " mov.b32 $0, 0; }"


COPY_16, COPY_8, COPY_4 = (tl.constexpr(copy_code(size)) for size in (16, 8, 4))


def unit_code(bits: int) -> str:
    """PTX that reads so many bits from a place in `room`."""
    return "{ .reg .b32 t; mov.u32 t, room; add.u32 t, t, $1; " + f"ld.shared.u{bits} $0, [t]; }}"


UNIT_32, UNIT_16, UNIT_8 = (tl.constexpr(unit_code(bits)) for bits in (32, 16, 8))


def room_code(size: int) -> str:
    """PTX that declares `size` bytes of shared memory, and gives their address."""
    return f".shared .align 16 .b8 room[{size}]; mov.u32 $0, room;"
