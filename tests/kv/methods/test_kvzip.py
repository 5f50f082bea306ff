"""KVzip: what the model needs to repeat its context."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.kv.support import traced
from workbench.errors import BadRecipe, Cancelled, NotApplicable
from workbench.kv import AdaKV, KVzip, PyramidKV, SnapKV
from workbench.kv.base import Study
from workbench.kv.plan import rank
from workbench.kv.ranking import Ranking
from workbench.models import tiny
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    import workbench as wb

TOKENS = 50


def repeated_plainly(
    model: PreTrainedModel, ids: Tensor, piece: range, instruction: list[int], sinks: int
) -> list[list[list[float]]]:
    """Scores [l][k][p] of a piece, from transformers' own attention over the prompt and the pass in one row."""
    whole = torch.cat([ids, torch.tensor(instruction, dtype=torch.long), ids[piece.start : piece.stop]])
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(whole[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    n, total = ids.numel(), whole.numel()
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    shown = [*range(min(sinks, piece.start)), *piece, *range(n, total)]
    scores = []
    for layer in attentions:
        heads = []
        for head in range(model.config.num_key_value_heads):
            best = [0.0] * len(piece)
            for query_head in range(head * groups, (head + 1) * groups):
                for row in layer[0, query_head, n:].tolist():
                    mass = sum(row[j] for j in shown)
                    best = [max(b, row[j] / mass) for b, j in zip(best, piece, strict=True)]
            heads.append(best)
        scores.append(heads)
    return scores


@pytest.mark.parametrize("architecture", ["llama", "mqa", "qwen3"])
def test_scores_are_the_most_attention_while_the_context_is_repeated(architecture: str) -> None:
    model = tiny(architecture)
    trace = traced(model, TOKENS)
    got = KVzip(chunk=20, sinks=3).scores(Study(trace, model))
    # Without a tokenizer each piece follows the eight tokens before it.
    for start in range(0, TOKENS, 20):
        piece = range(start, min(start + 20, TOKENS))
        cue = trace.ids[max(start - 8, 0) : start].tolist()
        want = torch.tensor(repeated_plainly(model, trace.ids, piece, cue, 3))
        first = 3 if start == 0 else 0  # sinks
        assert torch.allclose(got[:, :, piece.start + first : piece.stop], want[:, :, first:], rtol=1e-4, atol=1e-6)
    assert bool(got[:, :, :3].isinf().all()) and got.dtype == torch.float32


def test_the_instruction_closes_the_turn_and_names_where_to_go_on(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    prompt = replace(Prompt.of("a b c d e f g h i j k l m n o p", byte_tokenizer), tokenizer=byte_tokenizer)
    trace = traced(model, prompt)
    got = KVzip(chunk=30, sinks=0).scores(Study(trace, model))
    text = str(byte_tokenizer.decode(trace.ids))
    pieces = [range(30), range(30, trace.tokens)]
    asked = ["Repeat the previous context:", f"Repeat the previous context starting with: {text[22:30].strip()}"]
    for piece, words in zip(pieces, asked, strict=True):
        instruction = byte_tokenizer(f"\n\n{words}~\n[assistant]")["input_ids"]
        want = torch.tensor(repeated_plainly(model, trace.ids, piece, instruction, 0))
        assert torch.allclose(got[:, :, piece.start : piece.stop], want, rtol=1e-4, atol=1e-6)


def test_sliding_layers_attend_within_their_window_while_the_context_is_repeated() -> None:
    model = tiny("gemma3")
    trace = traced(model, TOKENS)
    got = KVzip(sinks=0).scores(Study(trace, model))
    want = repeated_plainly(model, trace.ids, range(TOKENS), [], 0)
    assert got.shape[0] == 1 and torch.allclose(got[0], torch.tensor(want[1]), rtol=1e-4, atol=1e-6)


def test_one_threshold_is_laid_over_all_layers_and_heads() -> None:
    scores = torch.rand(3, 4, 40, generator=torch.Generator().manual_seed(0)) ** torch.arange(1, 5)[:, None]
    ranking = Ranking(scores)
    for entries in (12, 30, 100, 333, 480):
        counts = KVzip().allocate(ranking, entries)
        assert int(counts.sum()) == entries and int(counts.min()) >= 1
        # Heads beyond their least keep nothing below the threshold, and no head loses anything above it.
        chosen = ranking.selected(counts)
        beyond = [float(s) for s in scores[chosen & (counts > 1)[..., None]]]
        assert all(lost <= min(beyond, default=1.0) for lost in scores[~chosen].tolist())
        equal = KVzip(heads="equal").allocate(ranking, entries)
        assert bool((equal == entries // 12).all())


def test_the_context_is_repeated_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny("llama"), []
    from workbench.engine import attention_hook
    from workbench.kv.methods.evict import kvzip

    def counted(*args: Any, **options: Any) -> Tensor:
        passes.append(args)
        return attention_hook.forward(*args, **options)

    monkeypatch.setattr(kvzip, "forward", counted)
    trace = traced(model, TOKENS)
    plans = [make_plan(trace, [KVzip(budget=b, chunk=20)], torch.bfloat16, model=model) for b in (0.2, 0.5, 0.9)]
    assert len(passes) == 3  # pieces of 20, 20 and 10
    assert [plan.nbytes <= b * plan.full_nbytes for plan, b in zip(plans, (0.2, 0.5, 0.9), strict=True)] == [True] * 3


def test_repeating_shows_progress_and_leaves_nothing_when_cancelled() -> None:
    model, seen = tiny("llama"), []
    trace = traced(model, TOKENS)
    attention = model.config._attn_implementation

    def stop(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))
        if done == 4:
            progress.cancel()

    progress = Progress(stop)
    with pytest.raises(Cancelled):
        rank(Study(trace, model, progress), KVzip(chunk=20))
    assert seen[-1] == ("repeating the context", 4, 9) and model.config._attn_implementation == attention
    assert rank(Study(trace, model), KVzip(chunk=20)).scores.shape == (3, 2, TOKENS)


@pytest.mark.parametrize("allocator", [AdaKV(), PyramidKV(window=4)])
def test_an_allocator_of_the_recipe_shares_the_room_instead(allocator: Any) -> None:
    model = tiny("llama")
    trace = traced(model, TOKENS)
    zipped = KVzip(budget=0.4)
    plan = make_plan(trace, [zipped, allocator], torch.bfloat16, model=model)
    assert plan.stages.score is zipped and plan.stages.allocate is allocator
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= 0.4 * plan.full_nbytes
    with pytest.raises(BadRecipe, match="kvzip and snapkv"):
        make_plan(trace, [zipped, SnapKV()], torch.bfloat16, model=model)


def test_what_cannot_be_repeated_is_refused_with_the_reason() -> None:
    model = tiny("llama")
    trace = traced(model, TOKENS)
    with pytest.raises(NotApplicable, match="no model"):
        make_plan(trace, [KVzip()], torch.bfloat16)
    long = traced(model, 1500)
    with pytest.raises(NotApplicable, match="smaller chunk"):
        make_plan(long, [KVzip()], torch.bfloat16, model=model)
    assert make_plan(long, [KVzip(chunk=500)], torch.bfloat16, model=model).share <= 0.5


def test_a_question_asked_afterwards_is_still_answered(default_session: wb.Session) -> None:
    # The claim, in direction: what is asked only later is kept by KVzip and lost by SnapKV at the same size.
    from workbench.examples import needle

    session, task = default_session, needle(tokens=700, depth=0.3)
    session.read(task.text)
    zipped, snapped = (
        session.run(key, budget=0.3, question=task.question, max_new_tokens=8) for key in ("kvzip", "snapkv")
    )
    assert zipped.quality.kl < snapped.quality.kl
