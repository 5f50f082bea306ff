"""Methods that refine the scores of any other: ChunkKV and CriticalKV, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kv.support import TOKENS, model_of, trace_of
from workbench.errors import BadRecipe
from workbench.kv import AdaKV, ChunkKV, CriticalKV, Decoding, KeyDiff, Knorm
from workbench.kv.methods.evict.chunkkv import by_chunks
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace


def chunks_plainly(scores: Tensor, chunk: int, room: int) -> list[int]:
    """The positions that all heads of a layer of scores [k, n] keep."""
    tokens = scores.shape[1]
    starts = sorted(range(0, tokens, chunk), key=lambda s: -float(scores[:, s : s + chunk].sum(dim=0).mean()))
    kept: list[int] = []
    for start in starts:
        inside = list(range(start, min(start + chunk, tokens)))
        kept += inside[max(len(inside) - (room - len(kept)), 0) :]
        if len(kept) == room:
            return sorted(kept)
    return sorted(kept)


@pytest.mark.parametrize(("chunk", "room"), [(1, 17), (4, 24), (7, 30), (7, 1), (TOKENS, 9)])
def test_whole_chunks_stay_the_best_first_whoever_scores(chunk: int, room: int) -> None:
    trace = trace_of()
    plan = make_plan(trace, [Knorm(budget=f"{room} tokens"), ChunkKV(chunk=chunk)], torch.float32)
    for layer in trace.layers:
        scores = Knorm().score(layer)
        for head in range(layer.kv_heads):
            assert plan.kept(layer.index, head).tolist() == chunks_plainly(scores, chunk, room)


def test_a_chunk_with_what_must_stay_stays() -> None:
    scores = torch.rand(1, 2, 10)
    scores[..., -1] = torch.inf
    assert by_chunks(scores, 4)[0, :, -2:].isinf().all() and by_chunks(scores, 4)[0, :, :8].isfinite().all()


def written_plainly(layer: LayerTrace, weight: Tensor) -> Tensor:
    """L1 norms [k, n] of what single values write, by products with the whole projection."""
    norms = torch.zeros(layer.kv_heads, layer.tokens)
    width = layer.values.shape[-1]
    for head in range(layer.heads):
        for token in range(layer.tokens):
            alone = torch.zeros(layer.heads * width)
            alone[head * width : (head + 1) * width] = layer.values[head // layer.groups, token]
            norms[head // layer.groups, token] += (weight @ alone).abs().sum() / layer.groups
    return norms


@pytest.mark.parametrize("architecture", ["llama", "mha", "phi3"])
def test_the_first_half_goes_by_scores_and_the_rest_by_what_values_write(architecture: str) -> None:
    trace = trace_of(architecture)
    model, room = model_of(trace), 20
    plan = make_plan(trace, [KeyDiff(budget=f"{room} tokens"), CriticalKV(epsilon=0.5)], torch.float32, model=model)
    for layer, block in zip(trace.layers, model.get_decoder().layers, strict=True):
        weight = block.self_attn.o_proj.weight
        scores, norms = KeyDiff().score(layer), written_plainly(layer, weight.detach().float())
        for head in range(layer.kv_heads):
            first = scores[head].topk(room // 2).indices.tolist()
            order = ((scores[head] + 0.5) * norms[head]).argsort(descending=True).tolist()
            rest = [token for token in order if token not in first][: room - len(first)]
            assert plan.kept(layer.index, head).tolist() == sorted(first + rest)


def test_an_allocator_divides_by_refined_scores() -> None:
    trace = trace_of()
    alone, refined = (
        make_plan(trace, [Knorm(budget=0.4), AdaKV(), *more], torch.float32) for more in ([], [ChunkKV(chunk=4)])
    )
    assert all(0.35 < plan.share <= 0.4 for plan in (alone, refined))
    lengths = [[len(plan.kept(0, head)) for head in range(trace.layers[0].kv_heads)] for plan in (alone, refined)]
    assert len(set(lengths[1])) == 1  # chunks are worth the same to every head
    assert len(set(lengths[0])) > 1


def test_what_cannot_be_refined_is_refused() -> None:
    trace = trace_of()
    with pytest.raises(BadRecipe, match="each supply the stage 'refine'"):
        make_plan(trace, [ChunkKV(), CriticalKV()], torch.float32)
    with pytest.raises(BadRecipe, match="chunkkv refines scores of the whole prompt"):
        make_plan(trace, [Knorm(budget=0.5), Decoding(), ChunkKV()], torch.float32)
