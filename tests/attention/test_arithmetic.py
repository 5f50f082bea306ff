"""L-Mul's products by addition, and Lean attention's equal shares of decode work."""

from __future__ import annotations

import math

import pytest
import torch

import workbench as wb
from tests.attention.support import sharp
from workbench.attention import Lean, LMul
from workbench.attention.base import PassContext, visible_entries
from workbench.attention.methods.l_mul import dots, l_mul, number_bits, offset_bits
from workbench.attention.methods.lean import schedule
from workbench.core.causal_attention import causal_attention
from workbench.errors import BadParameter
from workbench.examples import needle
from workbench.kv.stores import Dequantised
from workbench.measure.memory import LiveBytes
from workbench.models import tiny
from workbench_kernels import Scoring

IDS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(0))


# --- L-Mul


def by_mantissas(x: float, y: float, bits: int) -> float:
    """The paper's product of two numbers, of which mantissas are rounded to so many bits; carries go on."""

    def apart(number: float) -> tuple[float, float, int]:
        fraction, exponent = math.frexp(abs(number))
        rounded = math.floor((2 * fraction - 1) * 2**bits + 0.5) / 2**bits
        return math.copysign(1, number), rounded % 1, exponent - 1 + int(rounded)

    (sign, a, e), (other, b, f) = apart(x), apart(y)
    total = a + b + 2.0 ** -offset_bits(bits)
    carry = int(total)  # 1 + total below the carry; a carry doubles and leaves its rest as mantissa
    return sign * other * 2.0 ** (e + f + carry) * (1 + total - carry)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 23])
def test_an_addition_gives_what_the_formula_says(bits: int) -> None:
    x, y = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1e4]])
    got = l_mul(number_bits(x, bits), number_bits(y, bits), bits)
    want = torch.tensor([by_mantissas(float(a), float(b), bits) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_the_offset_is_the_papers() -> None:
    assert [offset_bits(m) for m in (1, 2, 3, 4, 5, 7, 10, 23)] == [1, 2, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("bits", [3, 4, 7, 23])
def test_products_are_near_the_true_ones_and_nearly_unbiased(bits: int) -> None:
    x, y = torch.rand(2, 20_000, generator=torch.Generator().manual_seed(1)) + 1
    error = l_mul(number_bits(x, bits), number_bits(y, bits), bits) / (x * y) - 1
    assert error.abs().max() < 0.25 and abs(float(error.mean())) < 0.05
    plain = (number_bits(x, bits) + number_bits(y, bits) - 0x3F800000).view(torch.float32) / (x * y) - 1
    assert plain.max() <= 0.15 and float(plain.mean()) < -0.03  # without 2^-l products come out too small
    assert abs(float(error.mean())) < abs(float(plain.mean())) or bits in (3, 4)  # l = 3 is a little too much


def test_numbers_without_size_stay_harmless() -> None:
    x = torch.tensor([0.0, -0.0, 1e-38, -1e-44, 1.0, 3e38])
    products = l_mul(number_bits(x, 7)[:, None], number_bits(x[:5], 7), 7)
    assert products.isfinite().all()
    assert products[:4, :5].abs().max() < 1e-18


@pytest.mark.parametrize("limit", [1, 40, 10**6])
def test_sums_are_the_same_however_they_are_cut(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = number_bits(torch.randn(2, 7, 9), 7), number_bits(torch.randn(2, 5, 9), 7)
    want = l_mul(x[:, :, None], y[:, None], 7).sum(-1)
    monkeypatch.setattr("workbench.attention.methods.l_mul._AT_ONCE", limit)
    torch.testing.assert_close(dots(x, y, 7), want)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_both_products_of_attention_are_made_by_addition(window: int | None, softcap: float | None) -> None:
    query, key, value = sharp(41)
    context = PassContext(1, 41)
    got = LMul(mantissa=4).attend(query, key, value, Scoring(0.4, window, softcap), context)
    want = torch.zeros_like(got)
    for h in range(4):
        for i in range(41):
            first = 0 if window is None else max(0, i - window + 1)
            scores = l_mul(number_bits(query[h, i] * 0.4, 4), number_bits(key[h // 2, first : i + 1], 4), 4).sum(-1)
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            weights = number_bits(scores.softmax(0), 4)
            want[h, i] = l_mul(weights[:, None], number_bits(value[h // 2, first : i + 1], 4), 4).sum(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert context.computed == [4 * visible_entries(41, window)]


def test_decoding_multiplies_by_addition_too() -> None:
    query, key, value = sharp(20)
    whole = LMul().attend(query, key, value, Scoring(0.4), PassContext(1, 20))
    held = Dequantised(key, value, torch.arange(20)[None], None)
    seen = (torch.arange(20) <= torch.arange(17, 20)[:, None]).expand(2, 3, 20)
    got = LMul().decode(query[:, 17:], held, seen, Scoring(0.4), PassContext(1, 0))
    torch.testing.assert_close(got, whole[:, 17:], rtol=1e-4, atol=1e-5)


def test_emulation_takes_bounded_memory() -> None:
    query, key, value = sharp(2048, heads=2, kv_heads=1)
    with LiveBytes() as live:
        LMul().attend(query, key, value, Scoring(0.4), PassContext(1, 2048))
    assert live.peak < 2 * 2048 * 2048 * 4 / 4  # a quarter of the scores, of which each is a sum of eight products


@pytest.mark.parametrize("method", [LMul, Lean])
def test_what_computes_all_scores_takes_no_budget(method: type[LMul | Lean]) -> None:
    with pytest.raises(BadParameter, match="takes no budget"):
        method(budget=0.5)


def test_the_default_model_hardly_notices(default_session: wb.Session) -> None:
    default_session.read(needle(200).text)
    full = default_session.plan("full").trace.logits.log_softmax(-1)

    def distance(bits: int) -> float:
        got = default_session.plan(LMul(mantissa=bits)).trace.logits.log_softmax(-1)
        return float((full.exp() * (full - got)).sum())

    assert distance(7) < 0.05
    assert distance(2) > distance(7)


# --- Lean attention


@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (3, 100), (8, 1000), (2, 257)])
@pytest.mark.parametrize("tile", [1, 16, 256])
@pytest.mark.parametrize("workers", [1, 3, 7, 64])
def test_all_workers_have_equal_work_and_all_work_is_done_once(
    heads: int, tokens: int, tile: int, workers: int
) -> None:
    runs = schedule(heads, tokens, tile, workers)
    tiles = [sum(-(-(stop - start) // tile) for _, start, stop in run) for run in runs]
    assert len(runs) <= workers and max(tiles) - min(tiles) <= 1 and min(tiles) >= 1
    done = torch.zeros(heads, tokens, dtype=torch.int)
    for run in runs:
        for head, start, stop in run:
            assert start % tile == 0
            done[head, start:stop] += 1
    assert bool((done == 1).all())


@pytest.mark.parametrize("workers", [1, 5, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("new", [1, 3])
def test_parts_join_to_exact_attention(workers: int, softcap: float | None, new: int) -> None:
    query, key, value = sharp(150)
    want = causal_attention(query, key, value, Scoring(0.4, softcap=softcap))[:, -new:]
    held = Dequantised(key, value, torch.arange(150)[None], None)
    seen = (torch.arange(150) <= torch.arange(150 - new, 150)[:, None]).expand(2, new, 150)
    got = Lean(workers=workers, tile=16).decode(
        query[:, -new:], held, seen, Scoring(0.4, softcap=softcap), PassContext(1, 0)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_head_whose_first_tiles_are_hidden_loses_nothing() -> None:
    query, key, value = sharp(64)
    seen = torch.zeros(2, 1, 64, dtype=torch.bool)
    seen[0, 0, 40:], seen[1, 0, :3] = True, True
    held = Dequantised(key, value, torch.arange(64)[None], None)
    got = Lean(workers=4, tile=8).decode(query[:, -1:], held, seen, Scoring(0.4), PassContext(1, 0))
    for h in range(4):
        scores = (key[h // 2] @ query[h, -1] * 0.4).masked_fill(~seen[h // 2, 0], -torch.inf)
        torch.testing.assert_close(got[h, 0], scores.softmax(0) @ value[h // 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [["lean-attention"], ["snapkv", "lean-attention"]])
def test_answers_are_those_of_plain_attention(recipe: list[str]) -> None:
    session = wb.Session((tiny("llama"), None), kv_dtype="float32")
    session.read(IDS)
    made = {"lean-attention": Lean(tile=16, workers=5), "snapkv": wb.kv.SnapKV(budget=0.5, window=8)}
    run = session.run([made[key] for key in recipe], question=IDS[:4], max_new_tokens=8)
    plain = session.run([made[key] for key in recipe[:-1]] or "full", question=IDS[:4], max_new_tokens=8)
    assert run.tokens == plain.tokens
