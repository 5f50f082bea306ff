"""What KV methods promise."""

from __future__ import annotations

import torch

from workbench.errors import BudgetTooSmall, NotApplicable
from workbench.kv.base import KVMethod
from workbench.kv.plan import Plan, rank
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import study_of
from workbench.runtime.run import Run
from workbench.session import Session
from workbench.testing.leftovers import nothing_left, recorded_in
from workbench.testing.problem import MethodProblem, must
from workbench.testing.stores import ascending, check_plan
from workbench.testing.subjects import (
    BUDGETS,
    TOKENS,
    Reading,
    Subjects,
    feasible,
    fresh_reading,
    plan_on,
    random_ids,
    within,
)
from workbench.trace import Trace

_CLOSE = 1e-4  # of the largest logit: what float32 may lose on the way


def live_bytes_are_those_planned_and_within_the_budget(method: KVMethod, subjects: Subjects) -> None:
    for budget in BUDGETS[2:] if method.supplies("read") else BUDGETS:
        reading = subjects.reading()
        plan = within(reading, method, budget)
        check_plan(plan)
        layers = reading.trace.layers
        full = sum(layer.kv_heads * TOKENS * (layer.keys.shape[-1] + layer.values.shape[-1]) * 2 for layer in layers)
        must(plan.full_nbytes == full, f"the uncompressed cache is {full} bytes, not {plan.full_nbytes}")


def a_refusal_names_the_smallest_budget_that_works(method: KVMethod, subjects: Subjects) -> None:
    if not method.takes_budget():
        return
    for architecture in ("llama", "mqa", "gemma3"):
        reading = subjects.reading(architecture, 33)
        try:
            plan_on(reading, method, 0.001)
        except BudgetTooSmall as refusal:
            smallest = refusal.smallest
        else:
            raise MethodProblem("a thousandth of 33 tokens is less than one token, but was not refused")
        within(reading, method, 0.001)
        try:
            less = plan_on(reading, method, round(smallest - 0.0002, 4))
        except BudgetTooSmall:
            continue
        raise MethodProblem(f"{smallest} is named as the smallest budget, but {less.share:.4f} works too")


def a_whole_budget_is_exact(method: KVMethod, subjects: Subjects) -> None:
    for architecture in ("llama", "gpt-oss"):  # the second with learned sinks
        _check_whole(method, subjects.reading(architecture))


def _check_whole(method: KVMethod, reading: Reading) -> None:
    ids = random_ids(9, seed=1)
    plan = plan_on(reading, method, 1.0, torch.float32)
    check_plan(plan)
    fits = plan.nbytes <= plan.full_nbytes or method.supplies("select")  # which holds what it selects by besides
    must(plan.keeps_all and fits, "a budget of 1 does not keep everything as it is")
    got = Decoder(reading.model, plan.stores(), TOKENS).feed(ids, logits=ids.numel())
    with torch.no_grad():
        want = reading.model(torch.cat([reading.trace.ids, ids])[None]).logits[0, -ids.numel() :]
    furthest = float((got - want).abs().max() / want.abs().max())
    must(furthest < _CLOSE, f"at a budget of 1 the logits differ from the model's own by {furthest:.1e}")
    sixteen = plan_on(reading, method, 1.0)
    must(sixteen.keeps_all, "a budget of 1 of a 16-bit cache does not keep everything")
    must(float(sixteen.error.max()) < 0.02, "a budget of 1 of a 16-bit cache loses more than the rounding to 16 bits")


def kept_positions_ascend_and_are_positions(method: KVMethod, subjects: Subjects) -> None:
    check_plan(plan_on(subjects.reading(), method))


def the_same_prompt_gives_the_same_plan(method: KVMethod, subjects: Subjects) -> None:
    plans = [plan_on(fresh_reading(tokens=40), type(method)(**dict(method))) for _ in range(2)]
    must(torch.equal(plans[0].tiers, plans[1].tiers), "two readings of the same prompt are planned differently")
    must(plans[0].nbytes == plans[1].nbytes, "two readings of the same prompt take different bytes")


def nothing_is_left_on_the_method_the_model_or_the_trace(method: KVMethod, subjects: Subjects) -> None:
    reading, other = fresh_reading(tokens=40), fresh_reading(tokens=41)
    with nothing_left(method, reading.model, recorded_in(reading.trace)):
        first = plan_on(reading, method)
        for store, layer in zip(first.stores(), reading.trace.layers, strict=True):
            store.append(layer.keys[:, -1:], layer.values[:, -1:], torch.tensor([40]))
        evicting = first.stages.evict if first.evicts else None
        Decoder(reading.model, first.stores(), 40, evicting).feed(random_ids(3))
        plan_on(other, method)
        check_plan(first)
    again = plan_on(fresh_reading(tokens=40), method)
    must(torch.equal(first.tiers, again.tiers), "another prompt in between changes the plan")


def allocation_shares_out_what_there_is(method: KVMethod, subjects: Subjects) -> None:
    if not method.supplies("allocate") or not method.supplies("score"):
        return
    for architecture, tokens in (("llama", TOKENS), ("mha", 7), ("mqa", 1)):
        reading = subjects.reading(architecture, tokens)
        study = study_of(reading.trace, reading.model)
        ranking = rank(study, method).beside(method.importance(study))
        least, before = ranking.layers * ranking.kv_heads, 0
        for entries in sorted({least + (tokens - 1) * least * step // 20 for step in range(21)}):
            counts = method.allocate(ranking, entries)
            total, asked = int(counts.sum()), f"{entries} entries of {least * tokens}"
            must(tuple(counts.shape) == (ranking.layers, ranking.kv_heads), f"{asked}: counts are {counts.tolist()}")
            must(not counts.is_floating_point(), f"{asked}: counts are {counts.dtype}, not whole numbers")
            must(bool((counts >= 1).all()), f"{asked}: a head gets {int(counts.min())}")
            must(bool((counts <= tokens).all()), f"{asked}: a head of {tokens} tokens gets {int(counts.max())}")
            must(total <= entries, f"{asked}: {total} are given out")
            must(total >= before, f"{asked}: {total} are given out, fewer than of less")
            unlike = bool((counts != counts[:, :1]).any())
            must(method.head_adaptive or not unlike, "heads of a layer get different lengths: set head_adaptive = True")
            before = total
        must(before == least * tokens, f"{before} are given out where there is room for all {least * tokens}")


def merging_changes_only_what_it_must(method: KVMethod, subjects: Subjects) -> None:
    if not method.supplies("merge"):
        return
    reading = subjects.reading()
    plan = plan_on(reading, method, 0.5)
    if plan.stages.score is None:
        return
    scores = rank(study_of(reading.trace, reading.model), plan.stages.score).scores
    for layer, ranked in zip(reading.trace.layers, scores, strict=True):
        keys, values = method.merge(layer, torch.ones_like(ranked, dtype=torch.bool), ranked)
        same = torch.equal(keys.float(), layer.keys.float()) and torch.equal(values.float(), layer.values.float())
        must(same, "where nothing was dropped there is nothing to merge, but keys or values change")
        some = plan.tiers[layer.index] > 0
        keys, values = method.merge(layer, some, ranked)
        must(keys.shape == layer.keys.shape and values.shape == layer.values.shape, "merging changes the shape")
        finite = bool(keys[some].isfinite().all()) and bool(values[some].isfinite().all())
        must(finite, "merging gives numbers that are not finite")


def prompts_of_few_tokens_work(method: KVMethod, subjects: Subjects) -> None:
    for tokens in (1, 2, 3, 7):
        check_plan(within(subjects.reading(tokens=tokens), method, 0.5))


def any_number_of_kv_heads_is_planned_by_kv_head(method: KVMethod, subjects: Subjects) -> None:
    for architecture in ("llama", "mqa", "mha", "qwen3", "phi3"):
        reading = subjects.reading(architecture)
        try:
            plan = plan_on(reading, method)
        except NotApplicable:
            must(architecture in ("qwen3", "phi3"), f"it cannot be applied to a Llama ({architecture})")
            continue
        shape = (len(reading.trace.layers), reading.trace.layers[0].kv_heads, TOKENS)
        check_plan(plan)
        must(tuple(plan.tiers.shape) == shape, f"{architecture}: planned for {tuple(plan.tiers.shape)}, not {shape}")
        _check_scores(reading, plan, shape)


def a_bfloat16_model_is_scored_in_float32(method: KVMethod, subjects: Subjects) -> None:
    reading = subjects.reading("llama", TOKENS, torch.bfloat16)
    plan = plan_on(reading, method)
    check_plan(plan)
    _check_scores(reading, plan, tuple(plan.tiers.shape))
    scorer = plan.stages.score
    if scorer is not None:
        dtype = scorer.scores(study_of(reading.trace, reading.model)).dtype
        must(dtype == torch.float32, f"a bfloat16 model's scores are {dtype}: many of them tie")


def _check_scores(reading: Reading, plan: Plan, shape: tuple[int, ...]) -> None:
    if plan.stages.score is None:
        return
    scores = rank(study_of(reading.trace, reading.model), plan.stages.score).scores
    must(tuple(scores.shape) == shape, f"scores are [layers, KV heads, tokens] = {shape}, not {tuple(scores.shape)}")


def sliding_layers_stay_exact(method: KVMethod, subjects: Subjects) -> None:
    reading = subjects.reading("gemma3")
    try:
        plan = within(reading, method, 0.6)
    except NotApplicable:
        return
    stores = check_plan(plan)
    for layer, window in ((x.index, x.window) for x in reading.trace.layers):
        if window is None:
            continue
        newest = list(range(TOKENS - window, TOKENS))
        store, where = stores[layer], f"layer {layer} slides"
        must(store.sliding_window == window and layer in plan.exact, f"{where}, but is compressed")
        must(all(row.tolist() == newest for row in store.positions), f"{where}, but does not hold its window")
        must(float(plan.error[layer].max()) < 0.02, f"{where}, but is not exact")
    sliding = subjects.reading("mistral")
    everything = plan_on(sliding, method, 1.0)
    must(everything.nbytes == everything.full_nbytes, "a model that slides in every layer is changed")
    if not method.takes_budget():
        return
    try:
        plan_on(sliding, method, 0.5)
    except BudgetTooSmall:
        return
    raise MethodProblem("a model that slides in every layer cannot take less, but half a budget was not refused")


def a_conversation_goes_on_and_repeats_itself(method: KVMethod, subjects: Subjects) -> None:
    reading = subjects.reading()
    session = Session((reading.model, None))
    session.read(reading.trace.ids)
    method = feasible(reading, method)
    first, second = random_ids(6, seed=2), random_ids(5, seed=3)
    with nothing_left(method, reading.model, recorded_in(_read_by(session))):
        runs = [session.run(method, question=first, max_new_tokens=4) for _ in range(2)]
        must(runs[0].tokens == runs[1].tokens, "the same question gets another answer the second time")
        before = runs[0].to_dict(quality=False), runs[0].kv_nbytes
        asked = [runs[0].ask(second, max_new_tokens=4) for _ in range(2)]
        must(asked[0].tokens == asked[1].tokens, "the same second question gets another answer the second time")
        same = (runs[0].to_dict(quality=False), runs[0].kv_nbytes) == before
        must(same, "a second question changes the run that it is asked of")
        for run, by_now in ((runs[0], TOKENS + 6 + 3), (asked[0], TOKENS + 6 + 4 + 5 + 3)):
            _check_positions(run, by_now)
        again = session.run(method, question=first, max_new_tokens=4)
        must(again.tokens == runs[0].tokens, "a second question changes the answer to the first")


def _check_positions(run: Run, count: int) -> None:
    """Check that a run's stores hold true positions after `count` tokens, the newest included."""
    assert run.decoder is not None
    for layer, store in enumerate(run.decoder.stores):
        for positions in store.positions:
            right = ascending(positions, count) and int(positions[-1]) == count - 1
            must(right, f"layer {layer}: after {count} tokens the positions held are {positions.tolist()}")


def _read_by(session: Session) -> Trace:
    assert session.trace is not None
    return session.trace
