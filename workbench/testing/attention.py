"""What attention methods promise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod
from workbench.errors import BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench.models import facts
from workbench.prompt import Prompt
from workbench.registry import method as make
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read
from workbench.session import Session
from workbench.testing.leftovers import fingerprint, nothing_left, recorded_in
from workbench.testing.problem import must
from workbench.testing.subjects import BUDGETS, TOKENS, Subjects, random_ids

_CLOSE = 1e-4  # of the largest logit: what float32 may lose on the way


def a_whole_budget_attends_exactly(method: AttentionMethod, subjects: Subjects) -> None:
    if not method.takes_budget():
        return
    whole = method.with_budget(1.0)
    for architecture in ("llama", "mqa", "gemma3", "gpt-oss"):
        for tokens in (1, 2, TOKENS):
            reading = subjects.reading(architecture, tokens)
            got = read(reading.model, facts(reading.model), reading.trace.prompt, method=whole)
            furthest = float((got.logits - reading.trace.logits).abs().max() / reading.trace.logits.abs().max())
            where = f"{architecture}, {tokens} tokens"
            must(furthest < _CLOSE, f"{where}: at a budget of 1 the logits differ from exact ones by {furthest:.1e}")


def attention_keeps_to_the_budget(method: AttentionMethod, subjects: Subjects) -> None:
    for architecture in ("llama", "gemma3") if method.takes_budget() else ():
        reading = subjects.reading(architecture)
        layers = len(reading.trace.layers)
        full = layers * TOKENS * (TOKENS + 1) // 2
        for share in BUDGETS:
            budget, asked = share, method.with_budget(share)
            try:
                asked.check(TOKENS, layers)
            except BudgetTooSmall as refusal:
                must(share < refusal.smallest <= 1, f"the budget {share} is refused, and {refusal.smallest} named")
                budget, asked = refusal.smallest, method.with_budget(refusal.smallest)
                asked.check(TOKENS, layers)
            foretold = asked.entries(TOKENS, layers)
            must(foretold <= budget * full, f"a budget of {budget} foretells {foretold} of {full} score entries")
            got = read(reading.model, facts(reading.model), reading.trace.prompt, method=asked)
            computed = sum(got.computed)
            must(computed > 0, "it does not tell the pass how many score entries it computed")
            heads = reading.trace.layers[0].heads
            said = f"{foretold} score entries a head are foretold, {computed / heads:.1f} computed"
            must(computed <= foretold * heads, said)


def what_comes_after_changes_nothing_before(method: AttentionMethod, subjects: Subjects) -> None:
    if method.looks_ahead:
        return
    reading, ids = subjects.reading(), subjects.reading().trace.ids
    one, other = (Prompt(torch.cat([ids[:-9], random_ids(9, seed)]), chat=False) for seed in (1, 2))
    rows = [read(reading.model, facts(reading.model), prompt, method=method).layers[-1].keys for prompt in (one, other)]
    same = torch.equal(rows[0][:, : TOKENS - 9], rows[1][:, : TOKENS - 9])
    close = torch.allclose(rows[0][:, : TOKENS - 9], rows[1][:, : TOKENS - 9], rtol=1e-4, atol=1e-5)
    must(same or close, "a token sees what comes after it")


def decoding_goes_on_as_reading_would(method: AttentionMethod, subjects: Subjects) -> None:
    reading = subjects.reading()
    session = Session((reading.model, None), kv_dtype="float32")
    session.read(reading.trace.ids)
    run = session.run(method, question=random_ids(3, seed=2), max_new_tokens=4)
    again = session.run(method, question=random_ids(3, seed=2), max_new_tokens=4)
    must(run.tokens == again.tokens, "the same question gets another answer the second time")
    asked = run.ask(random_ids(3, seed=3), max_new_tokens=2)
    must(len(asked.tokens) == 2, "a second question is not answered")
    share = run.to_dict(quality=False)["score_share"]
    must(share is not None and 0 < share <= 1, f"the run reports {share} of the score entries")
    later = run.decode_score_share
    must(later is not None and 0 < later <= 1, f"the run reports {later} of the score entries while decoding")


def decoding_at_a_whole_budget_is_exact(method: AttentionMethod, subjects: Subjects) -> None:
    if not method.decodes or not method.takes_budget():
        return
    for architecture, kv in (
        ("llama", ()),
        ("gemma3", ()),
        ("gpt-oss", ()),
        ("mqa", (("knorm", {"budget": 0.5}),)),
        ("llama", _RAGGED),
    ):
        got, want = (_decoded(subjects, architecture, kv, chosen)[0] for chosen in (method.with_budget(1.0), None))
        furthest = float((got - want).abs().max() / want.abs().max())
        over = f"{architecture}, over what {kv[0][0]} keeps" if kv else architecture
        must(furthest < _CLOSE, f"{over}: at a budget of 1 decoding differs from exact attention by {furthest:.1e}")


def decoding_computes_no_more_than_exact_attention(method: AttentionMethod, subjects: Subjects) -> None:
    for kv in ((), _RAGGED, _PACKED):
        (_, exact), (logits, share) = (_decoded(subjects, "llama", kv, chosen) for chosen in (None, method))
        over = f"over what {kv[0][0]} keeps" if kv else "over the whole cache"
        must(bool(logits.isfinite().all()), f"{over}: decoding gives logits that are not finite")
        assert exact is not None
        must(share is not None and share > 0, f"{over}: it does not tell the pass what it computed while decoding")
        assert share is not None
        must(
            share <= exact + 1e-9, f"{over}: {share:.2%} of the score entries are computed, exact attention {exact:.2%}"
        )


_KVChosen = tuple[tuple[str, dict[str, Any]], ...]
_RAGGED: _KVChosen = (("adakv", {"budget": 0.6, "window": 8}),)
_PACKED: _KVChosen = (("kivi", {}),)


def _decoded(
    subjects: Subjects, architecture: str, kv: _KVChosen, attention: AttentionMethod | None
) -> tuple[Tensor, float | None]:
    """Logits [t, v] of tokens after the usual prompt, read exactly, under KV methods and an attention method that
    decodes (or exact attention); and the share of the score entries computed.
    """
    reading = subjects.reading(architecture)
    methods = [method for method in (make(key, **values) for key, values in kv) if isinstance(method, KVMethod)]
    plan = make_plan(reading.trace, methods, torch.float32, model=reading.model)
    chosen = attention if attention is not None and attention.decodes else None
    decoder = Decoder(reading.model, plan.stores(), TOKENS, None, chosen, reading.trace.layers)
    new = random_ids(18, seed=5)
    logits = [decoder.feed(new[:6], logits=6), *[decoder.feed(token[None]) for token in new[6:]]]
    return torch.cat(logits), decoder.score_share


def reading_twice_gives_the_same(method: AttentionMethod, subjects: Subjects) -> None:
    reading = subjects.reading()
    with nothing_left(method, reading.model, recorded_in(reading.trace)):
        one, two = (read(reading.model, facts(reading.model), reading.trace.prompt, method=method) for _ in range(2))
    must(fingerprint(recorded_in(one)) == fingerprint(recorded_in(two)), "two readings of a prompt differ")
