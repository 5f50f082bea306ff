"""StreamMem: scored by a generic query, merged frame by frame, within a fixed memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, numbers, reading
from workbench import testing
from workbench.errors import BudgetTooSmall
from workbench.kv import StreamMem
from workbench.kv.frame_prototypes import chosen, with_prototypes
from workbench.kv.methods.chunked.streammem import template_ids
from workbench.kv.stores import DenseStore
from workbench.models import facts, tiny
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read

if TYPE_CHECKING:
    from workbench.trace import LayerTrace


def turned(x: Tensor, by: int, layer: LayerTrace) -> Tensor:
    """A rotated key [d] moved `by` positions further, by plain sines of the angle of one position."""
    cos, sin = (table[0].tolist() for table in layer.rotation(torch.tensor([1])))
    half, out = len(cos) // 2, x.clone()
    for channel in range(half):
        angle = math.atan2(sin[channel], cos[channel]) * by
        first, second = float(x[channel]), float(x[channel + half])
        out[channel] = first * math.cos(angle) - second * math.sin(angle)
        out[channel + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def test_the_best_stay_and_each_frame_that_loses_some_gets_a_place_near_its_middle() -> None:
    for heads, slots, room, new, frame in (
        (2, 40, 20, 30, 8),
        (3, 23, 17, 23, 6),
        (1, 12, 11, 5, 2),
        (2, 30, 29, 30, 8),
    ):
        scores = numbers(heads, slots).softmax(dim=-1)
        kept, standing = chosen(scores, room, new, frame)
        frames = [list(range(slots - new + i, min(slots - new + i + frame, slots))) for i in range(0, new, frame)]
        for head in range(heads):
            order = sorted(range(slots), key=lambda slot: -float(scores[head, slot]))
            want = set(order[: room - len(frames)])
            places = set()
            for members in frames:
                lost = [slot for slot in members if slot not in want]
                if lost:
                    middle = (members[0] + members[-1]) / 2
                    places.add(min(lost, key=lambda slot: (abs(slot - middle), slot)))
            for slot in order:
                if len(want) + len(places) < room and slot not in want | places:
                    want.add(slot)
            assert set(kept[head].nonzero()[:, 0].tolist()) == want
            assert set(standing[head].nonzero()[:, 0].tolist()) == places
        assert bool(((kept | standing).sum(dim=1) == room).all())


def test_without_frames_only_the_best_stay() -> None:
    scores = numbers(2, 20)
    kept, standing = chosen(scores, 7, 12, 0)
    assert not bool(standing.any())
    assert all(set(kept[h].nonzero()[:, 0].tolist()) == set(scores[h].topk(7).indices.tolist()) for h in range(2))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_a_prototype_is_the_weighted_mean_of_its_frame_at_its_own_position(architecture: str) -> None:
    layer = reading(architecture).trace.compressible[0]
    keys, values = layer.keys[:, 20:50].float(), layer.values[:, 20:50].float()
    positions = torch.arange(20, 50)[None]
    scores = numbers(keys.shape[0], 30).softmax(dim=-1)
    kept, standing = chosen(scores, 12, 22, 8)
    new_keys, new_values = with_prototypes(layer, keys, values, scores, standing, 22, 8, positions)
    assert torch.equal(new_keys[~standing], keys[~standing]) and torch.equal(new_values[~standing], values[~standing])
    assert int(standing.sum()) >= 2
    for head, slot in standing.nonzero().tolist():
        first = 8 + (slot - 8) // 8 * 8
        members = range(first, min(first + 8, 30))
        total = sum(float(scores[head, m]) for m in members)
        key = sum(float(scores[head, m]) / total * turned(keys[head, m], slot - m, layer) for m in members)
        value = sum(float(scores[head, m]) / total * values[head, m] for m in members)
        assert torch.allclose(new_keys[head, slot], torch.as_tensor(key), atol=1e-4)
        assert torch.allclose(new_values[head, slot], torch.as_tensor(value), atol=1e-5)
    assert not bool((kept & standing).any())


def test_entries_are_scored_by_the_mean_attention_of_the_last_tokens_where_there_is_no_template() -> None:
    # It shrinks once: what stays must be what plain attention of the last tokens, read once more, puts first.
    found = testing.fresh_reading(tokens=48)
    method = StreamMem(budget=0.95, merging=False, proxy=5, chunk=8)
    plan = make_plan(found.trace, [method], torch.float32, model=found.model)
    held = int(plan.tiers[0, 0].sum())
    assert 40 <= held < 48  # only the last chunk of eight has no room
    ids = torch.cat([found.trace.ids[:40], found.trace.ids[35:40]])
    again = read(found.model, facts(found.model), Prompt(ids, chat=False))
    for layer in again.layers:
        rows = layer.attention(last=5)[..., :40].mean(dim=(1, 2))
        for head in range(layer.kv_heads):
            want = set(rows[head].topk(held - 8).indices.tolist()) | set(range(40, 48))
            assert set(plan.tiers[layer.index, head].nonzero()[:, 0].tolist()) == want


@pytest.mark.parametrize("merging", [True, False])
def test_memory_stays_within_the_limit_for_a_text_ten_times_as_long(merging: bool) -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(640), record=False)
    plan = session.plan(StreamMem(budget="64 tokens", merging=merging, frame=8))
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    kv = [sum(nbytes for name, nbytes in sample.categories.items() if name.startswith("kv")) for sample in reads]
    assert len(reads) > 40 and max(kv) <= 0.1 * plan.full_nbytes
    assert min(kv[10:]) > 0.09 * plan.full_nbytes and plan.nbytes > 0.097 * plan.full_nbytes  # and the room is used


def test_prototypes_change_what_is_held_and_frames_grow_with_what_was_read() -> None:
    found = testing.fresh_reading(tokens=90)
    plans = [
        make_plan(found.trace, [StreamMem(budget=0.4, frame=8, merging=on)], torch.float32, model=found.model)
        for on in (True, False)
    ]
    layer = found.trace.layers[0]  # the keys of the first layer depend on nothing that was dropped
    changed = []
    for plan in plans:
        store = plan.stores()[0]
        assert isinstance(store, DenseStore)
        held = store.contents(torch.float32)
        true = torch.stack([layer.keys[h, held.positions[h].long()] for h in range(layer.kv_heads)])
        changed.append(int(((held.keys - true).abs().amax(dim=-1) > 1e-3).sum()))
    assert changed[0] > 0 and changed[1] == 0
    method = StreamMem(frame=8)
    assert method.frame_of(40, 30) == 8 and method.frame_of(8, 30) == 15 and method.frame_of(3, 30) == 0
    assert StreamMem(merging=False).frame_of(40, 30) == 0


def test_the_generic_query_is_the_templates_beginning_of_an_answer() -> None:
    assert template_ids(Prompt(ids_of(4), chat=False)) is None

    class Words:
        chat_template = (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        special_tokens_map: ClassVar[dict[str, str]] = {}

        def get_chat_template(self, chosen: str | None = None) -> str:
            return self.chat_template

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    found = template_ids(Prompt(ids_of(4), chat=False, tokenizer=Words()))  # type: ignore[arg-type]
    assert found is not None and "".join(map(chr, found.tolist())) == "<end><assistant>"


def test_a_memory_too_small_for_two_entries_is_refused() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(60))
    with pytest.raises(BudgetTooSmall, match="streammem"):
        session.plan(StreamMem(budget=0.02))
