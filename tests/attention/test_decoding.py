"""Attention methods while decoding: what reading would have computed, over any store, and counted."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.attention.support import alike
from tests.readings import ids_of, session_on
from workbench.attention import CoreContext, DeltaAttention, LMul, StreamingWindow
from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.visible_scores import VisibleScores, visible_slots
from workbench.core.rope import Rotation
from workbench.kv.stores import Dequantised
from workbench.kv.stores.store import seen_by
from workbench.models import tiny
from workbench.registry import registered
from workbench.runtime.decode import Decoder
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels import attend as reference

SCALE = 0.4
DECODING = [method for method in registered("attention") if method.decodes]
# As each would be used on a prompt of some 90 tokens: something is left out while decoding.
SPARSE: list[AttentionMethod] = [
    StreamingWindow(sinks=4, window=16),
    StreamingWindow(sinks=0, window=1),
    CoreContext(group=4, window=9, sinks=3),
    CoreContext(group=2, window=1, sinks=0, weight="token"),
    DeltaAttention(group=16, window=8),
    DeltaAttention(group=16, window=1, sparsity=90),
]


def recorded(tensors: tuple[Tensor, Tensor, Tensor], tokens: int, softcap: float | None = None) -> LayerTrace:
    query, key, value = (x[:, :tokens] for x in tensors)
    return LayerTrace(
        index=0,
        keys_held=key,
        values_held=value,
        queries_held=query,
        device=query.device,
        rotary=lambda read: Rotation(lambda positions: (positions, positions)),
        scoring=Scoring(SCALE, softcap=softcap),
    )


def read(method: AttentionMethod, tensors: tuple[Tensor, Tensor, Tensor], softcap: float | None = None) -> Tensor:
    context = PassContext(1, tensors[0].shape[1])
    return method.attend(*tensors, Scoring(SCALE, softcap=softcap), context)


class Steps:
    """Decodes the tokens of drawn tensors after a prompt, in feeds of any size, over slots in any order."""

    def __init__(
        self,
        method: AttentionMethod,
        tensors: tuple[Tensor, Tensor, Tensor],
        prompt: int,
        *,
        softcap: float | None = None,
        shuffled: bool = False,
        kept: Tensor | None = None,
    ) -> None:
        """kept: bool [k, n], which entries of the prompt and of what follows each KV head holds; all if None."""
        self.method, self.tensors, self.end, self.softcap = method, tensors, prompt, softcap
        self.shuffled, self.kept = shuffled, kept
        self.context = PassContext(1, prompt)
        method.begin(recorded(tensors, prompt, softcap), self.context)

    def contents(self, stop: int) -> Dequantised:
        _, key, value = (x[:, :stop] for x in self.tensors)
        heads, positions, valid = len(key), torch.arange(stop)[None], None
        if self.kept is not None:
            kept = self.kept[:, :stop]
            longest = int(kept.sum(1).max())
            slots = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
            valid, positions = kept.gather(1, slots), slots
            key, value = (x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1])) for x in (key, value))
        if self.shuffled:
            order = torch.randperm(key.shape[1], generator=torch.Generator().manual_seed(stop))
            key, value, positions = key[:, order], value[:, order], positions[:, order]
            valid = None if valid is None else valid[:, order]
        assert positions.shape[0] in (1, heads)
        return Dequantised(key, value, positions, valid)

    def feed(self, count: int) -> Tensor:
        start, self.end = self.end, self.end + count
        held = self.contents(self.end)
        self.context.positions = torch.arange(start, self.end)
        seen = seen_by(self.context.positions, held.positions, held.valid, Scoring(1.0))
        shape = (len(held.keys), count, held.keys.shape[1])
        visible = (torch.ones(1, dtype=torch.bool) if seen is None else seen).expand(shape)
        query = self.tensors[0][:, start : self.end]
        return self.method.decode(query, held, visible, Scoring(SCALE, softcap=self.softcap), self.context)


# --- decoding is reading


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("prompt", [1, 5, 40, 89])
@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_a_new_token_sees_what_it_would_have_if_read_with_the_prompt(
    method: AttentionMethod, prompt: int, softcap: float | None
) -> None:
    tensors = alike(90)
    steps = Steps(method, tensors, prompt, softcap=softcap)
    got = torch.cat([steps.feed(1) for _ in range(90 - prompt)], dim=1)
    torch.testing.assert_close(got, read(method, tensors, softcap)[:, prompt:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feeds", [(50,), (7, 1, 42), (1, 1, 30, 1, 17)])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_however_tokens_are_fed_and_slots_are_ordered(
    method: AttentionMethod, shuffled: bool, feeds: tuple[int, ...]
) -> None:
    tensors = alike(90)
    steps = Steps(method, tensors, 40, shuffled=shuffled)
    got = torch.cat([steps.feed(count) for count in feeds], dim=1)
    torch.testing.assert_close(got, read(method, tensors)[:, 40:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_long_questions_are_taken_in_stretches(method: AttentionMethod) -> None:
    tensors = alike(400)
    got = Steps(method, tensors, 40).feed(360)
    torch.testing.assert_close(got, read(method, tensors)[:, 40:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [StreamingWindow(budget=0.3), CoreContext(budget=0.3), DeltaAttention(budget=0.3)])
def test_a_budget_fixes_for_all_that_follows_what_it_left_of_the_prompt(method: AttentionMethod) -> None:
    tensors = alike(120)
    shape = method._shape(60) if not isinstance(method, StreamingWindow) else None
    if isinstance(method, StreamingWindow):
        fixed: AttentionMethod = StreamingWindow(sinks=method.widths(60)[0], window=method.widths(60)[1])
    elif isinstance(method, CoreContext):
        fixed = CoreContext(group=shape.group, window=shape.window)
    else:
        fixed = method
    steps, same = Steps(method, tensors, 60), Steps(fixed, tensors, 60)
    for _ in range(60):
        torch.testing.assert_close(steps.feed(1), same.feed(1), rtol=1e-5, atol=1e-5)
    assert steps.context.computed[0] == same.context.computed[0] < 4 * (visible_entries(120) - visible_entries(60))


# --- what is counted


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_only_what_is_not_computed_counts_as_saved(method: AttentionMethod) -> None:
    tensors = alike(90)
    steps = Steps(method, tensors, 40)
    for step in range(50):
        before = steps.context.computed[0]
        steps.feed(1)
        assert 0 < steps.context.computed[0] - before <= 4 * (41 + step)
    assert steps.context.computed[0] < 4 * (visible_entries(90) - visible_entries(40))


@pytest.mark.parametrize(("sinks", "window"), [(4, 16), (0, 1), (50, 60)])
def test_a_streaming_window_counts_sinks_and_window(sinks: int, window: int) -> None:
    steps = Steps(StreamingWindow(sinks=sinks, window=window), alike(90), 40)
    steps.feed(20)
    steps.feed(1)
    assert steps.context.computed[0] == 4 * sum(min(sinks + window, p + 1) for p in range(40, 61))


def test_core_tokens_count_one_each_and_their_making_no_score() -> None:
    steps = Steps(CoreContext(group=4, window=9, sinks=3), alike(90), 40)
    steps.feed(50)
    old = [max(p + 1 - 9 - 3, 0) // 4 for p in range(40, 90)]
    assert steps.context.computed[0] == 4 * sum(o + p + 1 - 4 * o for o, p in zip(old, range(40, 90), strict=True))


def test_differences_are_made_once() -> None:
    steps = Steps(DeltaAttention(group=16, window=8), alike(90), 40)
    steps.feed(1)
    first = steps.context.state["deltallm-attention", 0, 0]
    for _ in range(8):
        steps.feed(1)
    later = steps.context.state["deltallm-attention", 0, 0]
    assert [some is before for some, before in zip(later, first, strict=False)] == [True] * len(first)
    for _ in range(16):
        steps.feed(1)
    grown = steps.context.state["deltallm-attention", 0, 0]
    assert grown[0] is first[0] and len(grown) > len(first)
    assert steps.context.state_nbytes == sum(
        part.nbytes for head in (0, 1) for some in steps.context.state["deltallm-attention", 0, head] for part in some
    )


def test_differences_of_what_the_cache_no_longer_holds_are_made_anew() -> None:
    method, tensors = DeltaAttention(group=16, window=8), alike(90)
    steps = Steps(method, tensors, 60)
    steps.feed(1)
    query, key, value = tensors
    changed = (query, torch.cat([key[:, :20] * 3, key[:, 20:]], dim=1), value)
    steps.tensors = changed
    torch.testing.assert_close(steps.feed(29), read(method, changed)[:, 61:], rtol=1e-5, atol=1e-5)


# --- stores that hold a part


@pytest.mark.parametrize("shuffled", [False, True])
def test_windows_go_by_true_positions_where_heads_hold_different_entries(shuffled: bool) -> None:
    method, tensors = StreamingWindow(sinks=4, window=16), alike(90)
    kept = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.3], [0.6]])
    kept[:, 60:] = True
    got = Steps(method, tensors, 60, kept=kept, shuffled=shuffled).feed(30)
    query, key, value = tensors
    for p in range(60, 90):
        at = torch.arange(90)
        seen = kept & (at <= p) & ((at < 4) | (at > p - 16))
        want, _ = reference(query[:, p : p + 1], key, value, Scoring(SCALE), visible=seen[:, None])
        torch.testing.assert_close(got[:, p - 60 : p - 59], want, rtol=1e-5, atol=1e-5)


def test_a_core_token_is_made_of_what_is_held_of_its_group() -> None:
    group, window = 4, 6
    method, tensors = CoreContext(group=group, window=window, sinks=0), alike(60)
    query, key, value = (x.double() for x in tensors)
    kept = torch.rand(2, 60, generator=torch.Generator().manual_seed(2)) < 0.5
    kept[:, ::group], kept[:, group - 1 :: group], kept[1, 8:11] = True, True, False
    steps = Steps(method, tensors, 1, kept=kept | (torch.arange(60) == 59))
    kept = steps.kept
    assert kept is not None
    for p in range(1, 60):
        kept[:, p] = True  # a token is held while it is new; what is dropped then is the test's choice
        got = steps.feed(1)
        old = max(p + 1 - window, 0) // group
        for h in range(4):
            mine, scores, mixed = kept[h // 2], [], []
            for g in range(old):
                held = [j for j in range(g * group, (g + 1) * group) if mine[j]]
                weights = torch.stack([query[h, held[-1]] @ key[h // 2, j] for j in held]).mul(SCALE).softmax(0)
                core = weights @ key[h // 2, held]
                scores.append(query[h, p] @ core * SCALE + math.log(len(held)))
                mixed.append(weights @ value[h // 2, held])
            for j in range(old * group, p + 1):
                if mine[j]:
                    scores.append(query[h, p] @ key[h // 2, j] * SCALE)
                    mixed.append(value[h // 2, j])
            want = torch.stack(scores).softmax(0) @ torch.stack(mixed)
            torch.testing.assert_close(got[h, 0].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shuffled", [False, True])
def test_groups_of_differences_count_what_a_head_holds(shuffled: bool) -> None:
    method, tensors = DeltaAttention(group=16, window=8), alike(90)
    kept = torch.rand(2, 90, generator=torch.Generator().manual_seed(3)) < torch.tensor([[0.5], [0.9]])
    kept[:, 60:] = True
    got = Steps(method, tensors, 60, kept=kept, shuffled=shuffled).feed(30)
    query, key, value = tensors
    for head in range(2):
        rows = kept[head].nonzero()[:, 0]  # as if a prompt had only these
        alone = (query[2 * head : 2 * head + 2, rows], key[head : head + 1, rows], value[head : head + 1, rows])
        want = read(method, alone)[:, -30:]
        torch.testing.assert_close(got[2 * head : 2 * head + 2], want, rtol=1e-5, atol=1e-5)


def test_slots_that_some_query_sees_are_all_that_is_multiplied() -> None:
    seen = torch.zeros(2, 3, 10, dtype=torch.bool)
    seen[0, :, 2], seen[0, 1, 7], seen[1, 0, 4:8] = True, True, True
    seen[1, 1:, 5] = True
    slots, hidden = visible_slots(seen)
    assert hidden is not None and slots.shape == (2, 4) and slots[1].tolist() == [4, 5, 6, 7]
    assert slots[0, :2].tolist() == [2, 7]
    assert torch.equal(~hidden, seen.gather(2, slots[:, None].expand(-1, 3, -1)))
    _, key, value = alike(10)
    rows = alike(3)[0] * SCALE
    contents = Dequantised(key, value, torch.arange(10)[None], None)
    got = VisibleScores.of(rows, contents, seen, Scoring(1.0), torch.arange(7, 10))
    want, _ = reference(rows, key, value, Scoring(1.0), visible=seen)
    torch.testing.assert_close(got.softmax().output(Scoring(1.0)), want, rtol=1e-5, atol=1e-5)


# --- whole runs


def session_of(model: PreTrainedModel, tokens: int = 90, dtype: str = "float32") -> wb.Session:
    return session_on(model, ids_of(tokens, 0), kv_dtype=dtype)


@pytest.fixture(scope="module")
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    return session_of(tiny_llama)


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_a_model_decodes_as_it_would_have_read(session: wb.Session, method: AttentionMethod) -> None:
    rest = ids_of(20, 1)
    plan = session.plan(method)
    decoder = Decoder(session.model, plan.stores(), plan.position, None, method, plan.trace.layers)
    got = [decoder.feed(rest[:9])[-1], *[decoder.feed(token[None])[-1] for token in rest[9:]]]
    whole = wb.Session((session.model, None), kv_dtype="float32")
    whole.read(torch.cat([ids_of(90, 0), rest]))
    assert (got[-1] - whole.plan(method).trace.logits).abs().max() < 1e-4
    assert decoder.score_share is not None and decoder.score_share < 0.8


@pytest.mark.parametrize("method", SPARSE, ids=str)
def test_a_copy_goes_its_own_way(session: wb.Session, method: AttentionMethod) -> None:
    plan = session.plan(method)
    decoder = Decoder(session.model, plan.stores(), plan.position, None, method, plan.trace.layers)
    decoder.feed(ids_of(5, 1))
    twin = decoder.clone()
    assert twin.score_share is None and twin.attention_nbytes == decoder.attention_nbytes
    twin.feed(ids_of(40, 2))
    again = decoder.clone()
    assert torch.equal(decoder.feed(ids_of(9, 3), logits=9), again.feed(ids_of(9, 3), logits=9))


@pytest.mark.parametrize(
    "recipe",
    [
        list,
        lambda: [wb.kv.SnapKV(budget=0.5, window=8)],
        lambda: [wb.kv.SnapKV(budget=0.5, window=8), wb.kv.AdaKV()],
        lambda: [wb.kv.KIVI(bits=4)],
        lambda: [wb.kv.StreamingLLM(budget=0.5, decode=False)],
        lambda: [wb.method("h2o", budget=0.5, decode=False)],
        lambda: [wb.method("mikv", budget=0.5)],
        lambda: [wb.method("mustafar")],
        lambda: [wb.method("deltallm", budget=0.6)],
    ],
    ids=["alone", "snapkv", "adakv", "kivi", "streaming-llm", "h2o", "mikv", "mustafar", "deltallm"],
)
@pytest.mark.parametrize("method", [*SPARSE[::2], wb.method("lean-attention"), wb.method("l-mul")], ids=lambda m: m.key)
def test_recipes_with_a_kv_method_run_and_go_on(
    session: wb.Session, method: AttentionMethod, recipe: Callable[[], list[wb.Method]]
) -> None:
    run = session.run([*recipe(), method], question=ids_of(6, 4), max_new_tokens=5)
    again = run.ask(ids_of(4, 5), max_new_tokens=3)
    assert len(run.tokens) == 5 and len(again.tokens) == 3
    assert run.quality.kl >= 0
    assert math.isfinite(run.quality.kl)
    for one in (run, again):
        share = one.to_dict(quality=False)["decode_score_share"]
        assert share == one.decode_score_share and share is not None and share > 0


def test_the_record_says_what_decoding_computed(session: wb.Session) -> None:
    full = session.run("full", question=ids_of(6, 4), max_new_tokens=5)
    assert full.decode_score_share == 1
    run = session.run(StreamingWindow(sinks=4, window=16), question=ids_of(6, 4), max_new_tokens=5)
    assert run.decode_score_share == pytest.approx(sum([20] * 10) / sum(range(91, 101)))
    assert run.to_dict(quality=False)["score_share"] == run.plan.trace.score_share
    assert f"{run.decode_score_share:.1%} while decoding" in run.summary()
    half = session.run("snapkv", budget=0.5, question=ids_of(6, 4), max_new_tokens=5)
    held = int(half.plan.counts.sum()) / half.plan.counts.numel()
    assert half.decode_score_share == pytest.approx(sum(held + i for i in range(1, 11)) / sum(range(91, 101)))
    packed = session.run("kivi", question=ids_of(6, 4), max_new_tokens=5)
    assert packed.decode_score_share == 1
    assert session.run("full", max_new_tokens=1).decode_score_share is None  # nothing was read after the prompt


def test_dense_reading_methods_decode_everything(session: wb.Session) -> None:
    run = session.run("block-sparse", budget=0.5, question=ids_of(6, 4), max_new_tokens=5)
    assert run.decode_score_share == 1 and run.to_dict(quality=False)["score_share"] <= 0.5


def test_layers_with_a_window_of_their_own_count_their_window() -> None:
    session = session_of(tiny("gemma3", window=16))  # layers 0 and 2 slide
    for method in ("full", LMul()):
        run = session.run(method, question=ids_of(6, 4), max_new_tokens=5)
        causal = sum(range(91, 101))
        assert run.decode_score_share == pytest.approx((2 * 160 + causal) / (3 * causal))


def test_stores_that_look_for_what_a_query_needs_attend_themselves(session: wb.Session) -> None:
    methods = [wb.method("kcache"), StreamingWindow(sinks=4, window=16)]
    run = session.run(methods, question=ids_of(6, 4), max_new_tokens=5)
    assert run.decode_score_share is None
    (note,) = [note for note in run.notes if "streaming-window" in note]
    assert note.startswith("layers 0, 1, 2")
    assert not session.run(methods[0], question=ids_of(6, 4), max_new_tokens=5).notes


def test_what_attention_holds_is_on_the_timeline(session: wb.Session) -> None:
    run = session.run(CoreContext(group=4, window=9, sinks=3), question=ids_of(6, 4), max_new_tokens=5)
    assert run.decoder is not None
    held = run.memory.samples[-1].categories["attention"]
    assert held == run.decoder.attention_nbytes > 0
    facts = session.facts
    groups = (90 + 10 - 3) // 4 - (9 - 1) // 4  # those made as they passed, and those of the prompt now old
    assert held >= facts.layers * facts.heads * (groups - 2) * 2 * facts.head_dim * 4
    plain = session.run("full", question=ids_of(6, 4), max_new_tokens=5)
    assert "attention" not in plain.memory.samples[-1].categories


def test_evidence_for_eviction_is_there_and_its_scores_are_counted(session: wb.Session) -> None:
    plan = session.plan("h2o", budget=0.5)
    decoders = [
        Decoder(session.model, plan.stores(), plan.position, plan.stages.evict, method, plan.trace.layers)
        for method in (None, StreamingWindow(sinks=4, window=16), StreamingWindow(budget=1.0))
    ]
    for decoder in decoders:
        for token in ids_of(20, 6):
            decoder.feed(token[None])
    plain, near, whole = (decoder.score_share for decoder in decoders)
    assert plain is not None and near is not None and whole == pytest.approx(2 * plain)
    assert plain < near < whole
    for a, b in zip(decoders[0].stores, decoders[2].stores, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.positions, b.positions, strict=True))
    assert sum(store.nbytes for store in decoders[1].stores) <= plan.nbytes
