"""A2ATS: keys without positions in a codebook that queries shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, reading
from workbench import testing
from workbench.kv import A2ATS, AdaKV, SnapKV
from workbench.kv.stores.codebook import Codebook, k_means, query_factor
from workbench.kv.stores.offload import OffloadStore
from workbench.models import tiny
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.trace import LayerTrace


def turning(layer: LayerTrace, at: int) -> Tensor:
    """The matrix [d, d] with which this layer's rotary embedding rotates a vector to a position."""
    cos, sin = (x[0].double() for x in layer.rotation(torch.tensor([at])))
    width, half = len(cos), len(cos) // 2
    matrix = torch.eye(layer.keys.shape[2], dtype=torch.float64)
    matrix[:width, :width] = torch.diag(cos)
    for channel in range(half):
        matrix[channel, channel + half] = -sin[channel]
        matrix[channel + half, channel] = sin[channel + half]
    return matrix


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_scores_are_those_at_a_fixed_distance_of_the_codebooks_keys(architecture: str) -> None:
    layer, distance = reading(architecture).trace.layers[1], 37
    book = Codebook.of(layer, 8, distance)
    codes = book.encode(layer.keys, torch.arange(layer.tokens))
    positions = torch.tensor([60, 69])
    got = book.scores(layer.queries[:, positions], positions)
    there, groups = turning(layer, distance), layer.groups
    for head in range(layer.kv_heads):
        plain = [torch.linalg.solve(turning(layer, at), layer.keys[head, at].double()) for at in range(layer.tokens)]
        seen = []
        for member in range(head * groups, (head + 1) * groups):
            raw = [torch.linalg.solve(turning(layer, at), layer.queries[member, at].double()) for at in range(70)]
            seen += [there @ x for x in raw]
            for row, at in enumerate(positions.tolist()):
                want = torch.stack([there @ raw[at] @ entry.double() for entry in book.entries[head]])
                found = got[head, (member - head * groups) * 2 + row].double()
                assert torch.allclose(found, want, atol=1e-4 * float(want.abs().max()))
        moment = sum(torch.outer(x, x) for x in seen)
        for at in range(layer.tokens):  # the nearest entry in the metric of H
            gaps = [plain[at] - entry.double() for entry in book.entries[head]]
            errors = torch.stack([gap @ moment @ gap for gap in gaps])
            assert float(errors[int(codes[head, at])]) <= float(errors.min()) * (1 + 1e-3) + 1e-9


def test_the_factor_gives_the_second_moment_of_queries() -> None:
    queries = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    factor = query_factor(queries)
    moment = queries.transpose(1, 2) @ queries
    moment = moment / moment.square().mean(dim=(1, 2), keepdim=True).sqrt()
    assert torch.allclose(factor @ factor.transpose(1, 2), moment, atol=1e-4)
    assert bool(query_factor(torch.zeros(1, 3, 4)).isfinite().all())


def test_query_awareness_spends_codes_where_queries_look() -> None:
    # Query-aware against plain quantisation: keys vary most where no query looks.
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0] * 4 + [8.0] * 4)
    keys, queries = torch.randn(1, 600, 8, generator=draw) * spread, torch.randn(1, 300, 8, generator=draw) / spread**2

    def error(factor: Tensor) -> float:
        centres = k_means(keys @ factor, 32)
        coded = torch.cdist(keys @ factor, centres).argmin(dim=2)
        entries = torch.linalg.solve_triangular(factor, centres, upper=False, left=False)
        rounded = entries.gather(1, coded[..., None].expand(-1, -1, 8))
        return float((queries @ (rounded - keys).transpose(1, 2)).square().mean())

    assert error(query_factor(queries)) < 0.6 * error(torch.eye(8)[None])


def test_k_means_lowers_the_error_repeats_itself_and_leaves_no_centre_idle() -> None:
    x = torch.randn(3, 200, 5, generator=torch.Generator().manual_seed(0))
    x[:, :150] = x[:, :1]  # most vectors are the same, so that random centres coincide
    centres = k_means(x, 20)
    assert torch.equal(centres, k_means(x, 20))
    apart = torch.cdist(x, centres)
    first = x[:, torch.randperm(200, generator=torch.Generator().manual_seed(0))[:20]]
    assert float(apart.amin(dim=2).square().mean()) < 0.7 * float(torch.cdist(x, first).amin(dim=2).square().mean())


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
@pytest.mark.parametrize("recipe", [[], [SnapKV(window=8)], [SnapKV(window=8), AdaKV(window=8)]])
def test_fetching_everything_is_exact(architecture: str, recipe: list[wb.Method]) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:9], max_new_tokens=40)
    run = session.run([*recipe, A2ATS(budget=0.7, fetch=1.0)], question=ids[:9], max_new_tokens=40)
    assert run.plan.host_nbytes > 0 and run.tokens == full.tokens and run.quality.kl < 1e-8


def test_each_query_head_fetches_what_its_estimates_put_first() -> None:
    found = testing.fresh_reading()
    plan = make_plan(found.trace, [A2ATS(budget=0.6, fetch=0.1)], torch.float32)
    for layer in found.trace.layers:
        store = plan.store(layer)
        assert isinstance(store, OffloadStore)
        book = Codebook.of(layer, 8, 2048)
        held = store.far.positions.view()[..., 0].long()
        positions = torch.tensor([68, 69])
        slots, counts = store.retriever.find_at(layer.queries[:, positions], positions, layer.scale)
        table, codes = book.scores(layer.queries[:, positions], positions), book.encode(layer.keys, torch.arange(70))
        for head in range(layer.kv_heads):
            for one in range(2):
                got = slots[head, one][counts[head, one]].tolist()
                assert len(got) == len(set(got))
                rest = set(range(held.shape[1])) - set(got)
                for member in range(layer.groups):
                    scores = table[head, member * 2 + one][codes[head, held[head]].long()]
                    last = float(scores.sort(descending=True).values[6])  # a tenth of 70 tokens
                    assert all(float(scores[slot]) <= last for slot in rest)
                assert 7 <= len(got) <= 7 * layer.groups


def test_entries_that_move_to_host_memory_while_decoding_get_codes() -> None:
    found = testing.fresh_reading()
    layer = found.trace.layers[0]
    store = make_plan(found.trace, [A2ATS(budget=0.6)], torch.float32).store(layer)
    assert isinstance(store, OffloadStore)
    far, draw = store.far.longest, torch.Generator().manual_seed(0)
    for step in range(60):
        k = torch.randn(layer.kv_heads, 1, layer.keys.shape[2], generator=draw)
        store.append(k, k, torch.tensor([70 + step]))
    codes = store.retriever.codes  # type: ignore[attr-defined]
    assert codes.longest == store.far.longest > far + 20
    book, positions = Codebook.of(layer, 8, 2048), store.far.positions.view()[..., 0].long()
    assert torch.equal(codes.view()[..., 0], book.encode(store.far.keys.view(), positions))
