"""The session: runs, streams, questions, comparisons and timelines; and what bad input leaves behind (nothing)."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import workbench as wb
from tests.readings import ids_of, session_on
from tests.runtime.memory_reach import within_reach
from workbench.errors import (
    BadBudget,
    BadParameter,
    BadPrompt,
    BadRecipe,
    BudgetTooSmall,
    Cancelled,
    InputError,
    NotRead,
    PromptTooLong,
    UnknownMethod,
)
from workbench.models import tiny
from workbench.progress import Progress
from workbench.registry import find, registered
from workbench.runtime.run import Run
from workbench.session import COLUMNS

ModelOf = Callable[[str], PreTrainedModel]


def moderate(key: str, session: wb.Session, budget: float = 0.6) -> dict[str, float]:
    """A budget that every method can meet on a prompt that may be shorter than its window."""
    if not find(key).takes_budget():
        return {}
    try:
        session.plan(key, budget=budget)
    except BudgetTooSmall as refusal:
        return {"budget": refusal.smallest}
    return {"budget": budget}


COMPRESSING = [cls.key for cls in registered("kv") if cls.takes_budget()]
TEXT = "The lamp stands on the hill ~ and the key lies under the third hive."


@pytest.fixture
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    return session_on(tiny_llama, ids_of(60, 0))


@pytest.fixture
def talker(tiny_llama: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast) -> wb.Session:
    """A session that reads and writes text."""
    made = wb.Session((tiny_llama, byte_tokenizer), kv_dtype="float32")
    made.read(TEXT)
    return made


def generated(model: PreTrainedModel, sequence: Tensor, count: int) -> tuple[int, ...]:
    made = model.generate(
        sequence[None], attention_mask=torch.ones(1, sequence.numel()), max_new_tokens=count, do_sample=False
    )
    return tuple(made[0, sequence.numel() :].tolist())


# --- bad input


@pytest.mark.parametrize(
    ("error", "ask"),
    [
        (UnknownMethod, lambda s: s.run("snapvk")),
        (UnknownMethod, lambda s: s.plan(["full", "nothing"])),
        (BadParameter, lambda s: s.run("snapkv", window=0)),
        (BadParameter, lambda s: s.run("snapkv", windw=3)),
        (BadParameter, lambda s: s.run("snapkv", kernel=4)),
        (BadParameter, lambda s: s.run("snapkv", kernel=math.nan)),
        (BadParameter, lambda s: s.run("full", budget=0.5)),
        (BadBudget, lambda s: s.run("snapkv", budget=0)),
        (BadBudget, lambda s: s.run("snapkv", budget=math.nan)),
        (BadBudget, lambda s: s.run("snapkv", budget=-1)),
        (BadBudget, lambda s: s.run("snapkv", budget=2)),
        (BadBudget, lambda s: s.run("snapkv", budget=True)),
        (BadBudget, lambda s: s.run("snapkv", budget="5 parsecs")),
        (BadBudget, lambda s: s.run("snapkv", budget="0 tokens")),
        (BadBudget, lambda s: s.run(["snapkv", "kivi"], budget="5 parsecs")),
        (BadBudget, lambda s: s.run("kivi", budget="16 tokens")),  # it keeps every token
        (BadBudget, lambda s: s.compare(["snapkv"], budgets=[0])),
        (BudgetTooSmall, lambda s: s.run("snapkv", budget=1e-6)),
        (BudgetTooSmall, lambda s: s.run("kivi", budget="1 B")),
        (BadRecipe, lambda s: s.run([])),
        (BadRecipe, lambda s: s.run(None)),
        (BadRecipe, lambda s: s.run(["snapkv", "h2o"])),
        (BadRecipe, lambda s: s.run(["h2o", "kivi"])),
        (BadRecipe, lambda s: s.run(["snapkv", "kivi"], window=3)),
        (BadPrompt, lambda s: s.run(question="no tokenizer here")),
        (BadPrompt, lambda s: s.run(question=" ")),
        (BadPrompt, lambda s: s.run(question=[])),
        (BadPrompt, lambda s: s.run(question=[256])),
        (BadPrompt, lambda s: s.run(question=[3, -1])),
        (BadPrompt, lambda s: s.run(question=[1.5])),
        (BadPrompt, lambda s: s.read("no tokenizer here")),
        (BadPrompt, lambda s: s.read([{"role": "user", "content": "no tokenizer here"}])),
        (BadPrompt, lambda s: s.read("")),
        (BadPrompt, lambda s: s.read(" \n")),
        (BadPrompt, lambda s: s.read([])),
        (BadPrompt, lambda s: s.read([3, 256])),
        (BadPrompt, lambda s: s.read([-1, 3])),
        (BadPrompt, lambda s: s.read([1.0, 2.0])),
        (BadPrompt, lambda s: s.read(torch.zeros(2, 3, dtype=torch.long))),
        (PromptTooLong, lambda s: s.read([1] * 2049)),
        (PromptTooLong, lambda s: s.run(question=[1] * 2000)),
        (PromptTooLong, lambda s: s.run(max_new_tokens=1989)),
        (BadParameter, lambda s: s.run(max_new_tokens=0)),
        (BadParameter, lambda s: s.run(max_new_tokens=-3)),
        (BadParameter, lambda s: s.run(max_new_tokens=1.5)),
        (BadParameter, lambda s: s.run(max_new_tokens="3")),
        (BadParameter, lambda s: s.run(max_new_tokens=None)),
        (BadParameter, lambda s: s.run(max_new_tokens=True)),
        (BadParameter, lambda s: s.attention(3, 0)),
        (BadParameter, lambda s: s.attention(-1, 0)),
        (BadParameter, lambda s: s.attention(0, 4)),
        (BadParameter, lambda s: s.attention(0.5, 0)),
        (BadParameter, lambda s: s.attention("a", 0)),
        (BadParameter, lambda s: s.attention(0, 0, pixels=0)),
        (BadParameter, lambda s: s.attention(0, 0, pooling="median")),
        (UnknownMethod, lambda s: s.attention(0, 0, "snapvk")),
        (BadPrompt, lambda s: s.runs[0].ask([999])),
        (BadPrompt, lambda s: s.runs[0].ask("no tokenizer here")),
        (BadParameter, lambda s: s.runs[0].ask([3], max_new_tokens=0)),
        (PromptTooLong, lambda s: s.runs[0].ask([3], max_new_tokens=5000)),
    ],
)
def test_bad_input_is_one_clear_line_and_changes_nothing(
    error: type[Exception], ask: Callable[[wb.Session], Any], session: wb.Session
) -> None:
    first = session.run("snapkv", budget=0.6, question=[4, 5], max_new_tokens=2)
    trace, runs, config = session.trace, list(session.runs), session.model.config.to_dict()
    with pytest.raises(error) as raised:
        ask(session)
    assert isinstance(raised.value, InputError) and raised.value.exit_code == 2
    assert str(raised.value) and "\n" not in str(raised.value)
    assert session.trace is trace and session.runs == runs and session.model.config.to_dict() == config
    assert session.run("snapkv", budget=0.6, question=[4, 5], max_new_tokens=2).tokens == first.tokens


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.run(),
        lambda s: s.plan(),
        lambda s: s.stream(),
        lambda s: s.attention(0, 0),
        lambda s: s.compare(["full"]),
    ],
)
def test_nothing_can_be_asked_before_reading(ask: Callable[[wb.Session], Any], tiny_llama: PreTrainedModel) -> None:
    made = wb.Session((tiny_llama, None))
    with pytest.raises(NotRead, match=r"call read\(text\) first"):
        ask(made)
    assert made.runs == [] and len(made.memory) == 0


@pytest.mark.parametrize("model", [None, 5, (), ("a", "b", "c"), ("a", None)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(InputError):
        wb.Session(model)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", 5])
def test_a_cache_precision_that_does_not_exist_is_refused(dtype: Any, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BadParameter, match="bfloat16"):
        wb.Session((tiny_llama, None), kv_dtype=dtype)


# --- questions


def test_the_longest_prompt_that_fits_is_read(tiny_llama: PreTrainedModel) -> None:
    made = wb.Session((tiny_llama, None))
    made.read(ids_of(2046, 0))
    assert len(made.run("snapkv", budget=0.1, max_new_tokens=2).tokens) == 2


def test_asking_on_the_full_cache_equals_generate_on_everything_so_far(tiny_model: ModelOf) -> None:
    for architecture in ("llama", "gemma3"):
        model = tiny_model(architecture)
        made = wb.Session((model, None), kv_dtype="float32")
        made.read(ids_of(30, 0))
        run, sequence = (
            made.run("full", question=ids_of(5, 1), max_new_tokens=6),
            torch.cat([ids_of(30, 0), ids_of(5, 1)]),
        )
        for turn in range(3):
            assert run.tokens == generated(model, sequence, 6)
            assert torch.equal(run.prompt_ids, sequence)
            sequence = torch.cat([sequence, torch.tensor(run.tokens), ids_of(4, 10 + turn)])
            run = run.ask(ids_of(4, 10 + turn), max_new_tokens=6)


@pytest.mark.parametrize("key", ["full", "h2o", "kivi"])  # of every method it is a promise
def test_a_run_may_be_asked_again_and_stays_as_it_is(key: str, session: wb.Session) -> None:  # trap 4
    run = session.run(key, question=[4, 5], max_new_tokens=3, **moderate(key, session))
    before = run.to_dict(quality=False), run.kv_nbytes
    first, second = (run.ask([9, 8, 7], max_new_tokens=5) for _ in range(2))
    other = run.ask([100], max_new_tokens=5)
    assert first.tokens == second.tokens and torch.equal(first.prompt_ids, second.prompt_ids)
    assert other.prompt_ids.numel() == 60 + 2 + 3 + 1
    assert (run.to_dict(quality=False), run.kv_nbytes) == before


def test_a_later_question_sees_only_what_the_compressed_prompt_kept(session: wb.Session) -> None:  # trap 15
    run = session.run("snapkv", budget=0.5, window=4, question=[4, 5], max_new_tokens=3)
    asked = run.ask([9, 8, 7], max_new_tokens=5)
    assert asked.plan is run.plan and asked.decoder is not None
    for layer, store in enumerate(asked.decoder.stores):
        for head, held in enumerate(store.positions):
            new = torch.arange(60, 60 + 2 + 3 + 3 + 4)  # the last token is never read
            assert torch.equal(held, torch.cat([run.plan.kept(layer, head), new]))


def test_a_dialogue_is_the_templates_rendering(byte_tokenizer: PreTrainedTokenizerFast) -> None:  # trap 23
    model = tiny()
    made = wb.Session((model, byte_tokenizer))
    made.read(TEXT)
    probe = made.run("full", question="Where?", max_new_tokens=12)
    end = next(token for token in probe.tokens[3:] if token not in probe.tokens[:3])  # pretend that this ends a turn
    for ends in (False, True):
        model.generation_config.eos_token_id = end if ends else None
        made = wb.Session((model, byte_tokenizer))
        made.read(TEXT)
        run = made.run("full", question="Where?", max_new_tokens=12)
        assert (run.tokens[-1] == end) == ends
        asked = run.ask("And then?", max_new_tokens=2)
        # "~" closes a turn in the template: it comes after an answer that was cut, and after one that ended otherwise.
        start = made.trace.ids.tolist() + byte_tokenizer("\n\nWhere?~\n[assistant]")["input_ids"] if made.trace else []
        rest = byte_tokenizer("~\n[user]And then?~\n[assistant]")["input_ids"]
        assert asked.prompt_ids.tolist() == [*start, *run.tokens, *rest]


def test_an_answer_that_ended_is_not_ended_twice(byte_tokenizer: PreTrainedTokenizerFast) -> None:  # trap 23
    model = tiny()
    end = byte_tokenizer.convert_tokens_to_ids("~")
    model.lm_head.weight[end] = 0
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.zeros_like(model.lm_head.weight))  # every logit ties: argmax is token 0
    model.generation_config.eos_token_id = 0
    made = wb.Session((model, byte_tokenizer))
    made.read(TEXT)
    run = made.run("full", question="Where?")
    assert run.tokens == (0,)
    ending = byte_tokenizer.decode([0])
    byte_tokenizer_template = byte_tokenizer.chat_template
    byte_tokenizer.chat_template = byte_tokenizer_template.replace("~", ending)
    try:
        made.read(TEXT)
        run = made.run("full", question="Where?")
        asked = run.ask("And then?", max_new_tokens=1)
        talk = [
            {"role": "user", "content": f"{TEXT}\n\nWhere?"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "And then?"},
        ]
        want = byte_tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert byte_tokenizer.decode(asked.prompt_ids) == want
    finally:
        byte_tokenizer.chat_template = byte_tokenizer_template


def test_generation_stops_at_the_token_that_ends_it(session: wb.Session) -> None:
    free = session.run("full", max_new_tokens=12).tokens
    model = tiny()
    model.generation_config.eos_token_id = [free[4]]
    made = wb.Session((model, None))
    made.read(ids_of(60, 0))
    stop = free.index(free[4])
    assert made.run("full", max_new_tokens=12).tokens == free[: stop + 1]


# --- streams


@pytest.mark.parametrize("recipe", ["full", "h2o", "kivi"])
def test_what_a_stream_says_is_what_its_run_says(recipe: str, talker: wb.Session) -> None:
    budget = {} if recipe == "full" else {"budget": 0.8}
    stream = talker.stream(recipe, question="Where?", max_new_tokens=40, **budget)
    tokens = list(stream)
    run = stream.run
    assert tuple(token.id for token in tokens) == run.tokens and len(run.tokens) == 40
    assert "".join(token.text for token in tokens) == run.text  # random bytes: mostly broken characters
    assert talker.runs[-1] is run
    assert run.tokens == talker.run(recipe, question="Where?", max_new_tokens=40, **budget).tokens


def test_progress_only_goes_forward(talker: wb.Session) -> None:
    seen: list[tuple[str, int, int]] = []
    progress = Progress(lambda stage, done, total: seen.append((stage, done, total)))
    talker.read(TEXT, progress=progress)
    talker.run("snapkv", budget=0.5, question="Where?", max_new_tokens=5, progress=progress)
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["reading", "scoring by snapkv", "question", "decoding"]
    for stage in stages:
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert all(0 <= done <= total for done, total in steps)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert ("reading", 3, 3) in seen and seen[-1] == ("decoding", 5, 5)


def test_reading_can_be_cancelled_and_the_earlier_prompt_stays(session: wb.Session) -> None:
    trace = session.trace
    progress = Progress()
    progress = Progress(lambda stage, done, total: progress.cancel() if done == 1 else None)
    with pytest.raises(Cancelled):
        session.read(ids_of(30, 5), progress=progress)
    assert session.trace is trace
    assert len(session.run("snapkv", budget=0.5, max_new_tokens=2).tokens) == 2


def test_a_stream_is_cancelled_from_another_thread(session: wb.Session) -> None:
    expected = session.run("h2o", budget=0.5, max_new_tokens=4).tokens
    runs, before = len(session.runs), session.model.config._attn_implementation
    stream = session.stream("h2o", budget=0.5, max_new_tokens=1900)
    started, seen, raised = threading.Event(), [], []

    def consume() -> None:
        try:
            for token in stream:
                seen.append(token.id)
                started.set()
        except Cancelled as error:
            raised.append(error)

    thread = threading.Thread(target=consume)
    thread.start()
    assert started.wait(60)
    stream.cancel()
    thread.join(60)
    assert not thread.is_alive() and len(raised) == 1 and len(seen) < 1900
    assert len(session.runs) == runs and session.model.config._attn_implementation == before
    with pytest.raises(NotRead, match="did not finish"):
        _ = stream.run
    assert session.run("h2o", budget=0.5, max_new_tokens=4).tokens == expected


def test_an_abandoned_stream_changes_nothing(session: wb.Session) -> None:
    stream = session.stream("kivi", budget=0.7, max_new_tokens=10)
    first = next(stream)
    stream_run = session.run("kivi", budget=0.7, max_new_tokens=10)
    assert first.id == stream_run.tokens[0] and session.runs == [stream_run]
    with torch.inference_mode():
        assert session.model(ids_of(5, 0)[None]).logits.isfinite().all()
    assert stream.run.tokens == stream_run.tokens  # and may still be finished


# --- measures


def test_full_against_full_is_exactly_nothing(session: wb.Session) -> None:
    for question in (None, [4, 5]):
        run = session.run("full", question=question, max_new_tokens=6)
        quality = run.quality
        assert (quality.kl, quality.kl_max, quality.top1_agreement, quality.nll_difference) == (0.0, 0.0, 1.0, 0.0)
        assert quality.first_divergence is None and run.reference_tokens == run.tokens
        assert float(run.verdict.output_error.abs().max()) == 0.0


@pytest.mark.parametrize("key", COMPRESSING)
def test_quality_is_finite_and_belongs_to_the_runs_own_prompt(key: str, session: wb.Session) -> None:
    budget = moderate(key, session)
    early, late = (session.run(key, question=[4, 5], max_new_tokens=5, **budget) for _ in range(2))
    figures = early.quality
    assert figures.kl >= 0 and 0 <= figures.top1_agreement <= 1 and figures.tokens == 5
    assert all(value is None or math.isfinite(value) for value in figures.to_dict().values())
    assert early.verdict.output_error.shape == (3, 4) and bool(early.verdict.output_error.isfinite().all())
    asked = late.ask([6], max_new_tokens=2)
    session.read(ids_of(33, 9))
    assert late.quality == figures  # measured only now, against the prompt it was made from
    assert math.isfinite(asked.quality.kl)


@pytest.mark.parametrize("key", COMPRESSING)
def test_less_room_costs_more(key: str, tiny_llama: PreTrainedModel) -> None:
    made = wb.Session((tiny_llama, None), kv_dtype="float32")
    made.read(ids_of(200, 0))
    least = max(within_reach(key, 0.4), moderate(key, made, 0.4)["budget"])
    errors = [float(made.plan(key, budget=budget).error.mean()) for budget in (1.0, 0.75, least)]
    assert errors[0] <= 1e-3
    assert errors[0] <= errors[1] + 1e-3 <= errors[2] + 2e-3
    assert errors[2] > 0


def test_comparing_gives_a_row_a_run_and_errors_as_rows(session: wb.Session) -> None:
    table = session.compare(
        ["full", "snapkv", ["h2o", "adakv"], "kivi"], budgets=[0.6, 0.0001], question=[4, 5], max_new_tokens=3
    )
    assert table["recipe"].iloc[0] == "full" and len(table) == 1 + 3 * 2
    failed = table[table["error"].notna()]
    assert len(failed) == 3 and (failed["budget"] == 0.0001).all() and failed["error"].str.contains("smallest").all()
    done = table[table["error"].isna()]
    assert len(session.runs) == len(done) == 4
    assert (done["kv_share"] <= done["budget"].fillna(1.0).astype(float)).all()
    assert done.iloc[0]["kl"] == 0.0 and done.iloc[0]["top1"] == 1.0 and done["kl"].map(math.isfinite).all()
    json.loads(table.to_json())


def test_comparing_one_recipe_needs_no_list(session: wb.Session) -> None:
    assert list(session.compare("full", max_new_tokens=2)["recipe"]) == ["full"]


# --- records


@pytest.mark.parametrize("recipe", ["full", "h2o", "kivi", "mikv", "adakv"])
def test_the_timelines_bytes_are_the_live_stores(recipe: str, tiny_llama: PreTrainedModel) -> None:
    made = wb.Session((tiny_llama, None))
    made.read(ids_of(200, 0))
    budget = {} if recipe == "full" else {"budget": 0.5}
    run = made.run(recipe, question=[4, 5], max_new_tokens=5, **budget)
    planned = next(sample for sample in run.memory.samples if sample.phase == "plan")
    kv = {name: nbytes for name, nbytes in planned.categories.items() if name.startswith("kv ")}
    by_precision: dict[str, int] = {}
    for store in run.plan.stores():
        for name, nbytes in store.nbytes_by_precision.items():
            by_precision[f"kv {name}"] = by_precision.get(f"kv {name}", 0) + nbytes
    assert kv == by_precision and sum(kv.values()) == run.plan.nbytes
    last = run.memory.samples[-1]
    held = sum(nbytes for name, nbytes in last.categories.items() if name.startswith("kv "))
    assert held == run.kv_nbytes == sum(last.kv_layers)
    assert last.categories["weights"] >= made.facts.weight_bytes and made.trace is not None
    assert last.categories["trace"] == made.trace.nbytes  # shown, but never part of the cache
    assert [sample.phase for sample in run.memory.samples] == ["read"] * 3 + ["plan", "question"] + ["decode"] * 4


def test_the_sessions_memory_is_all_runs_one_after_another(session: wb.Session) -> None:
    assert {sample.phase for sample in session.memory.samples} == {"read"}
    first, second = (session.run(key, max_new_tokens=3) for key in ("full", "snapkv"))
    samples = session.memory.samples
    assert {sample.run for sample in samples} >= {first.recipe.label, second.recipe.label}
    times = [sample.time for sample in samples]
    assert times == sorted(times)


@pytest.mark.parametrize("key", ["full", *COMPRESSING])
def test_everything_said_about_a_run_is_json(key: str, session: wb.Session) -> None:
    run: Run = session.run(key, question=[4, 5], max_new_tokens=3, **moderate(key, session))
    for record in (run, run.ask([3], max_new_tokens=2)):
        written = json.loads(json.dumps(record.to_dict(), allow_nan=False))
        assert written["tokens"] == list(record.tokens) and written["kv_nbytes"] == record.plan.nbytes
        assert written["quality"]["kl"] >= 0 and wb.Recipe.from_dict(written["recipe"]) == record.recipe
    json.dumps(session.memory.to_dict(), allow_nan=False)


# --- the default model


@pytest.mark.model
def test_the_default_model_is_exact_over_a_chat(default_session: wb.Session) -> None:
    made = wb.Session((default_session.model, default_session.tokenizer), kv_dtype="float32")
    trace = made.read(TEXT)
    run = made.run("full", question="Where is the key?", max_new_tokens=10)
    with torch.inference_mode():
        want = made.model(trace.ids[None]).logits[0, -1]
    assert (trace.logits - want).abs().max() < 1e-4
    assert run.tokens == generated(made.model, run.prompt_ids, len(run.tokens))
    asked = run.ask("What stands on the hill?", max_new_tokens=6)
    assert asked.tokens == generated(made.model, asked.prompt_ids, len(asked.tokens))

    tokenizer = made.tokenizer
    talk = [
        {"role": "user", "content": f"{TEXT}\n\nWhere is the key?"},
        {"role": "assistant", "content": run.text},
        {"role": "user", "content": "What stands on the hill?"},
    ]
    assert tokenizer is not None
    assert tokenizer.decode(asked.prompt_ids) == tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )

    made_16 = wb.Session((default_session.model, tokenizer))
    made_16.read(TEXT)
    quality = made_16.run("kivi", bits=8, question="Where is the key?", max_new_tokens=6).quality
    assert quality.kl < 0.05 and quality.top1_agreement >= 0.8


def test_measuring_can_be_cancelled_and_is_not_remembered(tiny_model: ModelOf) -> None:
    made = wb.Session((tiny_model("llama"), None))
    made.read(ids_of(60, 0))
    run = made.run("snapkv", budget=0.5, max_new_tokens=4)
    progress = Progress(lambda stage, done, total: progress.cancel())
    with pytest.raises(Cancelled):
        run.measure(progress=progress)
    assert not run.measured
    assert run.measure().figures == run.quality and run.measured


def test_only_the_last_runs_keep_their_caches(tiny_model: ModelOf) -> None:
    made = wb.Session((tiny_model("llama"), None))
    made.read(ids_of(60, 0))
    runs = [made.run("snapkv", budget=0.5, max_new_tokens=2) for _ in range(6)]
    assert [run.decoder is None for run in runs] == [True, True, False, False, False, False]
    with pytest.raises(NotRead, match="released"):
        runs[0].ask("again")
    assert runs[0].quality.tokens == 2 and runs[0].kv_nbytes == runs[0].plan.nbytes
    made.read(ids_of(50, 0))
    assert made.runs == [] and len(made.memory) > 0


def test_perplexity_of_a_given_text_is_that_of_plain_transformers(tiny_model: ModelOf) -> None:
    model = tiny_model("llama")
    made = wb.Session((model, None), kv_dtype="float32")
    prompt, question, text = ids_of(60, 0), ids_of(5, 0), ids_of(20, 0)
    made.read(prompt)
    run = made.run("full", question=question, max_new_tokens=2)
    figures = run.measure(text).figures
    with torch.no_grad():
        logits = model(torch.cat([prompt, question, text])[None]).logits[0, 64:-1]
    want = torch.nn.functional.cross_entropy(logits, text).exp().item()
    assert figures.perplexity == pytest.approx(want, rel=1e-4) == figures.perplexity_reference
    assert figures.tokens == 20 and figures.first_divergence is None and not run.measured
    worse = made.run("streaming-llm", budget=0.3, question=question, max_new_tokens=2).measure(text).figures
    assert worse.perplexity_reference == pytest.approx(want, rel=1e-4) and worse.kl > 0


def test_what_takes_long_keeps_only_those_waiting_who_want_the_same(session: wb.Session) -> None:
    trace, begun, go_on = session.trace, threading.Event(), threading.Event()
    assert trace is not None

    def slow() -> int:
        begun.set()
        assert go_on.wait(10)
        return 1

    found: list[int] = []
    askers = [threading.Thread(target=lambda: found.append(trace.once("slow", slow))) for _ in range(2)]
    for asker in askers:
        asker.start()
    assert begun.wait(10)
    assert trace.once("quick", lambda: 2) == 2 and found == []  # while the slow one is still being computed
    go_on.set()
    for asker in askers:
        asker.join(10)
    assert found == [1, 1]


# --- what is finished stays


class Broken(RuntimeError):
    """What no part of the workbench raises on purpose."""


def interrupted(made: wb.Session, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let a session's runs fail once so many of them are done."""
    plain = made.run

    def run(*arguments: Any, **options: Any) -> Run:
        if len(made.runs) == after:
            raise error
        return plain(*arguments, **options)

    monkeypatch.setattr(made, "run", run)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Cancelled("cancelled")], ids=["Ctrl-C", "cancelled"])
def test_an_interrupted_comparison_carries_its_finished_rows(
    error: BaseException, session: wb.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(session, monkeypatch, len(session.runs) + 2, error)
    with pytest.raises(type(error)) as stopped:
        session.compare(["full", "snapkv", "h2o"], budgets=[0.6], max_new_tokens=2)
    frame = stopped.value.finished  # type: ignore[attr-defined]
    assert frame["recipe"].tolist() == ["full", "snapkv 0.6"] and frame["kl"].notna().all()
    assert list(frame.columns) == list(COLUMNS) and "2 rows" in stopped.value.__notes__[0]


def test_a_comparison_cancelled_between_rows_carries_them_too(session: wb.Session) -> None:
    progress = Progress()
    rows = session.compare_rows(["full", "snapkv"], budgets=[0.6], max_new_tokens=2, progress=progress)
    assert next(rows)["recipe"] == "full"
    progress.cancel()
    with pytest.raises(Cancelled):
        next(rows)


def test_a_recipe_that_fails_is_a_row_with_its_reason(session: wb.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupted(session, patch, len(session.runs) + 1, Broken("two\nlines"))
        table = session.compare(["full", "snapkv"], budgets=[0.6], max_new_tokens=2)
    assert table["recipe"].tolist() == ["full", "snapkv 0.6"]
    assert table["error"].isna().tolist() == [True, False] and table["error"][1] == "unexpected Broken: two lines"
    table = session.compare([["snapkv", "h2o"], "block-sparse", "full"], budgets=[0.6], max_new_tokens=2)
    assert table["error"].notna().tolist() == [True, False, False] and "snapkv" in table["error"][0]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"recipes": []}, BadRecipe),
        ({"recipes": {}}, BadParameter),
        ({"recipes": 5}, BadParameter),
        ({"recipes": ["snapvk"]}, UnknownMethod),
        ({"budgets": []}, BadBudget),
        ({"budgets": "a lot"}, BadBudget),
        ({"budgets": None}, BadParameter),
        ({"max_new_tokens": 0}, BadParameter),
        ({"question": " "}, BadPrompt),
    ],
    ids=repr,
)
def test_what_is_wrong_with_all_rows_is_refused_before_the_first(
    wrong: dict[str, Any], error: type[Exception], session: wb.Session
) -> None:
    runs = len(session.runs)
    with pytest.raises(error):
        session.compare(**{"recipes": ["full", "snapkv"], **wrong})
    assert len(session.runs) == runs


def test_one_budget_needs_no_list(session: wb.Session) -> None:
    for budget in (0.6, "60%"):
        assert session.compare("snapkv", budgets=budget, max_new_tokens=2)["budget"].tolist() == [0.6]


def test_a_model_of_ones_own_is_taken_to_the_precision_that_is_named() -> None:
    session = wb.Session((tiny("llama"), None), dtype="bfloat16", device="cpu")
    assert session.model.dtype == torch.bfloat16
    session.read(ids_of(20))
    for wrong in ({"dtype": "bfloat17"}, {"device": "cuda:99"}, {"device": "abacus"}):
        with pytest.raises(BadParameter):
            wb.Session((tiny("llama"), None), **wrong)
