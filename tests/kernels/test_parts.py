"""What stores attend with that hold their entries in several parts, by kernels and by their references."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import interpreted
from tests.kernels.test_decode import KIND, error, random_rows, rows_of
from tests.kernels.test_decode_frozen import by_channel, heads_of
from workbench.kv.stores.delta import deltas
from workbench_kernels.decode import decode_dense
from workbench_kernels.deltas import decode_deltas
from workbench_kernels.lowered import lowered_query
from workbench_kernels.projected import project_newest
from workbench_kernels.received import add_received
from workbench_kernels.rotary import Turns, rotate
from workbench_kernels.rows import DeltaRows, Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state, merge_states
from workbench_kernels.symmetric import round_newest, smoothed_query

pytestmark = interpreted


def queries(heads: int, count: int, width: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(heads, count, width, generator=torch.Generator().manual_seed(seed)).to(KIND)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_states_are_merged_in_one_launch(parts: int) -> None:
    from workbench_kernels.gpu.merge import merge_states as kernel

    keys, values = torch.randn(2, 40, 24), torch.randn(2, 40, 24)
    query = queries(6, 3, 24)
    states = [
        attention_state(query, keys[:, at], values[:, at], torch.ones(1, 1, len(at), dtype=torch.bool), Scoring(0.2))
        for at in torch.arange(40).split([1, 7, 20, 12])[:parts]
    ]
    states[1] = torch.zeros_like(states[1][0]), torch.full_like(states[1][1], -torch.inf)  # a part that holds nothing
    wanted = merge_states.reference([(out.double(), sums.double()) for out, sums in states])
    assert error(kernel(states), wanted) < 1e-3


def test_rows_of_sizes_of_their_own() -> None:
    from workbench_kernels.gpu.dense import Config
    from workbench_kernels.gpu.dense import decode_dense as kernel

    keys, values = random_rows([70, 33], 40), random_rows([70, 33], 24, seed=1)
    made = torch.Generator().manual_seed(2)
    of_keys, of_values = (rows_of([torch.rand(n, 1, generator=made).add(0.5) for n in (70, 33)]) for _ in range(2))
    of_keys.data[[3, 40, 71]] = torch.inf  # not seen
    query = queries(8, 1, 40)
    out, lse = kernel(
        query, keys, values, Scoring(0.2), sizes=(of_keys, of_values), lse=True, config=Config(2, 16, 2, 1)
    )
    wanted, sums = decode_dense.reference(
        query.double(), keys, values, Scoring(0.2), sizes=(of_keys, of_values), lse=True
    )
    plain = [x.data.double() * size.data for x, size in ((keys, of_keys), (values, of_values))]
    seen = torch.arange(70) < torch.tensor([70, 33])[:, None]
    seen[0, [3, 40]] = seen[1, 1] = False
    rows = [torch.stack([x[:70], torch.cat([x[70:103], x[:37]])]).nan_to_num(posinf=0) for x in plain]
    by_hand, _ = attention_state(query.double(), rows[0], rows[1], seen[:, None], Scoring(0.2))
    assert error(wanted, by_hand) < 1e-5
    assert error(out, wanted) < 1e-3
    torch.testing.assert_close(lse.double(), sums, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [1, 4])
def test_scores_of_a_stretch_fall(bits: int) -> None:
    from workbench_kernels.gpu.lowered import lowered_query as kernel

    keys, query = by_channel(heads_of([150, 0, 33], 40, 0), bits), queries(12, 2, 40)
    found, raised = kernel(query, keys, Scoring(0.6), 3.0)
    wanted, by = lowered_query.reference(query.float(), keys, Scoring(0.6), 3.0)
    assert error(found, wanted.double()) < 2e-3
    torch.testing.assert_close(raised, by, atol=2e-3, rtol=2e-3)
    key, real = keys.padded()
    scores = torch.einsum("kgqd,kmd->kgqm", query.float().unflatten(0, (3, 4)), key) * 0.6
    fallen = torch.einsum("kgqd,kmd->kgqm", wanted.unflatten(0, (3, 4)), key) * 0.6 + by.view(3, 4, 2, 1)
    for head in (0, 2):
        before, after = (x[head, ..., real[head]] for x in (scores, fallen))
        torch.testing.assert_close(
            after.amax(-1), torch.maximum(before.amax(-1) - 3, before.amin(-1)), atol=1e-3, rtol=0
        )
        torch.testing.assert_close(after.amin(-1), before.amin(-1), atol=1e-3, rtol=0)
    assert (raised.view(3, -1)[1] == 0).all()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_attention_received_is_added(softcap: float | None) -> None:
    from workbench_kernels.gpu.received import add_received as kernel

    keys, query, scoring = random_rows([70, 0, 33], 24), queries(18, 3, 24), Scoring(0.4, softcap=softcap)
    lse = torch.randn(18, 3) + 5
    before = rows_of([torch.rand(n, 1) for n in (70, 0, 33)])
    into = [Ragged(before.data.clone(), before.starts, before.lengths, before.longest) for _ in range(2)]
    kernel(query, keys, lse, into[0], scoring)
    add_received.reference(query, keys, lse, into[1], scoring)
    torch.testing.assert_close(into[0].data, into[1].data, atol=1e-3, rtol=1e-3)
    assert (into[0].data[:103] > before.data[:103]).all()
    assert torch.equal(into[0].data[103:], before.data[103:])


@pytest.mark.parametrize(("width", "turned"), [(40, 40), (40, 24), (64, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_newest_row_is_what_spaces_hold_of_it(width: int, turned: int, interleaved: bool) -> None:
    from workbench_kernels.gpu.projected import project_newest as kernel

    made = torch.Generator().manual_seed(0)
    bases = [
        torch.linalg.qr(torch.randn(3, wide, wide, generator=made)).Q[:, :rank] for wide, rank in ((width, 21), (24, 9))
    ]
    bases = [(basis * torch.rand(*basis.shape[:2], 1, generator=made).add(0.5)).to(KIND) for basis in bases]
    lengths = [5, 1, 9]
    keys, values = random_rows(lengths, width), random_rows(lengths, 24, seed=1)
    order = torch.arange(turned).view(-1, 2).T.flatten() if interleaved else torch.arange(turned)
    order = torch.cat([order, torch.arange(turned, width)])

    def unhalved(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).index_copy_(-1, order, x)

    angle = torch.arange(4, 16)[:, None] * 0.7 ** torch.arange(turned // 2).repeat(2)
    cos, sin = 1.2 * angle.cos(), 1.2 * angle.sin()  # YaRN's factor
    turns = Turns.of(cos, sin, width, unhalved) if turned else None
    x = torch.randn(2, width, generator=made)
    if turns is not None:
        wanted = unhalved(rotate(x[:, order], cos[3:4], sin[3:4]))
        torch.testing.assert_close(turns(x, torch.tensor([3])), wanted)
        torch.testing.assert_close(turns(wanted, torch.tensor([3]), back=True), x)
    first = torch.tensor([2], dtype=torch.int32)
    found, wanted = ([torch.zeros_like(rows.data) for rows in (keys, values)] for _ in range(2))
    kernel(keys, values, *bases, turns, first, *found)
    project_newest.reference(keys, values, *bases, turns, first, *wanted)
    last = (keys.starts + keys.lengths - 1).long()
    for one, other, before in zip(found, wanted, (keys, values), strict=True):
        torch.testing.assert_close(one, other, atol=4e-3, rtol=4e-3)
        assert (one[last].abs().sum(1) > 0).all() and one.count_nonzero() == one[last].count_nonzero()
        assert not torch.allclose(one[last], before.data[last], atol=0.1)


@pytest.mark.parametrize(("bits", "scales"), [(4, torch.float8_e4m3fn), (4, torch.bfloat16), (8, torch.bfloat16)])
@pytest.mark.parametrize("group", [16, 128])
def test_the_newest_row_is_rounded_as_the_others_were(bits: int, scales: torch.dtype, group: int) -> None:
    from workbench_kernels.gpu.symmetric import round_newest as kernel

    made = torch.Generator().manual_seed(0)
    keys, values = random_rows([5, 1, 9], 40), random_rows([5, 1, 9], 24, seed=1)
    keys.data[5] = 0
    factors = [torch.rand(3, wide, generator=made).add(0.5).half() for wide in (40, 1)]
    found, wanted = ([torch.zeros_like(rows.data) for rows in (keys, values)] for _ in range(2))
    kernel(keys, values, *factors, bits, group, scales, *found)
    round_newest.reference(keys, values, *factors, bits, group, scales, *wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert found[0][:5].count_nonzero() > 20 and found[1][:5].count_nonzero() > 10 and not found[0][5].any()


@pytest.mark.parametrize("fp8", [False, True])
def test_queries_are_smoothed_as_keys_were(fp8: bool) -> None:
    from workbench_kernels.gpu.symmetric import smoothed_query as kernel

    query = queries(6, 2, 40) * torch.logspace(-3, 1, 40).half()
    query[2] = 0
    factors = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)).add(0.5).half()
    wanted = smoothed_query.reference(query, factors, fp8)
    torch.testing.assert_close(kernel(query, factors, fp8), wanted, atol=0, rtol=2e-3)
    assert (torch.equal(wanted, smoothed_query.reference(query, factors, not fp8))) is False


@pytest.mark.parametrize(("width", "value_width", "group", "whole"), [(24, 24, 16, False), (40, 16, 32, True)])
def test_deltas_are_restored_where_they_lie(width: int, value_width: int, group: int, whole: bool) -> None:
    from workbench_kernels.gpu.deltas import decode_deltas as kernel

    def held(wide: int, seed: int) -> DeltaRows:
        parts = [
            deltas(torch.randn(n, group, wide, generator=torch.Generator().manual_seed(seed + n)).to(KIND), 7 * wide)
            for n in (5, 0, 40)
        ]
        return DeltaRows(*(rows_of([one[which] for one in parts]) for which in (0, 1)), wide, group)

    keys, query = held(width, 0), queries(12, 1, width)
    values = random_rows([5 * group + 3, 4, 40 * group], value_width) if whole else held(value_width, 1)
    for scoring in (Scoring(0.3), Scoring(0.3, softcap=2.0, sinks=torch.randn(12))):
        out, lse = kernel(query, keys, values, scoring)
        wanted, sums = decode_deltas.reference(query.double(), keys, values, scoring)
        assert error(out, wanted) < 2e-3
        torch.testing.assert_close(lse.double(), sums, atol=2e-3, rtol=0)
