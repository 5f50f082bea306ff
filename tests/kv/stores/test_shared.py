"""Layers that read another layer's keys and values hold none, are counted once, and stay exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import COMMON
from tests.kv.support import ids_of
from workbench.errors import NotApplicable
from workbench.kv.stores import SharedStore, cloned

if TYPE_CHECKING:
    from pathlib import Path

IDS = ids_of(60, 0)
KINDS = [f"{span}_attention" for span in ("sliding", "sliding", "full", "sliding", "full")]
WINDOW, TOKENS, ENTRY = 16, 40, 2 * 2 * 16 * 4  # keys and values of two heads of 16 numbers in float32
SHARING = {name: size for name, size in COMMON.items() if name != "num_hidden_layers"} | {
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Five layers, of which the last two read what the second and the third hold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma3nTextConfig(
            **SHARING, num_hidden_layers=5, layer_types=KINDS, activation_sparsity_pattern=[0.0] * 5
        )
        return Gemma3nForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def session(model: PreTrainedModel) -> wb.Session:
    made = wb.Session((model, None), kv_dtype="float32")
    made.read(IDS[:TOKENS])
    return made


def test_layers_that_share_are_found_and_counted_once(session: wb.Session) -> None:
    assert session.trace is not None
    assert [layer.shared for layer in session.trace.layers] == [None, None, None, 1, 2]
    plan = session.plan()
    assert plan.full_nbytes == ENTRY * (2 * WINDOW + TOKENS)
    assert [store.nbytes for store in plan.stores()] == [ENTRY * n for n in (WINDOW, WINDOW, TOKENS, 0, 0)]
    assert plan.exact[4] == "reads the keys and values of layer 2"
    # The recording holds the keys and values of three layers, and the queries of all five.
    assert session.trace.nbytes == TOKENS * (3 * ENTRY + 5 * 4 * 16 * 4)


@pytest.mark.parametrize("question", [None, IDS[40:41], IDS[40:47]])
def test_decoding_equals_transformers_across_the_windows_edge(
    session: wb.Session, model: PreTrainedModel, question: torch.Tensor | None
) -> None:
    asked = IDS[:TOKENS] if question is None else IDS[: TOKENS + question.numel()]
    want = model.generate(asked[None], max_new_tokens=WINDOW + 4, do_sample=False)[0, asked.numel() :]
    run = session.run("full", question=question, max_new_tokens=WINDOW + 4)
    assert list(run.tokens) == want.tolist()
    more = torch.cat([asked, want, IDS[:3]])
    want = model.generate(more[None], max_new_tokens=4, do_sample=False)[0, more.numel() :]
    assert list(run.ask(IDS[:3], max_new_tokens=4).tokens) == want.tolist()  # on copies of the stores


def test_live_bytes_are_the_plans_while_decoding_evicts(session: wb.Session) -> None:
    run = session.run("tova", budget=0.75, max_new_tokens=WINDOW + 8)
    assert run.kv_nbytes <= run.plan.nbytes <= 0.75 * run.plan.full_nbytes
    assert run.quality.kl >= 0


def test_copies_share_what_the_originals_shared(session: wb.Session) -> None:
    stores = session.plan().stores()
    copies = cloned(stores)
    for store, copy in zip(stores, copies, strict=True):
        assert copy is not store and copy.holder is not store.holder
    assert isinstance(copies[4], SharedStore) and copies[4].holder is copies[2]
    assert isinstance(copies[3], SharedStore) and copies[3].holder is copies[1]


def test_methods_that_read_by_themselves_say_that_they_cannot(session: wb.Session) -> None:
    with pytest.raises(NotApplicable, match=r"infllm.*share keys and values"):
        session.plan("infllm")


def test_a_saved_session_still_shares(session: wb.Session, model: PreTrainedModel, tmp_path: Path) -> None:
    session.save(tmp_path / "saved")
    again = wb.Session.load(tmp_path / "saved", model=(model, None))
    assert again.plan().full_nbytes == session.plan().full_nbytes
    assert again.run("full", max_new_tokens=4).tokens == session.run("full", max_new_tokens=4).tokens


@pytest.mark.skipif(not hasattr(transformers, "Gemma4ForCausalLM"), reason="this transformers has no Gemma 4")
def test_a_model_that_leaves_out_queries_where_keys_are_shared_is_read_whole() -> None:
    # Asked for the last logits only, Gemma 4 lets its last layers see the last query only.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Gemma4TextConfig(
            **SHARING,
            num_hidden_layers=6,
            layer_types=[f"{span}_attention" for span in ("sliding", "sliding", "full") * 2],
        )
        model = transformers.Gemma4ForCausalLM(config).eval().requires_grad_(False)
    session = wb.Session((model, None), kv_dtype="float32")
    trace = session.read(IDS[:TOKENS])
    assert {layer.queries_held.shape[1] for layer in trace.layers} == {TOKENS}
    assert [layer.shared is not None for layer in trace.layers] == [False] * 4 + [True] * 2
    want = model.generate(IDS[None, :TOKENS], max_new_tokens=8, do_sample=False)[0, TOKENS:]
    assert list(session.run("full", max_new_tokens=8).tokens) == want.tolist()
