"""The maps and figures of attention methods are those of what they compute, entry by entry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import reading
from workbench.attention import BlockSparse, MemoryEfficient, StreamingWindow, UniAttn
from workbench.attention.base import AttentionMethod, PassContext
from workbench.attention.quantised_softmax import QuantisedSoftmax
from workbench.core.causal_attention import causal_attention
from workbench.errors import BadRecipe, Cancelled
from workbench.inspection.captured import as_read, changes_reading
from workbench.inspection.implied import Implied
from workbench.measure import LiveBytes
from workbench.measure.attention import PooledMap
from workbench.progress import Progress
from workbench.registry import registered
from workbench.runtime.prefill import read
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

METHODS = [cls.key for cls in registered("attention")]
POOLINGS = ("max", "sum", "mean")


def made(key: str) -> AttentionMethod:
    method = wb.method(key)
    assert isinstance(method, AttentionMethod)
    return method.with_budget(0.67) if key == "uniattn" else method  # two of three layers compute their own weights


def under(method: AttentionMethod, architecture: str = "llama") -> Trace:
    """A reading of 70 tokens under the method."""
    found = reading(architecture)
    return read(found.model, wb.models.facts(found.model), found.trace.prompt, method=method)


def outputs(method: AttentionMethod, trace: Trace) -> list[Tensor]:
    """What the method's attention gave at each layer of a reading, all in one pass."""
    context, found = PassContext(len(trace.layers), trace.tokens), []
    for layer in trace.layers:
        context.layer = layer.index
        found.append(method.attend(layer.queries, layer.keys, layer.values, layer.scoring, context))
    return found


def matrix(method: AttentionMethod, trace: Trace, layer: int) -> Tensor:
    """All weights of a layer, [h, n, n]."""
    maps = as_read(method, trace.layers, layer).maps(pixels=trace.tokens, pooling="sum")
    return torch.stack([each.values for each in maps])


def drawn(tokens: int, window: int | None = None) -> LayerTrace:
    """A layer of random numbers, two query heads on one KV head."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(heads, tokens, 8, generator=generator) for heads in (2, 1, 1))
    return LayerTrace(0, key, value, query, torch.device("cpu"), Scoring(8**-0.5, window))


# -- the weights


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("key", METHODS)
def test_the_weights_times_the_values_are_what_comes_out(key: str, architecture: str) -> None:
    method = made(key)
    trace = under(method, architecture)
    for layer, out in zip(trace.layers, outputs(method, trace), strict=True):
        weights = matrix(method, trace, layer.index)
        values = layer.values.repeat_interleave(layer.groups, dim=0)
        if key != "l-mul":  # which adds in place of multiplying
            torch.testing.assert_close(weights @ values, out, rtol=1e-3, atol=1e-4)
        if key != "l-mul" and not isinstance(method, QuantisedSoftmax):  # whose weights are near what sums to 1
            sums = weights.sum(-1)
            if method.goes_by_earlier:  # a query that has left sees nothing
                sums = torch.where(sums == 0, 1.0, sums)
            torch.testing.assert_close(sums, torch.ones(weights.shape[:2]), rtol=0, atol=1e-5)
        assert bool((weights.triu(1).abs() < 1e-12).all())  # nothing of what comes later


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooled_and_zoomed_maps_are_pools_and_parts_of_the_whole(pooling: str) -> None:
    method = BlockSparse(budget=0.4)
    trace = under(method)
    seen, whole = as_read(method, trace.layers, 1, 2), matrix(method, trace, 1)[2]
    assert isinstance(seen, Implied)
    pool = {"max": torch.amax, "sum": torch.sum, "mean": torch.mean}[pooling]
    for pixels, span in ((7, (0, 70)), (5, (15, 65))):
        (small,) = seen.maps(pixels=pixels, pooling=pooling, rows=span, cols=span)  # type: ignore[arg-type]
        part = whole[slice(*span), slice(*span)].unflatten(0, (pixels, 10)).unflatten(2, (pixels, 10))
        torch.testing.assert_close(small.values, pool(part, dim=(1, 3)), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    (part,) = seen.maps(pixels=70, pooling=pooling, rows=(20, 50), cols=(10, 40))  # type: ignore[arg-type]
    torch.testing.assert_close(part.values, whole[20:50, 10:40], rtol=0, atol=1e-6)


def test_what_a_sparse_method_leaves_out_is_empty() -> None:
    layer = reading().trace.layers[1]
    (window,) = Implied(StreamingWindow(budget=0.3), layer, 3, 0).maps(pixels=70)
    (exact,) = Implied(MemoryEfficient(), layer, 3, 0).maps(pixels=70)
    assert int((window.values > 0).sum()) < 0.4 * int((exact.values > 0).sum())


def test_blocks_of_columns_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    method, ids = BlockSparse(budget=0.5, probe=8), torch.arange(150) % 11
    seen = Implied(method, drawn(150), 1)
    once, stats = seen.survey(ids, pixels=9)
    received = seen.received()
    monkeypatch.setattr("workbench.inspection.implied.BLOCK_BYTES", 4 * 2 * 150 * 13)  # 13 columns
    again, more = seen.survey(ids, pixels=9)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-6)
    same(stats, more)
    torch.testing.assert_close(seen.received(), received, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["block-sparse", "streaming-window", "cca", "deltallm-attention"])
def test_a_long_prompts_weights_never_exist_as_a_whole(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 1500
    monkeypatch.setattr("workbench.inspection.implied.BLOCK_BYTES", 2**20)
    seen = Implied(made(key).with_budget(0.3), drawn(tokens), 1)
    with LiveBytes() as live:
        seen.survey(torch.zeros(tokens, dtype=torch.long), pixels=16)
    assert live.peak < 0.8 * 4 * 2 * tokens * tokens


def test_values_of_another_size_than_the_keys_take_no_whole_matrix_either() -> None:
    query, key = torch.randn(2, 2, 2000, 16)
    value = torch.randn(2, 2000, 40)
    with LiveBytes() as live:
        got = causal_attention(query, key, value, Scoring(0.25))
    assert live.peak < 0.5 * 4 * 2 * 2000 * 2000
    parts = [causal_attention(query, key, some, Scoring(0.25)) for some in value.split([16, 16, 8], dim=-1)]
    torch.testing.assert_close(got, torch.cat(parts, dim=-1), rtol=1e-4, atol=1e-5)


# -- the figures


def same(one: object, other: object) -> None:
    for name, each in vars(one).items():
        torch.testing.assert_close(each, getattr(other, name), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("key", METHODS)
def test_figures_are_those_of_the_whole_matrix(key: str) -> None:
    method = made(key)
    trace = under(method)
    for layer in trace.layers:
        seen, weights = as_read(method, trace.layers, layer.index), matrix(method, trace, layer.index).double()
        torch.testing.assert_close(seen.received(), weights.sum(1).float(), rtol=1e-4, atol=1e-5)
        stats = seen.judge(trace.ids)
        position = torch.arange(trace.tokens)
        distance = (position[:, None] - position).double()
        follows = (trace.ids[:, None] == trace.ids.roll(1)) & (position > 0) & (distance > 0)
        retrieving = follows.any(dim=1)
        want = {
            "entropy": torch.special.entr(weights).sum(-1).mean(-1),
            "sink": weights[:, 4:, :4].sum(-1).mean(-1),
            "local": (weights[:, 31:] * (distance[31:] < 32)).sum(-1).mean(-1),
            "retrieval": (weights * follows)[:, retrieving].sum(-1).mean(-1),
            "distance": (weights * distance).sum(-1).mean(-1),
            "variance": weights[:, probed(trace.tokens)].var(dim=1, unbiased=False).sum(-1),
        }
        for name, figure in want.items():
            torch.testing.assert_close(getattr(stats, name), figure.float(), rtol=1e-3, atol=1e-4, msg=name)
        bins = [(weights * ((distance >= low) & (distance < high))).sum((1, 2)) / 70 for low, high in stats.bins]
        torch.testing.assert_close(stats.profile, torch.stack(bins, dim=1).float(), rtol=1e-3, atol=1e-5)


def probed(tokens: int) -> Tensor:
    return torch.linspace(tokens // 2, tokens - 1, 32).round().long()


def test_weights_of_exact_attention_give_the_figures_of_exact_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (300,), generator=generator)
    for window in (None, 90):
        layer = drawn(300, window)
        own = as_read(wb.method("lean-attention"), [layer], 0)  # type: ignore[arg-type]
        found = Implied(MemoryEfficient(), layer, 1)
        same(found.judge(ids), own.judge(ids))
        torch.testing.assert_close(found.received(), own.received(), rtol=1e-4, atol=1e-5)


# -- layers that reuse the weights of another


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_layer_that_reuses_weights_shows_those_it_takes(architecture: str) -> None:
    method = UniAttn(budget=0.34)
    trace = under(method, architecture)
    layers = len(trace.layers)
    taking = [layer for layer in range(layers) if method.source_layer(layer, layers) != layer]
    assert taking
    for layer in taking:
        source = trace.layers[method.source_layer(layer, layers)]
        taken = matrix(method, trace, layer)
        own = replace(source, scoring=replace(source.scoring, window=trace.layers[layer].window or source.window))
        rows = torch.cat([probs for _, probs in own.attention_rows()], dim=1)
        torch.testing.assert_close(taken, rows, rtol=1e-4, atol=1e-6)


# -- sessions


@pytest.fixture(scope="module")
def session() -> wb.Session:
    found = reading()
    session = wb.Session((found.model, None))
    session.read(found.trace.ids)
    return session


RECIPES = [
    StreamingWindow(budget=0.3),
    BlockSparse(budget=0.4),
    UniAttn(budget=0.34),
    wb.method("masformer", budget=0.6),
    wb.method("memory-efficient"),
    wb.method("cca", budget=0.5) | wb.method("snapkv", budget=0.4, window=8),
]


@pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: recipe.label if hasattr(recipe, "methods") else recipe.key
)
def test_a_session_shows_one_and_the_same_attention_everywhere(session: wb.Session, recipe: object) -> None:
    spec = wb.Recipe.of(recipe)  # type: ignore[arg-type]
    trace = session.readings.trace(spec)  # its own reading, whose queries differ
    (method,) = spec.family("attention")
    for pooling in POOLINGS:
        grid = session.attention_grid(spec, pixels=9, pooling=pooling)  # type: ignore[arg-type]
        for layer, head in ((0, 0), (1, 2), (2, 3)):
            one = session.attention(layer, head, spec, pixels=9, pooling=pooling)  # type: ignore[arg-type]
            torch.testing.assert_close(grid.values[layer, head], one.values, rtol=0, atol=1e-5)
    stats = session.head_stats(spec)
    for layer in range(3):
        weights = matrix(method, trace, layer)  # type: ignore[arg-type]
        for head in (0, 3):
            shown = session.attention(layer, head, spec, pixels=70).values
            torch.testing.assert_close(shown, weights[head], rtol=0, atol=1e-5)
            torch.testing.assert_close(session.received(layer, head, spec), weights[head].sum(0), rtol=1e-4, atol=1e-5)
        received = session.received(layer, recipe=spec)
        torch.testing.assert_close(received, weights.mean(0).sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            stats.entropy[layer], torch.special.entr(weights).sum(-1).mean(-1), rtol=1e-3, atol=1e-4
        )
    assert len(session.heads(spec)) == 3 * 4


def test_beside_a_kv_method_the_prompts_queries_saw_what_the_attention_method_let_them(session: wb.Session) -> None:
    sparse, kept = StreamingWindow(budget=0.3), wb.method("snapkv", budget=0.3, window=8)
    alone, both = (session.attention(1, 2, recipe, pixels=70).values for recipe in (sparse, sparse | kept))
    assert torch.equal(alone, both)
    kv_only = session.attention(1, 2, kept, pixels=70).values
    assert not torch.allclose(both, kv_only, atol=1e-3)
    lean = session.attention(1, 2, wb.method("lean-attention") | kept, pixels=70)  # which only decodes in its own way
    assert torch.equal(lean.values, kv_only)
    with pytest.raises(BadRecipe, match="reads the prompt in its own way"):
        session.attention_grid(["block-sparse", "streammem"])


def test_only_what_changes_reading_changes_the_map() -> None:
    assert {key for key in METHODS if not changes_reading(made(key))} == {"lean-attention"}
    assert not changes_reading(None)


def test_differences_lie_on_the_same_cells(session: wb.Session) -> None:
    sparse = session.attention_grid(BlockSparse(budget=0.4), pixels=12)
    moved = sparse.minus(session.attention_grid(pixels=12)).map(0, 1)
    assert isinstance(moved, PooledMap) and float(moved.values.abs().max()) > 0.01


def test_heads_are_judged_while_their_maps_are_made(session: wb.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = BlockSparse(budget=0.35)
    session.attention_grid(recipe, pixels=4)
    monkeypatch.setattr(BlockSparse, "attend", lambda *_, **__: pytest.fail("computed again"))
    kept = wb.method("snapkv", budget=0.4, window=8)
    assert session.head_stats(recipe) is session.head_stats(recipe | kept)


def test_long_work_tells_how_far_it_is_and_can_be_stopped(session: wb.Session) -> None:
    recipe, told = StreamingWindow(budget=0.25), []
    session.attention_grid(recipe, pixels=4, progress=Progress(lambda *report: told.append(report)))
    shares = [done / total for stage, done, total in told if stage == "attention maps"]
    assert shares == sorted(shares) and shares[-1] == 1 and len(set(shares)) >= 7  # three layers, two KV heads
    for work in (session.attention_grid, session.heads):
        with pytest.raises(Cancelled):
            work(StreamingWindow(budget=0.27), progress=stopped_at("maps", "heads"))
    for one in (session.attention, session.received):
        with pytest.raises(Cancelled):
            one(1, 2, recipe, progress=stopped_at("computed"))


def stopped_at(*stages: str) -> Progress:
    """What is cancelled as soon as a stage whose name ends so has begun."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage.endswith(stages):
            progress.cancel()

    progress = Progress(stop)
    return progress
