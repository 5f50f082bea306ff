"""One token on a CPU: the compiled library against PyTorch."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from workbench_kernels.building import quantise_rows
from workbench_kernels.cpu.library import library
from workbench_kernels.cpu.token import Rows, Stretch, attend, attends, coded, leave, turn
from workbench_kernels.decode import decode_dense, decode_packed
from workbench_kernels.packing import dequantise
from workbench_kernels.rotary import rotate
from workbench_kernels.rows import Axis, PackedRows, Ragged
from workbench_kernels.scoring import Scoring

COUNTS = [70, 41]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = library(str(tmp_path_factory.mktemp("compiled")))
    if found is None:
        pytest.skip("there is no compiler")
    return found


def weight(form: int, rows: int, columns: int) -> Tensor:
    """A weight whose numbers fit the form: 0 float32, 1 bfloat16, 2 and 3 blocks of 4 and 8 bits."""
    x = torch.randn(rows, columns)
    if form == 1:
        return x.bfloat16().float()
    if form < 2:
        return x
    most = 15 if form == 2 else 254
    codes = torch.randint(1, most + (form == 2), (rows, columns // 32, 32))
    codes[..., 0], codes[..., 1] = (0, most) if form == 2 else (1, 255)
    scale = (torch.rand(rows, columns // 32) / 8).half()
    zero = torch.randn(rows, columns // 32).half() if form == 2 else (-128 * scale.float()).half()
    return dequantise(codes, scale, zero).flatten(1).contiguous()


@pytest.mark.parametrize(("form", "columns"), [(0, 96), (0, 77), (1, 96), (1, 77), (2, 128), (3, 96), (2, 576)])
def test_products_are_those_of_the_weights(compiled: ctypes.CDLL, form: int, columns: int) -> None:
    torch.manual_seed(form)
    weights, bias = [weight(form, 37, columns), weight(0, 8, columns)], torch.randn(37)
    rows = Rows(weights, [bias, None], compiled)
    found = coded(weights[0], compiled)
    assert (found.form if found else 0) == form
    x, norm, plus = torch.randn(columns), torch.rand(columns) + 0.5, torch.randn(45)

    def exact(inputs: Tensor) -> Tensor:
        return torch.cat(
            [linear(inputs.double(), weights[0].double(), bias.double()), weights[1].double() @ inputs.double()]
        )

    def close(got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)

    close(rows(x), exact(x))
    close(rows(x, norm=norm, eps=1e-5, plus=plus), exact(rms_norm(x, (columns,), norm, 1e-5)) + plus)
    both = 3 * torch.randn(2 * columns)
    both[0], both[1] = -200.0, 200.0  # where an exponential has no room
    close(rows(both, gated=True), exact(silu(both[:columns]) * both[columns:]))
    torch.testing.assert_close(
        Rows(weights, [bias, None])(both, gated=True), rows(both, gated=True), rtol=2e-5, atol=2e-4
    )


@pytest.mark.parametrize("form", [1, 2, 3])
def test_one_number_that_does_not_fit_keeps_a_weight_as_it_is(compiled: ctypes.CDLL, form: int) -> None:
    held = weight(form, 40, 64)
    held[33, 40] *= 1 + 2**-14
    found = coded(held, compiled)
    assert found is None or found.form < form
    x = torch.randn(64)
    torch.testing.assert_close(Rows([held], [None], compiled)(x), held @ x, rtol=1e-5, atol=1e-5)


def test_turning_is_that_of_the_reference(compiled: ctypes.CDLL) -> None:
    x, cos, sin = torch.randn(5, 48), torch.randn(32), torch.randn(32)
    torch.testing.assert_close(turn(x.clone(), cos, sin, compiled), rotate(x, cos, sin))


def ragged(counts: list[int], width: int, dtype: torch.dtype = torch.float32) -> Ragged:
    """Rows of heads with so many each, and rows between them that nobody owns."""
    lengths = torch.tensor(counts, dtype=torch.int32)
    starts = (lengths + 3).cumsum(0).to(torch.int32) - lengths
    return Ragged(torch.randn(int(starts[-1] + lengths[-1]), width).to(dtype), starts, lengths, max(counts))


def packed(
    counts: list[int], bits: int, group: int, axis: Axis, dtype: torch.dtype, *, balance: bool = False
) -> PackedRows:
    """The first 32 rows of each head packed, the others whole."""
    made = quantise_rows(torch.randn(len(counts), 32, 64), bits, group, axis)
    parts = [Ragged.of(x.view(len(counts), -1, x.shape[1])) for x in made]
    factors = (torch.rand(len(counts), 64) + 0.5).half() if balance else None
    tail = ragged([count - 32 for count in counts], 64, dtype)
    return PackedRows(parts[0], parts[1], parts[2], tail, bits, group, axis, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scoring", [Scoring(0.2), Scoring(0.2, softcap=3.0)])
def test_attention_over_exact_rows(compiled: ctypes.CDLL, dtype: torch.dtype, scoring: Scoring) -> None:
    torch.manual_seed(1)
    query, keys, values = torch.randn(20, 1, 64), ragged(COUNTS, 64, dtype), ragged(COUNTS, 32, dtype)
    assert attends(keys, values)
    wanted, _ = decode_dense.reference(query, keys, values, scoring)
    torch.testing.assert_close(attend(query, keys, values, scoring, compiled), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("axis", "group", "balance"), [("channel", 32, False), ("channel", 16, True), ("token", 48, False)]
)
def test_attention_over_packed_rows(compiled: ctypes.CDLL, bits: int, axis: Axis, group: int, balance: bool) -> None:
    torch.manual_seed(bits)
    query = torch.randn(6, 1, 64)
    keys = packed(COUNTS, bits, group, axis, torch.bfloat16, balance=balance)
    values = packed(COUNTS, bits, 32, "token", torch.float32)
    assert attends(keys, values)
    wanted, _ = decode_packed.reference(query, keys, values, Scoring(0.1))
    torch.testing.assert_close(attend(query, keys, values, Scoring(0.1), compiled), wanted, rtol=2e-5, atol=5e-6)


def test_layouts_that_are_not_read_are_named() -> None:
    exact = ragged(COUNTS, 64)
    assert not attends(ragged(COUNTS, 60), ragged(COUNTS, 60))
    assert not attends(exact, packed(COUNTS, 2, 32, "channel", torch.float32))
    assert not attends(packed(COUNTS, 1, 32, "channel", torch.float32), exact)
    assert not attends(packed(COUNTS, 2, 8, "token", torch.float32), exact)


def test_without_a_compiler_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library(str(tmp_path / "none")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "width", "group"), [(2, 64, 32), (4, 60, 32), (8, 64, 48), (1, 64, 64)])
def test_a_row_that_leaves_is_quantised_to_the_bit(
    compiled: ctypes.CDLL, dtype: torch.dtype, bits: int, width: int, group: int
) -> None:
    torch.manual_seed(bits)
    heads, room, held = 3, 9, 7
    tail = torch.randn(heads * room, width).to(dtype)
    before = tail.view(heads, room, width).clone()
    made = quantise_rows(before[:, :1], bits, group, "token")
    parts = [torch.zeros(heads * 5, x.shape[1], dtype=x.dtype) for x in made]
    stretches = [Stretch(x, 5, 2) for x in parts]
    assert leave(Stretch(tail, room, held), *stretches, bits, group, compiled)
    for part, wanted in zip(parts, made, strict=True):
        assert torch.equal(part.view(heads, 5, -1)[:, 2], wanted)
    assert torch.equal(tail.view(heads, room, width)[:, : held - 1], before[:, 1:held])
    tail[0, 0] = torch.inf
    assert not leave(Stretch(tail, room, held), *stretches, bits, group, compiled)
