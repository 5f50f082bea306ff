"""The step that a CUDA graph captures, run eagerly here: it decodes what the plain path does, and leaves the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.readings import answering, ids_of, plain
from workbench.errors import NotApplicable
from workbench.kv.stores.bitmap import BitmapStore
from workbench.kv.stores.delta import DeltaRows
from workbench.kv.stores.merged_layers import MergedLayerStore
from workbench.kv.stores.mixed import MixedStore
from workbench.kv.stores.packed import WHOLE, PackedStore
from workbench.models import tiny
from workbench.runtime.cuda_graph import CapturedStep, predicted_nbytes, refusal
from workbench.runtime.greedy import greedy

ModelOf = Callable[[str], PreTrainedModel]
LEAVING = {
    "h2o": wb.kv.H2O(budget=0.5),
    "tova": wb.kv.TOVA(budget=0.5),
    "streaming-llm in the text": wb.kv.StreamingLLM(budget=0.5, positions="text"),
    "streaming-llm": wb.kv.StreamingLLM(budget=0.5),
    "streaming-llm without sinks": wb.kv.StreamingLLM(budget=0.5, sinks=0),
    "lazyeviction": wb.kv.LazyEviction(budget=0.5, window=8),
    "decoding": wb.kv.Decoding(budget=0.5, every=8),
    "queries that vote": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.Decoding(every=16, queries=12)],
    "ragged": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.Decoding(every=8, queries=12)],
    "lagkv": wb.kv.LagKV(budget=0.5, lag=16),
    "prefixkv": wb.kv.PrefixKV(budget=0.5),
    "quest": wb.kv.Quest(tokens=32, page=8, dense=1),
    "quest of some": [wb.kv.SnapKV(budget=0.5, window=8), wb.kv.Quest(tokens=24, page=8, dense=0)],
    "a2ats": wb.kv.A2ATS(budget=0.4, codes=16, fetch=0.1),
    "tailorkv": wb.kv.TailorKV(budget=0.4, threshold=1, fetch=8, channels=4),
}
RECIPES = {
    "full": "full",
    "ragged": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV()],
    "kivi 4": wb.kv.KIVI(bits=4, group=16, residual=32),
    "kivi 2": wb.kv.KIVI(bits=2, group=16, residual=32),
    "kivi without residual": wb.kv.KIVI(bits=4, group=16, residual=0),
    "turbomind 8 and 4": wb.kv.TurboMind(key_bits=8, value_bits=4),
    "turbomind 16 and 4": wb.kv.TurboMind(key_bits=16, value_bits=4),
    "turbomind 4 and 16": wb.kv.TurboMind(key_bits=4, value_bits=16),
    "mustafar": wb.kv.Mustafar(recent=16),
    "ragged mustafar": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.Mustafar(recent=16)],
    "ragged kivi": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.KIVI(bits=4, group=16, residual=32)],
    "think": wb.kv.ThinK(pruned=40, recent=16),
    "ragged think": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.ThinK(pruned=40, recent=8)],
    "zipcache": wb.method("zipcache", budget=0.28, gap=20),
    "ragged zipcache": [wb.method("zipcache", budget=0.28, gap=16), wb.kv.AdaKV()],
    "settled zipcache": wb.method("zipcache", budget=0.28, gap=0),
    "cskv": wb.method("cskv", kept=50, window=16),
    "cskv by heads": wb.method("cskv", kept=30, window=16, joint=False),
    "ragged cskv": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.method("cskv", kept=50, window=8)],
    "eigen": wb.method("eigen-attention", budget=0.6),
    "ragged eigen": [wb.kv.SnapKV(budget=0.5, window=8), wb.kv.AdaKV(), wb.method("eigen-attention", error=0.1)],
    "fireq": wb.kv.FireQ(bits=4, group=16),
    "ragged fireq": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.FireQ(bits=8)],
    "mikv": wb.kv.MiKV(budget=0.4, low_bits=4, group=16),
    "ragged mikv": [wb.kv.MiKV(budget=0.4), wb.kv.AdaKV()],
    "minicache": wb.kv.MiniCache(start=0.0, retained=0.1),
    "deltallm": wb.kv.DeltaLLM(group=16, window=8),
    "deltallm, values too": wb.kv.DeltaLLM(budget=0.6, group=16, window=8),
    "ragged deltallm": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.DeltaLLM(group=16, window=8)],
    "vkv": wb.method("vkv-1bit"),
    "ragged vkv": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.method("vkv-1bit", bits=2, recent=8)],
}


IN_PARTS = ["think", "zipcache", "vkv", "cskv", "eigen", "fireq", "mikv", "minicache", "deltallm, values too"]


def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plain path's entries wait for one another, as between replays."""
    flush = PackedStore._flush

    def settle(self: PackedStore) -> None:
        block = max(self.residual, self.keys.group)
        quantised = self.value_tail if self.keys.bits == WHOLE else self.key_tail
        if quantised.shortest < (block if self.keys.axis == "channel" else self.residual + block):
            return
        flush(self, self.key_tail, self.keys)
        flush(self, self.value_tail, self.values)

    monkeypatch.setattr(PackedStore, "settle", settle)

    def append(self: BitmapStore, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        if self.key_tail.shortest >= self.recent + self.period:
            self.settle()
        self.key_tail.append(keys)
        self.value_tail.append(values)
        self._append_positions(positions)

    monkeypatch.setattr(BitmapStore, "append", append)

    merge = MergedLayerStore._merge
    monkeypatch.setattr(
        MergedLayerStore, "_merge", lambda self: merge(self) if self.tail[0].longest >= self.period else None
    )

    def append_deltas(self: DeltaRows, x: Tensor) -> None:
        if self.tail.shortest >= self.window + self.group:
            self.settle()
        self.tail.append(x)

    monkeypatch.setattr(DeltaRows, "append", append_deltas)

    demote = MixedStore._demote
    monkeypatch.setattr(
        MixedStore, "_demote", lambda self, count: demote(self, count) if count >= self.period else None
    )


@pytest.mark.parametrize(
    ("name", "fused"), [*((name, True) for name in RECIPES), ("full", False), ("ragged kivi", False), ("cskv", False)]
)
def test_tokens_and_contents_are_the_plain_ones(
    name: str, fused: bool, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, token = answering(tiny_llama, RECIPES[name])
    in_blocks(monkeypatch)
    twin = decoder.clone()
    step = CapturedStep(decoder, token, 48, fused=fused)
    assert step.fused == fused
    assert list(step.answer(())) == plain(twin, token, 48)
    assert decoder.position == twin.position and decoder.score_share is not None
    more, same = (d.feed(ids_of(3, 5)) for d in (decoder, twin))
    assert (more - same).abs().max() < 1e-4
    for mine, other in zip(decoder.stores, twin.stores, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.positions, other.positions, strict=True))


@pytest.mark.parametrize("name", LEAVING)
def test_entries_leave_move_or_are_chosen_as_they_are_without_graphs(name: str, tiny_llama: PreTrainedModel) -> None:
    decoder, token = answering(tiny_llama, LEAVING[name])
    decoder = decoder.clone()  # both count scores from here on
    twin, wanted = decoder.clone(), plain(decoder.clone(), token, 60)
    end = next(i for i in range(40, 60) if wanted[i] not in wanted[:i])
    assert list(CapturedStep(decoder, token, 60).answer([wanted[end]])) == wanted[: end + 1]
    plain(twin, token, end + 1)
    assert decoder.position == twin.position
    assert (decoder.score_share or 0) == pytest.approx(twin.score_share or 0)
    assert plain(decoder, 7, 40) == plain(twin, 7, 40)  # and so do those that leave by what was asked before
    for mine, other in zip(decoder.stores, twin.stores, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.positions, other.positions, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "mqa", "qwen2", "qwen3", "phi3"])
def test_architectures(architecture: str, tiny_model: ModelOf) -> None:
    decoder, token = answering(tiny_model(architecture), "full", 40)
    twin = decoder.clone()
    step = CapturedStep(decoder, token, 20)
    assert step.fused == (architecture != "phi3")
    assert list(step.answer(())) == plain(twin, token, 20)


def test_a_model_once_asked_for_hidden_states_is_fused_all_the_same() -> None:
    model = tiny()
    model(ids_of(3, 0)[None], output_hidden_states=True, output_attentions=True)
    decoder, token = answering(model, "full", 40)
    assert CapturedStep(decoder, token, 4).fused
    model.model.layers[0].register_forward_hook(partial(lambda *_: None))
    assert not CapturedStep(decoder, token, 4).fused


def test_values_that_wait_change_logits_little(tiny_llama: PreTrainedModel) -> None:
    decoder, token = answering(tiny_llama, RECIPES["kivi 4"])
    twin = decoder.clone()
    step = CapturedStep(decoder, token, 20)
    want = twin.feed(torch.tensor([token]))[-1]
    assert ((step() - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("name", ["full", "ragged", "ragged kivi"])
def test_what_was_generated_after_the_end_is_taken_back(
    name: str, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch)
    decoder, token = answering(tiny_llama, RECIPES[name])
    twin, wanted = decoder.clone(), plain(decoder.clone(), token, 40)
    last = next(i for i in range(10, 40) if wanted[i] not in wanted[:i])
    assert list(CapturedStep(decoder, token, 40).answer([wanted[last]])) == wanted[: last + 1]
    plain(twin, token, last + 1)
    assert decoder.position == twin.position
    assert (decoder.feed(ids_of(3, 5)) - twin.feed(ids_of(3, 5))).abs().max() < 1e-4


def test_stopping_in_the_middle_leaves_what_was_yielded(tiny_llama: PreTrainedModel) -> None:
    decoder, token = answering(tiny_llama, "full")
    twin = decoder.clone()
    answer = CapturedStep(decoder, token, 40).answer(())
    got = [next(answer) for _ in range(5)]
    answer.close()
    assert got == plain(twin, token, 5) and decoder.position == twin.position
    assert (decoder.feed(ids_of(3, 5)) - twin.feed(ids_of(3, 5))).abs().max() < 1e-4


def test_trying_a_step_changes_nothing(tiny_llama: PreTrainedModel) -> None:
    decoder, token = answering(tiny_llama, RECIPES["ragged"])
    twin = decoder.clone()
    CapturedStep(decoder, token, 20).prepare()
    assert torch.equal(decoder.feed(ids_of(4, 3)), twin.feed(ids_of(4, 3)))


@pytest.mark.parametrize("name", RECIPES)
def test_the_stores_take_the_bytes_that_were_predicted(name: str, tiny_llama: PreTrainedModel) -> None:
    decoder, token = answering(tiny_llama, RECIPES[name])
    predicted = predicted_nbytes(decoder, 40)
    held = sum(store.nbytes for store in decoder.stores)
    list(CapturedStep(decoder, token, 40).answer(()))
    grown = sum(store.nbytes for store in decoder.stores)
    assert predicted_nbytes(decoder, 0) - predicted <= grown - held <= predicted
    weights = sum(p.nbytes for p in tiny_llama.parameters())
    workspace = predicted - weights - grown
    assert 64 << 20 <= workspace < 65 << 20  # cuBLAS and little else


@pytest.mark.parametrize(
    ("architecture", "recipe", "reason"),
    [
        ("mistral", "full", "SlidingStore"),
        ("mixtral", "full", "is waited for"),
    ],
)
def test_what_cannot_be_captured_says_why(architecture: str, recipe: object, reason: str, tiny_model: ModelOf) -> None:
    decoder, token = answering(tiny_model(architecture), recipe)
    with pytest.raises(NotApplicable, match=reason):
        CapturedStep(decoder, token, 20).prepare()
    assert (refusal(decoder) is None) == (architecture == "mixtral")


def test_layers_on_several_devices_are_not_captured(tiny_model: ModelOf) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    decoder, token = answering(model, "full", 40)
    model.model.layers[-1].to("meta")
    with pytest.raises(NotApplicable, match="on several devices"):
        CapturedStep(decoder, token, 4)


def test_greedy_decodes_plainly_where_there_is_no_gpu(tiny_llama: PreTrainedModel) -> None:
    decoder, _ = answering(tiny_llama, "full")
    twin = decoder.clone()
    got, want = (
        list(greedy(d, ids_of(4, 2), torch.empty(0), max_new_tokens=24, eos=(), graphs=g))
        for d, g in ((decoder, True), (twin, False))
    )
    assert got == want and decoder.notes == []
