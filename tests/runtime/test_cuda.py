"""What only a GPU can show. Skipped where there is none, in CI too."""

from __future__ import annotations

import gc

import pytest
import torch

import workbench as wb
from benchmarks.model_kinds import tiny_of
from tests.runtime.test_cuda_graph import IN_PARTS, RECIPES, in_blocks
from workbench.errors import BudgetTooSmall, NotApplicable
from workbench.kv.stores import Store
from workbench.models import TINY_ARCHITECTURES, tiny
from workbench.registry import registered
from workbench.runtime.cuda_graph import CapturedStep
from workbench.runtime.decode import Decoder
from workbench.runtime.evaluate import teacher_forcing
from workbench.runtime.greedy import greedy
from workbench.runtime.single_tokens import SingleTokens
from workbench.runtime.steady_step import SteadyStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_logits_equal_plain_transformers_at_float32(architecture):
    model = tiny(architecture).to(CUDA)
    session = wb.Session((model, None), kv_dtype="float32")
    prompt, question = ids(150), ids(9, seed=1)
    session.read(prompt)
    run = session.run("full", question=question, max_new_tokens=12)
    everything = torch.cat([prompt, question, torch.tensor(run.tokens)])[None].to(CUDA)
    with torch.inference_mode():
        want = model(everything).logits[0, 158:-1].float().cpu()
    got, _ = teacher_forcing(run.conversation.decoder(), session.trace.logits, question, torch.tensor(run.tokens))
    assert (got.cpu() - want).abs().max() < 1e-3  # float32 products on the GPU, in another order


@pytest.mark.parametrize("key", ["full", "snapkv", "h2o", "turbomind"])
def test_latent_rows_are_decoded_by_graphs_as_without(key):
    model = tiny_of("minicpm3").to(CUDA)
    options = {"budget": 0.5} if key != "full" else {}
    runs = []
    for graphs in (True, False):
        session = wb.Session((model, None), kv_dtype="float32", graphs=graphs)
        session.read(ids(150))
        runs.append(session.run(key, question=ids(9, seed=1), max_new_tokens=30, **options))
    assert all(store.holds_latents for store in runs[0].decoder.stores)
    assert not [note for note in runs[0].notes if "without CUDA graphs" in note]
    assert runs[0].tokens == runs[1].tokens


@pytest.mark.parametrize("key", [method.key for method in registered("kv")])
def test_a_plan_on_the_gpu_is_the_plan_of_host_memory(key):
    model = tiny("llama").to(CUDA)
    here, there = wb.Session((model, None)), wb.Session((model, None), keep_trace_on="cpu")
    for session in (here, there):
        session.read(ids(400))
    options = {"budget": 0.5} if wb.method(key).takes_budget() else {}
    try:
        here.plan(key, **options)
    except BudgetTooSmall as refusal:
        options = {"budget": refusal.smallest}
    assert there.trace.layers[0].keys_held.device.type == "cpu"
    plans = [session.plan(key, **options) for session in (here, there)]
    assert torch.equal(plans[0].tiers.cpu(), plans[1].tiers.cpu())
    runs = [session.run(key, question=ids(8, seed=2), max_new_tokens=16, **options) for session in (here, there)]
    assert runs[0].tokens == runs[1].tokens
    assert sum(store.nbytes for store in plans[0].stores()) == plans[0].nbytes
    assert plans[0].nbytes <= plans[0].full_nbytes or key == "quest"  # all of the cache, and bounds of its pages


def test_the_timeline_follows_the_allocator():
    model = tiny("llama").to(CUDA)
    session = wb.Session((model, None))
    gc.collect()  # what other tests left must not be freed meanwhile
    before = torch.cuda.memory_allocated()
    session.read(ids(1500))
    held = torch.cuda.memory_allocated() - before
    last = session.trace.timeline.samples[-1].categories
    assert last["trace"] == session.trace.nbytes <= held
    assert last["activations"] > 0
    run = session.run("snapkv", budget=0.25, question=ids(8, seed=2), max_new_tokens=4)
    assert run.memory.samples[-1].categories["activations"] > 0


def test_half_precision_computes_and_agrees():
    model = tiny("qwen3").to(CUDA, torch.bfloat16)
    session = wb.Session((model, None))
    session.read(ids(300))
    for key in ("snapkv", "h2o", "kivi", "mikv"):
        run = session.run(key, budget=0.5, question=ids(8, seed=2), max_new_tokens=16)
        assert run.quality.kl >= 0 and run.quality.kl == run.quality.kl
    full = session.run("full", question=ids(8, seed=2), max_new_tokens=16)
    assert full.quality.kl == 0 and full.quality.top1_agreement == 1


STEPS = {
    "full": "full",
    "ragged": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV()],
    "kivi": wb.kv.KIVI(bits=4, group=16, residual=32),
    "mustafar": wb.kv.Mustafar(recent=16),
    "ragged kivi": [wb.kv.SnapKV(budget=0.4, window=8), wb.kv.AdaKV(), wb.kv.KIVI(bits=2, group=16, residual=32)],
} | {name: RECIPES[name] for name in IN_PARTS}


LEAVING = {
    "h2o": wb.kv.H2O(budget=0.5),
    "tova": wb.kv.TOVA(budget=0.5),
    "streaming-llm": wb.kv.StreamingLLM(budget=0.5),
    "lazyeviction": wb.kv.LazyEviction(budget=0.5, window=8),
    "decoding": [wb.kv.SnapKV(budget=0.5, window=8), wb.kv.Decoding(every=8, queries=12)],
    "lagkv": wb.kv.LagKV(budget=0.5, lag=16),
    "prefixkv": wb.kv.PrefixKV(budget=0.5),
    "quest": wb.kv.Quest(tokens=64, page=8, dense=1),
}


def decoder_of(recipe, dtype):
    """A decoder that has read a prompt and a question, and the first token of its answer."""
    model = tiny("llama").to(CUDA, dtype)
    session = wb.Session((model, None), kv_dtype=str(dtype).removeprefix("torch."))
    session.read(ids(400))
    plan = session.plan(recipe)
    decoder = Decoder(model, plan.stores(), plan.position, plan.stages.evict if plan.evicts else None)
    return decoder, int(decoder.feed(ids(9, seed=1))[-1].argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_the_step_that_is_captured_gives_the_logits_of_the_plain_one(name, dtype, monkeypatch):
    decoder, token = decoder_of(STEPS[name], dtype)
    in_blocks(monkeypatch)
    twin = decoder.clone()
    want = twin.feed(torch.tensor([token]))[-1].float()
    step = CapturedStep(decoder, token, 24)
    step.prepare()  # which runs some and takes them back
    assert (step().float() - want).norm() < (1e-3 if dtype == torch.float32 else 0.03) * want.norm()


@pytest.mark.parametrize("name", STEPS)
def test_replayed_tokens_are_those_of_steps_run_one_by_one(name):
    decoder, token = decoder_of(STEPS[name], torch.bfloat16)
    twin = decoder.clone()
    replayed = list(CapturedStep(decoder, token, 60).answer(()))
    assert replayed == list(CapturedStep(twin, token, 60, graph=False).answer(()))
    assert decoder.position == twin.position
    more, same = (d.feed(ids(3, seed=5)).float() for d in (decoder, twin))
    assert (more - same).norm() < 1e-3 * same.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAVING)
def test_captured_steps_leave_what_plain_ones_do_where_entries_come_and_go(name, dtype):
    decoder, token = decoder_of(LEAVING[name], dtype)
    twin = decoder.clone()
    tokens = list(CapturedStep(decoder, token, 40).answer(()))
    for read in (token, *tokens[:-1]):
        twin.feed(torch.tensor([read]))
    assert decoder.position == twin.position
    more, same = (d.feed(ids(1, seed=5)).float() for d in (decoder, twin))
    assert (more - same).norm() < (1e-3 if dtype == torch.float32 else 0.06) * same.norm()


@pytest.mark.parametrize("key", ["a2ats", "tailorkv"])
def test_steps_that_fetch_from_host_memory_are_not_captured(key):
    decoder, token = decoder_of(wb.method(key, budget=0.4), torch.bfloat16)
    with pytest.raises(NotApplicable, match="OffloadStore"):
        CapturedStep(decoder, token, 20)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_graphs_between_attentions_give_the_logits_of_the_modules(architecture):
    model = tiny(architecture).to(CUDA)
    session = wb.Session((model, None), kv_dtype="float32")
    session.read(ids(150))
    plan, fusing = session.plan("full"), SingleTokens()
    decoders = [Decoder(model, plan.stores(), plan.position, fusing=fusing) for _ in range(2)]
    reason = decoders[0].fuse()
    experts = architecture in (
        "mixtral",
        "qwen3-moe",
        "gpt-oss",
    )  # who of them computes is asked in the midst of a token
    assert ("is waited for" in reason) if experts else reason is None
    for token in ids(20, seed=1):
        got, want = (decoder.feed(token[None]) for decoder in decoders)
        assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("key", [method.key for method in registered("kv")])
def test_graphs_of_the_model_serve_every_method(key, read_on_gpu):
    session, fusing = read_on_gpu
    options = {"budget": 0.5} if wb.method(key).takes_budget() else {}
    try:
        plan = session.plan(key, **options)
    except BudgetTooSmall as refusal:
        plan = session.plan(key, budget=refusal.smallest)
    evicting = plan.stages.evict if plan.evicts else None
    decoders = [
        Decoder(session.model, plan.stores(), plan.position, evicting, memory=plan.trace.memory, fusing=fusing)
        for _ in range(2)
    ]
    assert decoders[0].fuse() is None
    for token in ids(40, seed=1):
        got, want = (decoder.feed(token[None]) for decoder in decoders)
        assert (got - want).abs().max() < 1e-3


@pytest.fixture(scope="module")
def read_on_gpu():
    session = wb.Session((tiny("llama").to(CUDA), None), kv_dtype="float32")
    session.read(ids(400))
    return session, SingleTokens()


@pytest.mark.parametrize("key", ["h2o", "tova", "streaming-llm"])
def test_a_full_cache_replays_one_step(key):
    model = tiny("llama").to(CUDA, torch.bfloat16)
    session = wb.Session((model, None))
    session.read(ids(400))
    plan = session.plan(key, budget=0.5)
    decoder = Decoder(model, plan.stores(), plan.position, plan.stages.evict)
    token = int(decoder.feed(ids(9, seed=1))[-1].argmax())
    twin, wanted, last = decoder.clone(), [], token
    for _ in range(60):
        last = int(twin.feed(torch.tensor([last]))[-1].argmax())
        wanted.append(last)
    assert list(SteadyStep(decoder, token, 60).answer(())) == wanted
    more, same = (d.feed(ids(3, seed=5)).float() for d in (decoder, twin))
    assert (more - same).norm() < 1e-3 * same.norm()


def test_a_session_on_the_gpu_decodes_by_a_graph_and_says_the_same():
    model = tiny("llama").to(CUDA)
    runs = []
    for graphs in (True, False):
        session = wb.Session((model, None), kv_dtype="float32")
        session.read(ids(300))
        plan = session.plan("full")
        decoder = Decoder(model, plan.stores(), plan.position)
        runs.append(list(greedy(decoder, ids(9, seed=1), plan.logits, max_new_tokens=40, eos=(), graphs=graphs)))
        assert decoder.notes == []
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "key", ["snapkv", "kivi", "mustafar", "think", "zipcache", "vkv-1bit", "fireq", "cskv", "eigen-attention",
            "minicache", "deltallm"],
)  # fmt: skip
def test_kernels_answer_what_references_do(key, monkeypatch):
    model = tiny("llama").to(CUDA, torch.bfloat16)
    session = wb.Session((model, None))
    session.read(ids(600))
    plan = session.plan(key, budget=0.6)
    by_kernel, plain = (Decoder(model, plan.stores(), plan.position) for _ in range(2))
    read = [ids(9, seed=1), ids(1, seed=2)]  # some parts are read by kernels where a token comes alone
    found = [by_kernel.feed(some, logits=len(some)).float() for some in read]
    assert any(store.by_kernel.__func__ is not Store.by_kernel for store in plain.stores)
    for store in plain.stores:
        monkeypatch.setattr(store, "by_kernel", lambda *args, **options: None)
    for got, some in zip(found, read, strict=True):
        wanted = plain.feed(some, logits=len(some)).float()
        assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("key", ["retrievalattention", "a2ats", "sentencekv", "kcache", "alisa"])
def test_what_lies_in_host_memory_is_pinned_and_not_on_the_device(key):
    session = wb.Session((tiny("llama").to(CUDA), None))
    session.read(ids(1000))
    plan = session.plan(key, budget=0.6)
    before = torch.cuda.memory_allocated()
    stores = plan.stores()
    grown = torch.cuda.memory_allocated() - before
    assert plan.host_nbytes > 0 and grown <= plan.nbytes * 1.1 + 512 * 12 * len(stores)  # the allocator rounds up
    for store in stores:
        for tensors in store.host_tensors().values():
            assert all(tensor.device.type == "cpu" for tensor in tensors)
        for tensors in store.tensors().values():
            assert all(tensor.device.type == "cuda" for tensor in tensors)
    entries = [
        t
        for store in stores
        for t in store.host_tensors().get("bfloat16", [])
        if t.numel() and t.dtype == torch.bfloat16
    ]
    assert all(tensor.is_pinned() for tensor in entries)
    run = session.run(key, budget=0.6, question=ids(8, seed=2), max_new_tokens=40)
    assert len(run.tokens) == 40 and run.quality.kl >= 0


@pytest.mark.parametrize("key", ["streammem", "infllm"])
def test_a_reading_in_bounded_memory_does_not_grow_with_the_text(key):
    peaks = []
    for tokens in (600, 1900):
        gc.collect()  # what is freed in the midst of a reading would be taken off what it uses
        session = wb.Session((tiny("llama").to(CUDA), None))
        session.read(ids(tokens), record=False)
        plan = session.plan(key, budget="128 tokens")
        samples = plan.timeline.samples
        peaks.append(max(sample.device - sample.categories["weights"] for sample in samples))
        assert max(sum(sample.kv_layers) for sample in samples) <= plan.full_nbytes * 128 / tokens
    assert peaks[1] <= peaks[0] * 1.25  # indexes grow a little; the cache of 1,900 tokens would be three times as large
