"""UniAttn: which layers share one softmax, what that computes, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from workbench.attention import UniAttn
from workbench.attention.base import PassContext, visible_entries
from workbench.attention.shared_weights import SharedStep, moved
from workbench.core.causal_attention import causal_attention
from workbench.errors import NotApplicable
from workbench.examples import needle
from workbench.kv.stores import Dequantised
from workbench.models import facts, tiny
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.runtime.calibration import calibration_ids, learnt
from workbench.runtime.prefill import read
from workbench_kernels import Scoring

IDS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(0))


def drawn(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    return query * 2, key, value


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("budget", [1.0, 0.9, 0.7, 0.5, 0.34, 0.1, 0.04])
def test_blocks_lie_on_top_and_only_their_first_layer_computes(layers: int, size: int, budget: float) -> None:
    method = UniAttn(budget=budget, size=size)
    anchors = [method.source_layer(layer, layers) for layer in range(layers)]
    assert anchors == sorted(anchors) and all(anchors[anchor] == anchor for anchor in anchors)
    own = sum(anchor == layer for layer, anchor in enumerate(anchors))
    assert method.entries(50, layers) == own * visible_entries(50)
    assert own <= budget * layers or own == 1
    assert own + 1 > budget * layers  # not one layer more than asked for
    if own < layers:
        assert anchors[-1] != layers - 1  # the topmost reuses
        lowest = anchors[next(layer for layer, anchor in enumerate(anchors) if anchor != layer)]
        assert all(anchors.count(anchor) > 1 for anchor in anchors[lowest:])  # from there on all lie in blocks
    if layers - own <= layers - -(-layers // size):  # blocks of this size are enough
        assert max(anchors.count(anchor) for anchor in anchors) <= size


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("tokens", [1, 2, 30, 300])
def test_a_layer_mixes_its_values_with_the_weights_of_another(tokens: int, window: int | None) -> None:
    method, context = UniAttn(budget=0.34, size=3), PassContext(3, tokens)
    first = drawn(tokens, 1)
    assert torch.allclose(
        method.attend(*first, Scoring(0.4), context),
        causal_attention(*first, Scoring(0.4)),
        atol=1e-5,
    )
    context.layer = 1
    other = drawn(tokens, 2)
    got = method.attend(*other, Scoring(0.9, window), context)
    ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = torch.stack([first[0][h] @ first[1][h // 2].T * 0.4 for h in range(4)])
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    if window is not None:
        weights = weights * torch.ones(tokens, tokens).triu(-window + 1)
        weights = weights / weights.sum(-1, keepdim=True)
    want = torch.stack([weights[h] @ other[2][h // 2] for h in range(4)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert context.computed == [4 * visible_entries(tokens), 0, 0]
    context.layer = 2
    method.attend(*other, Scoring(0.9, window), context)
    assert not context.state  # the last that needs them lets go of the weights


def test_decoding_shares_the_same_layers_weights() -> None:
    session = wb.Session((tiny("llama"), None), kv_dtype="float32")
    session.read(IDS)
    method = UniAttn(budget=0.5)
    run = session.run(method, question=IDS[:5], max_new_tokens=6)
    longer = wb.Session((tiny("llama"), None), kv_dtype="float32")
    longer.read(torch.cat([IDS, IDS[:5], torch.tensor(run.tokens[:-1])]))
    trace = longer.plan(method).trace
    # Reading all of it at once ends as decoding did, token by token.
    assert int(trace.logits.argmax()) == run.tokens[-1]
    assert run.to_dict(quality=False)["score_share"] == pytest.approx(1 / 3)


def test_what_a_layer_loses_is_given_back_by_a_projection_of_its_values() -> None:
    method, context = UniAttn(budget=0.5, size=2), PassContext(2, 40)
    method.attend(*drawn(40, 1), Scoring(0.4), context)
    shared = UniAttn(budget=0.5, size=2, compensate=False)
    context.layer, other = 1, drawn(40, 2)
    alone = PassContext(2, 40, 1, state=dict(context.state))
    plain = shared.attend(*other, Scoring(0.4), alone)
    exact = causal_attention(*other, Scoring(0.4))
    got = method.learn(*other, Scoring(0.4), context, exact)
    values = torch.stack([torch.cat([other[2][k, n] for k in range(2)]) for n in range(40)]).double()
    lost = torch.stack([torch.cat([(exact - plain)[h, n] for h in range(4)]) for n in range(40)]).double()
    fitted = torch.linalg.lstsq(values, lost).solution
    want = plain + (values @ fitted).float().view(40, 4, 8).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (kept,) = context.state.values()
    later, more = PassContext(2, 40, 0, state=dict(context.state)), drawn(12, 5)
    method.attend(*drawn(12, 4), Scoring(0.4), later)
    later.layer = 1
    without = PassContext(2, 12, 1, state=dict(later.state))
    without.state.pop(next(key for key, value in without.state.items() if value is kept))
    change = method.attend(*more, Scoring(0.4), later) - method.attend(*more, Scoring(0.4), without)
    rows = torch.cat([more[2][0], more[2][1]], dim=1)
    torch.testing.assert_close(change, (rows @ kept).view(12, 4, 8).transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_calibration_brings_layers_nearer_to_the_model_as_it_is(tiny_llama: PreTrainedModel) -> None:
    method = UniAttn(budget=0.5)
    found = learnt(tiny_llama, 3, method, None, Progress())
    assert len(found) == 2 and learnt(tiny_llama, 3, method, None, Progress()).keys() == found.keys()
    assert learnt(tiny_llama, 3, UniAttn(budget=0.5, compensate=False), None, Progress()) == {}
    assert learnt(tiny_llama, 3, UniAttn(budget=1), None, Progress()) == {}
    ids = calibration_ids(tiny_llama, None, 1024)
    exact = read(tiny_llama, facts(tiny_llama), Prompt(ids, chat=False)).layers
    apart = []
    for each in (method, UniAttn(budget=0.5, compensate=False)):
        got = read(tiny_llama, facts(tiny_llama), Prompt(ids, chat=False), method=each).layers
        apart.append([float((one.values - other.values).norm()) for one, other in zip(got, exact, strict=True)])
    assert apart[0][2] < apart[1][2]  # the last layer's values show what came out of the one before


def test_weights_find_their_tokens_in_another_layers_cache() -> None:
    weights = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.6, 0.3]]])
    step = SharedStep(0, weights, torch.tensor([[0, 4, 9]]))
    assert moved(step, torch.tensor([[0, 4, 9]])) is weights
    got = moved(step, torch.tensor([[9, 1, 0, 12], [4, 0, 5, 9]]))
    assert torch.equal(got, torch.tensor([[[0.2, 0, 0.5, 0]], [[0.6, 0.1, 0, 0.3]]]))


def test_layers_with_other_caches_share_what_both_hold() -> None:
    method, context = UniAttn(budget=0.5, size=2), PassContext(2, 0)
    query, key, value = drawn(6, 3)
    everything = torch.ones(2, 1, 6, dtype=torch.bool)
    held = Dequantised(key, value, torch.arange(6)[None], None)
    method.decode(query[:, -1:], held, everything, Scoring(0.4), context)
    context.layer = 1
    less = Dequantised(key[:, 2:], value[:, 2:], torch.arange(2, 6)[None], None)
    got = method.decode(query[:, -1:] * 5, less, everything[..., 2:], Scoring(0.4), context)
    want = causal_attention(query[:, 2:], key[:, 2:], value[:, 2:], Scoring(0.4))[:, -1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_evicting_cache_can_be_decoded_on(tiny_llama: PreTrainedModel) -> None:
    session = wb.Session((tiny_llama, None), kv_dtype="float32")
    session.read(IDS)
    run = session.run([wb.kv.SnapKV(budget=0.4, window=8), UniAttn(budget=0.7)], max_new_tokens=5)
    assert len(run.tokens) == 5


def test_prompts_whose_weights_are_too_large_are_refused_with_their_size() -> None:
    session = wb.Session((tiny("llama"), None), kv_dtype="float32")
    session.read(torch.arange(900) % 256)
    with pytest.raises(NotApplicable, match=r"take 6 MiB for 900 tokens.*raise it, or shorten"):
        session.run(UniAttn(keep=1, compensate=False), max_new_tokens=2)
    assert session.run(UniAttn(keep=1, budget=1), max_new_tokens=2).tokens  # nothing is shared: nothing is kept


def test_top_layers_of_the_default_model_may_share(default_session: wb.Session) -> None:
    default_session.read(needle(300).text)
    full = default_session.plan("full").trace.logits.log_softmax(-1)
    distances = []
    for budget in (0.25, 0.75, 0.9, 0.97, 1.0):
        got = default_session.plan(UniAttn(budget=budget)).trace.logits.log_softmax(-1)
        distances.append(float((full.exp() * (full - got)).sum()))
    assert distances[0] > distances[2] > distances[4]
    assert distances[2] < 0.3 and distances[4] < 1e-5
